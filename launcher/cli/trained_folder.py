"""The folder of a training run, where another mode is asked for: the run's record stays as it is."""

import pathlib
from collections.abc import Sequence

from launcher.cli.compose import Point
from launcher.cli.run_folder import CONFIG_FILE, override, run_dir_override
from launcher.errors import ConfigError
from launcher.regular_file import read_regular

EVALUATION = "evaluation"
METRICS_FILE = "metrics.jsonl"  # as `records/sinks.py` names it, which would bring JAX here
_LARGEST_BYTES = 2**20


def beside_training(point: Point, arguments: Sequence[str]) -> list[str] | None:
    """The arguments with which an evaluation reads the run's checkpoints, and writes beside its record.

    None where the command line stands as it is.

    Raises:
        ConfigError: for a mode that would write a plan or a cluster there.
    """
    run_dir, config = point.run_dir, point.config
    if config.mode in ("train", "submit") or not _has_trained(run_dir):
        return None
    if config.mode != "eval":
        raise ConfigError(
            f"hydra.run.dir={run_dir} has the record of a training run, which mode={config.mode} would write "
            f"over: leave hydra.run.dir out, or give another folder"
        )
    elsewhere = config.checkpoint.dir is not None or config.model.weights is not None
    finds_its_own = config.resume == "auto" and not elsewhere
    replaced = ("hydra.run.dir=", *(("resume=",) if finds_its_own else ()))
    kept = [text for text in arguments if not text.startswith(replaced)]
    weights = [override("resume", str(run_dir.absolute()))] if finds_its_own else []
    return [*kept, run_dir_override(run_dir / EVALUATION), *weights]


def _has_trained(run_dir: pathlib.Path) -> bool:
    if not (run_dir / METRICS_FILE).is_file():
        return False
    try:
        config = read_regular(run_dir / CONFIG_FILE, _LARGEST_BYTES)
    except OSError:
        return False
    return config is not None and b"mode: train" in config.splitlines()
