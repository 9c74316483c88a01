"""Python and the packages, against what the launcher's own metadata asks for.

Nothing is imported: a package that breaks when it is imported is found where it is used.
"""

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata

from launcher.doctor.findings import Finding, failed, ok, warning
from launcher.doctor.versions import Requirement, fits, parse_requirement, release
from launcher.doctor.wording import counted

PACKAGE = "jax-launcher"
_PLUGIN_PARTS = ("-plugin", "-pjrt")
_OUTSIDE = "the launcher was never tried with it, and may break in ways that no message explains"
_INSTALL = f'pip install --upgrade "{PACKAGE}", in an environment of its own'


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """What is installed, by name, and what each of some packages asks for."""

    python: str
    python_bounds: str | None  # None: the launcher itself is not installed
    versions: Mapping[str, str]
    requirements: tuple[Requirement, ...]
    jax_requirements: tuple[Requirement, ...]


def look() -> Installed:
    """Read the metadata of this interpreter's packages."""
    requirements = _requirements(PACKAGE)
    jax_requirements = _requirements("jax")
    wanted = {requirement.name for requirement in (*requirements, *jax_requirements)}
    plugins = {f"jax-cuda{major}{part}" for major in (12, 13) for part in _PLUGIN_PARTS}
    found = {name: version_of(name) for name in {*wanted, *plugins}}
    return Installed(
        python=platform.python_version(),
        python_bounds=_python_bounds(),
        versions={name: version for name, version in found.items() if version is not None},
        requirements=requirements,
        jax_requirements=jax_requirements,
    )


def check_python(installed: Installed) -> Iterator[Finding]:
    """Compare Python's version with the bounds of the launcher's metadata."""
    bounds = installed.python_bounds
    if bounds is None:
        yield warning(
            f"Python {installed.python}; {PACKAGE} itself is not installed here",
            "it runs from a folder of sources, and there are no bounds to compare versions with",
            "pip install -e . in that folder",
        )
    elif fits(installed.python, bounds):
        yield ok(f"Python {installed.python} ({bounds})")
    else:
        yield failed(
            f"Python {installed.python}, and {bounds} is asked for",
            "packages of the versions that the launcher needs do not exist for this Python",
            f"make a virtual environment with a Python {bounds} and install {PACKAGE} there",
        )


def check_packages(installed: Installed) -> Iterator[Finding]:
    """Compare every package that the launcher needs; those that fit share one line."""
    needed = [requirement for requirement in installed.requirements if not requirement.extra]
    found = [compare(need, installed.versions.get(need.name)) for need in needed]
    wrong = [finding for finding in found if finding is not None]
    yield from wrong
    if needed and not wrong:
        versions = ", ".join(f"{need.name} {installed.versions[need.name]}" for need in needed)
        yield ok(f"{counted(len(needed), 'package')} as asked for: {versions}")


def compare(need: Requirement, version: str | None) -> Finding | None:
    """Say what is wrong with one package's version (None: it is not installed), if anything is."""
    wanted = f"{need.name}{need.bounds}"
    if version is None:
        return failed(
            f"{need.name} is not installed, and {wanted} is asked for",
            "runs that use it end with an ImportError",
            f'pip install "{wanted}"',
        )
    if not fits(version, need.bounds):
        return failed(
            f"{need.name} {version}, and {need.bounds} is asked for",
            _OUTSIDE,
            f'pip install "{wanted}", or {_INSTALL}',
        )
    return None


def check_jax_parts(installed: Installed) -> Iterator[Finding]:
    """See that jax, jaxlib and the plugins for GPUs are of versions that go together."""
    versions = installed.versions
    jax, jaxlib = versions.get("jax"), versions.get("jaxlib")
    if jax is None or jaxlib is None:
        return  # jax is among the packages; pip brings jaxlib with it
    bounds = ",".join(
        need.bounds
        for need in installed.jax_requirements
        if (need.name, need.extra) == ("jaxlib", "")
    )
    if fits(jaxlib, bounds):
        yield ok(f"jax {jax} and jaxlib {jaxlib} go together")
    else:
        yield failed(
            f"jax {jax} and jaxlib {jaxlib}, and this jax asks for jaxlib{bounds}",
            "importing jax ends with an error about its jaxlib",
            f'pip install --upgrade "jax=={jax}"',
        )
    for name, version in sorted(versions.items()):
        if name.startswith("jax-cuda") and name.endswith(_PLUGIN_PARTS):
            yield _plugin(name, version, jaxlib)


def _plugin(name: str, version: str, jaxlib: str) -> Finding:
    if release(version) == release(jaxlib):
        return ok(f"{name} {version} is of jaxlib's version")
    return failed(
        f"{name} {version} beside jaxlib {jaxlib}",
        "JAX leaves a plugin of another version out, and computes on the CPU",
        f'pip install "{name}=={jaxlib}", or pip install --upgrade "{PACKAGE}[cuda]"',
    )


def version_of(name: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements(name: str) -> tuple[Requirement, ...]:
    try:
        return tuple(map(parse_requirement, metadata.requires(name) or ()))
    except metadata.PackageNotFoundError:
        return ()


def _python_bounds() -> str | None:
    try:
        return metadata.metadata(PACKAGE)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return None
