"""Weights & Biases: rows, configuration, and a summary of measured beside predicted numbers.

Logging must never cost a training run: whatever W&B does (is not installed, refuses, has no
network, breaks half-way), it ends in one warning, and from then on this sink does nothing. A run is
online where W&B is logged in and offline elsewhere; `WANDB_MODE` has the last word. The files are
in `<run dir>/wandb`. This is the only module that imports wandb, and it does so when a sink is
made.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.runtime.records.metrics import PlanMetrics, Row, TrainSummary
from launcher.runtime.records.sinks import Sink
from launcher.runtime.records.wandb_login import is_logged_in

log = logging.getLogger(__name__)

INIT_TIMEOUT_S = 30
# Uploading what is left must not hold a reservation; `wandb sync` can do it later.
FINISH_TIMEOUT_S = 120
FALLS_BACK = "logging offline instead (`wandb sync` uploads it later)"
# Beside the files that W&B makes itself: which run a resumed one goes on with.
ID_NAME = "wandb/run-id.txt"
TRAINS_ON = "training goes on, and metrics.jsonl has every row (logger=jsonl turns W&B off)"


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbRun:
    """What a W&B run is told when it starts."""

    run_dir: Path
    # The composed configuration, as plain containers.
    config: Mapping[str, object]
    plan: PlanMetrics
    project: str
    entity: str | None
    group: str | None
    tags: tuple[str, ...]
    # Go on with the W&B run that this folder had before, if it had one.
    resumes: bool = False


class WandbSink(Sink):
    """Sends rows and the summary to one W&B run, until W&B fails."""

    __slots__ = ("_run",)

    def __init__(self, settings: WandbRun) -> None:
        self._run = None
        for mode in _modes(os.environ):
            try:
                self._run = _start(settings, mode)
                return
            except ImportError as error:
                _warn("be imported", error, TRAINS_ON)
                return
            except Exception as error:
                _warn("start", error, FALLS_BACK if mode == "online" else TRAINS_ON)

    def write(self, row: Row) -> None:
        """Log a row, leaving out what is unknown; its step is one of its numbers."""
        if self._run is None:
            return
        known = {name: value for name, value in row.items() if value is not None}
        try:
            self._run.log(known)
        except Exception as error:
            self._give_up("log", error)

    def finish(self, summary: TrainSummary) -> None:
        """Write the measured numbers beside the predicted ones, and close the run."""
        if self._run is None:
            return
        try:
            self._run.summary.update(summary.as_row())
            self._run.finish(exit_code=1 if summary.status == "failed" else 0)
        except Exception as error:
            self._give_up("finish", error)

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        _warn(what, error, TRAINS_ON)


def _start(settings: WandbRun, mode: str | None):
    """W&B's run, which has begun; None where W&B is off."""
    import wandb

    earlier = _earlier_id(settings) if settings.resumes else None
    run = wandb.init(
        mode=mode,
        dir=str(settings.run_dir),
        config=dict(settings.config),
        project=settings.project,
        entity=settings.entity,
        group=settings.group,
        tags=list(settings.tags),
        **({} if earlier is None else {"id": earlier, "resume": "allow"}),
        # W&B's own capture of the console would fight with the progress bar.
        settings={
            "console": "off",
            "silent": True,
            "init_timeout": INIT_TIMEOUT_S,
            "finish_timeout": FINISH_TIMEOUT_S,
        },
    )
    if run.disabled:  # by WANDB_MODE or W&B's own settings: it takes everything and keeps nothing
        log.info("W&B is off (WANDB_MODE=disabled, or `wandb disabled`)")
        return None
    # W&B's own steps never go back: it would drop the rows of a run that does (`Sink.rewind`).
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    run.summary.update(settings.plan.as_row())
    _note_id(settings, run.id)
    if run.offline:
        log.info("W&B logs offline (`wandb login` for online runs, `wandb sync` for this one)")
    else:
        log.info("W&B run: %s", run.url)
    return run


def _earlier_id(settings: WandbRun) -> str | None:
    try:
        return (settings.run_dir / ID_NAME).read_text().strip() or None
    except OSError:
        return None


def _note_id(settings: WandbRun, run_id: str) -> None:
    path = settings.run_dir / ID_NAME
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{run_id}\n")
    except OSError as error:
        log.warning(
            "cannot note the W&B run in %s (%s): a resumed run will be a new one", path, error
        )


def _modes(environment: Mapping[str, str]) -> tuple[str | None, ...]:
    """Give the modes to try, in order; None leaves the choice to W&B's own settings.

    A login does not make a network, and the machines of a cluster often have none.
    """
    if environment.get("WANDB_MODE"):
        return (None,)
    return ("online", "offline") if is_logged_in(environment) else ("offline",)


def _warn(what: str, error: Exception, consequence: str) -> None:
    # W&B's messages run over many lines; the first says what happened.
    reason = next(iter(str(error).splitlines()), "")
    log.warning("W&B could not %s (%s: %s): %s", what, type(error).__name__, reason, consequence)
