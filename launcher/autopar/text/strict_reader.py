"""Read trees of plain values, as JSON and YAML give them, and take nothing for what it is not.

A `Node` is a value with its place in the file. Whatever is asked of it that it is not (a boolean
for a number, a key nobody knows, NaN) raises an error of the caller's class that names the place,
the value and the cure.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NoReturn

from launcher.errors import ConfigError

_SHOWN = 60  # characters of a value that a message repeats
_LEAST, _MOST = 1e-9, 1e30  # beyond these no quantity of ours makes sense, and products overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A value and where it stands.

    Attributes:
        place: The path from the top, such as `stages[1].mesh`; empty at the top.
        source: What was read, for the messages; empty where the place says it all.
    """

    value: object
    place: str
    source: str = ""
    error: type[ConfigError] = field(default=ConfigError)

    @property
    def is_null(self) -> bool:
        return self.value is None

    def fail(self, problem: str, cure: str) -> NoReturn:
        """Raise: the place with its value, what is wrong, what to do."""
        prefix = f"{self.source}: " if self.source else ""
        place = f"{self.place}=" if self.place else ""
        raise self.error(f"{prefix}{place}{_shown(self.value)} {problem}: {cure}")

    def child(self, name: str | int, value: object) -> "Node":
        """Return a value inside this one."""
        if isinstance(name, int):
            place = f"{self.place}[{name}]"
        else:
            place = f"{self.place}.{name}" if self.place else name
        return Node(value=value, place=place, source=self.source, error=self.error)

    def fields(
        self, required: Collection[str], optional: Collection[str] = ()
    ) -> dict[str, "Node"]:
        """Return all fields of an object; optional ones that are missing are null."""
        found = self.entries()
        known = (*required, *optional)
        for name, node in found.items():
            if name not in known:
                node.fail("is unknown", f"correct or drop it; {self._here} has {', '.join(known)}")
        for name in required:
            if name not in found:
                self.child(name, None).fail("is missing", "add it")
        return found | {name: self.child(name, None) for name in optional if name not in found}

    @property
    def _here(self) -> str:
        return self.place or "the file"

    def entries(self) -> dict[str, "Node"]:
        """Return the members of an object with free names."""
        if not isinstance(self.value, dict):
            self.fail("is no object", "write key-value pairs")
        for name in self.value:
            if not isinstance(name, str) or not name or not name.isprintable():
                self.child(_shown(name), self.value[name]).fail(
                    "has a key that is no text", "write a name"
                )
        return {name: self.child(name, value) for name, value in self.value.items()}

    def items(self) -> tuple["Node", ...]:
        """Return the members of a list."""
        if not isinstance(self.value, list | tuple):
            self.fail("is no list", "write one in brackets")
        return tuple(self.child(index, value) for index, value in enumerate(self.value))

    def integer(self, minimum: int, maximum: int = 10**15) -> int:
        """Return a whole number in a range."""
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            self.fail("is no integer", f"write a whole number from {minimum}")
        if not minimum <= self.value <= maximum:
            self.fail(f"is not in {_range(minimum, maximum)}", "correct it")
        return self.value

    def number(self, minimum: float = 0.0, maximum: float = _MOST) -> float:
        """Return a finite number in a range."""
        number = self._finite()
        if not minimum <= number <= maximum:
            self.fail(f"is not in {_range(minimum, maximum)}", "correct it")
        return float(number)

    def positive(self, maximum: float = _MOST) -> float:
        """Return a number above 0, and not so near to it that its inverse is useless."""
        number = self._finite()
        if number <= 0:
            self.fail("is not above 0", "write a positive number")
        if not _LEAST <= number <= maximum:
            self.fail(f"is not in {_range(_LEAST, maximum)}", "correct it")
        return float(number)

    def _finite(self) -> int | float:
        """The number as it is: an integer may be too large for a float."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            self.fail("is no number", "write one")
        if isinstance(self.value, float) and not math.isfinite(self.value):
            self.fail("is not finite", "write a finite number")
        return self.value

    def boolean(self) -> bool:
        """Return true or false, and take nothing else for them."""
        if not isinstance(self.value, bool):
            self.fail("is no boolean", "write true or false")
        return self.value

    def text(self, choices: Collection[str] = ()) -> str:
        """Return a text that can be printed, of a set of choices if there are any."""
        if not isinstance(self.value, str):
            self.fail("is no text", "write one in quotes")
        if not self.value.isprintable():
            self.fail("cannot be printed", "keep to letters, digits and signs")
        if choices and self.value not in choices:
            self.fail("is unknown", f"take {' or '.join(choices)}")
        return self.value


def _range(minimum: float, maximum: float) -> str:
    return f"{minimum:g}..{maximum:g}"


def _shown(value: object) -> str:
    """A value on one line, and not all of a long one."""
    if isinstance(value, int) and abs(value) > 10**_SHOWN:
        return "a huge number"
    if isinstance(value, dict | list | tuple):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = "null" if value is None else ascii(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
