"""The code that a job runs, as it was when the job was submitted.

A job may start days later, and again after every preemption. It runs a copy, not the commit: a copy needs
no repository on the nodes, works for an installed package too, and has what was not committed. The commit and
whether the tree was clean are noted beside it, to say what it is a copy of.

Copied are this package, with the files of clusters, and the top package of `model.target`. Left out: other
packages, whose versions are noted, and data.
"""

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from launcher.config import conf_dir
from launcher.errors import ConfigError

VERSIONS_NAME = "versions.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ray")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".git")
_GIT_LIMIT_S = 10.0
_LARGEST_BYTES = 200 * 2**20  # of the user's code: more is data that lies beside it


def copy_code(folder: Path, targets: Iterable[str]) -> None:
    """Copy the code into a folder, which then goes before all else on the path of imports.

    Args:
        targets: the `model.target` of runs that have one.
    """
    own = Path(__file__).resolve().parents[1]
    tops = {"launcher": own} | dict(filter(None, map(_top, targets)))
    folder.mkdir(parents=True, exist_ok=True)
    if not conf_dir().is_relative_to(own):  # of a checkout, where it lies beside the package
        shutil.copytree(conf_dir(), folder / "conf")
    for name, source in tops.items():
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=_LEFT_OUT, dirs_exist_ok=True)
        else:
            shutil.copy2(source, folder / source.name)
    versions = {name: _origin(source) for name, source in tops.items()}
    versions["packages"] = {name: _version(name) for name in _PACKAGES}
    (folder / VERSIONS_NAME).write_text(json.dumps(versions, indent=2) + "\n")


def _top(target: str) -> tuple[str, Path] | None:
    """The top package, or module, of package.module:function; None for one that is installed."""
    name = target.partition(":")[0].partition(".")[0]
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise ConfigError(
            f"model.target={target}: there is no module {name} to copy for the job: correct the name, or "
            f"put its folder on PYTHONPATH"
        )
    places = list(found.submodule_search_locations or ()) or [found.origin]
    source = Path(places[0])
    if "site-packages" in source.parts or not source.exists():
        return None
    if source.is_dir():
        _check_size(target, source)
    return name, source


def _check_size(target: str, source: Path) -> None:
    total = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    if total > _LARGEST_BYTES:
        raise ConfigError(
            f"model.target={target}: its package {source} has {total / 2**20:.0f} MiB, and a job copies at "
            f"most {_LARGEST_BYTES / 2**20:.0f} MiB of code: keep data outside the package"
        )


def _origin(source: Path) -> dict[str, object]:
    """Where a copy is from."""
    around = source if source.is_dir() else source.parent
    commit = _git(around, "rev-parse", "HEAD")
    changes = _git(around, "status", "--porcelain", "--", ".") if commit else None
    return {"from": str(source), "commit": commit, "is_clean": changes == "" if commit else None}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True, text=True, timeout=_GIT_LIMIT_S, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
