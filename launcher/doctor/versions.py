"""Versions against bounds, as package metadata writes them: `jax<0.12,>=0.10.2; extra == 'cuda'`.

A small part of PEP 440 and 508, so that the doctor needs nothing besides Python's own library: release
numbers, pre-releases (which come before their release), the comparisons `== != <= >= < > ~=`, and
`.*`. Local versions (`+cu12`) and post-releases count as their release. Of markers only the name of
the extra is read.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Key = tuple[tuple[int, ...], int]

_REQUIREMENT = re.compile(r"\s*([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([\w.-]+)['\"]")
_SPECIFIER = re.compile(r"(~=|===?|!=|<=|>=|<|>)\s*(\S+)")
_VERSION = re.compile(r"v?(\d+(?:\.\d+)*)[._-]?(a|b|c|rc|alpha|beta|pre|preview|dev)?", re.I)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """A package, the bounds on its version, and the extra that asks for it ("": all do)."""

    name: str
    bounds: str
    extra: str = ""


def parse_requirement(text: str) -> Requirement:
    """Read one line of a package's requirements.

    Raises:
        ValueError: it is none.
    """
    match = _REQUIREMENT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no requirement: it should read such as jax>=0.10")
    name, bounds, marker = match.groups()
    extra = _EXTRA.search(marker or "")
    return Requirement(
        name=normal_name(name), bounds=bounds.strip(), extra=extra[1] if extra else ""
    )


def normal_name(name: str) -> str:
    """A package's name in the one spelling that compares (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def fits(version: str, bounds: str) -> bool:
    """Say whether a version keeps all of the bounds, separated by commas."""
    specifiers = [_SPECIFIER.fullmatch(part.strip()) for part in bounds.split(",") if part.strip()]
    if None in specifiers:
        raise ValueError(f"{bounds!r} are no bounds on a version: they should read such as >=1,<2")
    return all(_keeps(version, match[1], match[2]) for match in specifiers)


def release(version: str) -> tuple[int, ...]:
    """The release numbers of a version, without zeros at the end: (0, 10, 2) of 0.10.2rc1."""
    return _key(version)[0]


def _keeps(version: str, sign: str, bound: str) -> bool:
    if bound.endswith(".*"):
        prefix = _numbers(bound[:-2])
        within = (_numbers(version) + (0,) * len(prefix))[: len(prefix)] == prefix
        return within == (sign == "==")
    if sign == "~=":
        prefix = _numbers(bound)[:-1]
        return _key(version) >= _key(bound) and _numbers(version)[: len(prefix)] == prefix
    if sign == "<" and _key(version)[0] == _key(bound)[0]:
        return False  # 2.0rc1 is before 2.0, and still not what <2.0 asks for
    return _COMPARISONS[sign](_key(version), _key(bound))


_COMPARISONS: Mapping[str, Callable[[Key, Key], bool]] = {
    "==": lambda ours, bound: ours == bound,
    "===": lambda ours, bound: ours == bound,
    "!=": lambda ours, bound: ours != bound,
    "<=": lambda ours, bound: ours <= bound,
    ">=": lambda ours, bound: ours >= bound,
    "<": lambda ours, bound: ours < bound,
    ">": lambda ours, bound: ours > bound,
}


def _match(version: str) -> re.Match[str]:
    match = _VERSION.match(version)
    if match is None:
        raise ValueError(f"{version!r} is no version: it should read such as 1.2.3")
    return match


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in _match(version)[1].split("."))


def _key(version: str) -> Key:
    """Order versions: the release without zeros at its end, then -1 before it and 0 at it."""
    numbers = _numbers(version)
    while numbers and numbers[-1] == 0:
        numbers = numbers[:-1]
    return numbers, -1 if _match(version)[2] else 0
