"""Whether a folder that has a run already is the folder of this run."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from launcher.errors import ConfigError
from launcher.regular_file import read_regular

_LARGEST_BYTES = 2**22
STEPS = "train.steps"
# What may change between two submissions of one run.
_FREE = (
    STEPS,
    "train.eval",
    "checkpoint.",
    "logger.",
    "runtime.",
    "cluster.slurm.",
    "debug",
    "dry_run",
)


def check_same_run(path: Path, config_text: str) -> None:
    """Raise ConfigError if a folder's config is of another run than this one."""
    before, now = _read(path), _flat("", yaml.safe_load(config_text))
    if before is None:
        return
    for key in dict.fromkeys((*before, *now)):
        there, here = before.get(key), now.get(key)
        if there != here and not key.startswith(_FREE):
            raise ConfigError(
                f"{path.parent} has a run with {key}={there}, and this one has {key}={here}: take another "
                f"hydra.sweep.dir (of a single job: hydra.run.dir), or {key}={there}"
            )


def goes_further(path: Path, config_text: str) -> bool:
    """Whether this run has more steps than the one that is in the folder."""
    before, now = _read(path), _flat("", yaml.safe_load(config_text))
    return before is not None and now[STEPS] > before[STEPS]


def _read(path: Path) -> Mapping[str, object] | None:
    """The config of a folder, key by key; None if there is none."""
    try:
        data = read_regular(path, _LARGEST_BYTES)
    except FileNotFoundError:
        return None
    try:
        tree = yaml.safe_load(data or b"")
    except (yaml.YAMLError, UnicodeDecodeError):
        tree = None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} is there and no config of a run: remove it, or take another folder (hydra.sweep.dir)"
        )
    return _flat("", tree)


def _flat(prefix: str, tree: Mapping[str, object]) -> dict[str, object]:
    return dict(_leaves(prefix, tree))


def _leaves(prefix: str, tree: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value
