"""Where a run begins: fresh, at a checkpoint, or with the weights of one; and when it writes its own.

A run goes on from the newest intact checkpoint of its own folder, whatever else it is told, as long as it is
the same run. The checkpoint decides what a resumed run must share with it: the model, the seed and the batch,
so that the same samples come in the same order and the same numbers are drawn. The plan may be another one.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.plans.plan import Plan
from launcher.autopar.plans.plan_file import from_json, to_json
from launcher.config import Config
from launcher.errors import ConfigError
from launcher.models.model import Model
from launcher.models.optimizer import Optimizer
from launcher.runtime.checkpoints.checkpoint_manifest import ModelEntry, Progress, RunEntry
from launcher.runtime.checkpoints.checkpoint_store import (
    MANIFEST_NAME,
    Checkpoint,
    CheckpointStore,
    read_checkpoint,
)
from launcher.runtime.checkpoints.checkpointer import (
    Checkpointer,
    Checkpoints,
    NoCheckpoints,
    Onlooker,
    SaveSettings,
)
from launcher.runtime.checkpoints.shared_store import SharedStore, Writers
from launcher.runtime.records.summary_file import has_summary
from launcher.runtime.steps.training_state import check_arrays, values

log = logging.getLogger(__name__)

FOLDER_NAME = "checkpoints"
AUTO, NONE = "auto", "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: None: with fresh weights, or those of `model.weights`.
        weights_only: of the checkpoint only parameters and state are taken, and the first step is 0.
        origin: the checkpoint that the run was first told to begin from, if one was named.
        is_own: it is the newest of the run's own that is whole.
    """

    store: CheckpointStore
    checkpoint: Checkpoint | None = None
    weights_only: bool = False
    origin: str | None = None
    is_own: bool = False

    @property
    def resumes(self) -> bool:
        """Whether a run is gone on with."""
        return self.checkpoint is not None and not self.weights_only

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self.checkpoint.manifest.step if self.resumes else 0

    @property
    def progress(self) -> Progress | None:
        """What the record of the run so far has gathered."""
        return self.checkpoint.manifest.progress if self.resumes else None

    @property
    def plan(self) -> Plan | None:
        """The plan that the checkpoint was written under."""
        if self.checkpoint is None:
            return None
        return from_json(self.checkpoint.manifest.run.plan, source=str(self.checkpoint.path))

    def lacks_end(self, run_dir: Path, steps: int) -> bool:
        """Whether a run did its last step and was ended before it had written what it leaves behind."""
        return self.is_own and self.step == steps and not has_summary(run_dir, steps)

    def weights(self, model: Model):
        """Parameters and state of the checkpoint; None without one."""
        return values(self.checkpoint.arrays, model) if self.checkpoint else None


def own_store(config: Config, run_dir: Path) -> CheckpointStore:
    """Where a run's own checkpoints are."""
    return CheckpointStore(Path(config.checkpoint.dir or run_dir / FOLDER_NAME))


def find_start(config: Config, run_dir: Path) -> Start:
    """Look for the checkpoint that the config asks for, and read it."""
    own = own_store(config, run_dir)
    if config.mode not in ("train", "eval"):
        return Start(store=own)
    if config.mode == "train":
        own.remove_leftovers()
    start = _named(config, own) if config.resume not in (AUTO, NONE) else _own(config, own)
    if config.resume_weights_only and start.checkpoint is None:
        raise ConfigError(
            f"resume_weights_only=true finds no checkpoint in {own.folder} (resume={config.resume}): "
            f"give resume=PATH, of a checkpoint or of a run's folder"
        )
    if config.mode == "train":
        _check_newer(start)
    if start.checkpoint is not None:
        done = start.checkpoint.manifest.step
        what = "the weights" if start.weights_only else "going on"
        log.info("%s after step %d, from %s", what, done, start.checkpoint.path)
    return start


def _own(config: Config, own: CheckpointStore) -> Start:
    evaluates_others = config.mode == "eval" and config.model.weights is not None
    if config.resume == NONE or evaluates_others:
        return Start(store=own)
    found = own.newest_intact()
    return Start(
        store=own,
        checkpoint=found,
        weights_only=config.resume_weights_only,
        origin=found.manifest.run.origin if found else None,
        is_own=True,
    )


def _named(config: Config, own: CheckpointStore) -> Start:
    """Of `resume=PATH`; a run that began there before, and has its own by now, goes on with those."""
    path = Path(config.resume)
    origin = str(path.absolute())
    if config.mode == "train" and own.steps():
        newest = own.newest_intact()
        if newest.manifest.run.origin == origin:
            return Start(store=own, checkpoint=newest, origin=origin, is_own=True)
    is_one = (path / MANIFEST_NAME).exists()
    found = read_checkpoint(path) if is_one else _newest_in(path, config.resume)
    return Start(
        store=own,
        checkpoint=found,
        weights_only=config.resume_weights_only,
        origin=origin,
        is_own=not is_one and found.path.parent.absolute() == own.folder.absolute(),
    )


def _newest_in(path: Path, given: str) -> Checkpoint:
    """The newest of a run's folder, or of a folder of checkpoints."""
    for folder in (path / FOLDER_NAME, path):
        store = CheckpointStore(folder)
        if store.steps():
            return store.newest_intact()
    what = "has no checkpoint" if path.is_dir() else "is no folder"
    raise ConfigError(
        f"resume={given} {what}: give a checkpoint, such as RUN/{FOLDER_NAME}/step-00000050, or the "
        f"folder of a run that has one"
    )


def _check_newer(start: Start) -> None:
    """A run must not leave checkpoints beside its own that are of another past than it has."""
    newer = [step for step in start.store.steps() if step > start.step]
    # Those beyond its own newest one are damaged, and are written again.
    if not newer or (start.is_own and start.resumes):
        return
    raise ConfigError(
        f"{start.store.folder} has a checkpoint of step {newer[-1]}, and this run would begin at step "
        f"{start.step} (checkpoint.dir, resume, resume_weights_only): take another hydra.run.dir, or "
        f"remove the checkpoints that are not needed any more"
    )


def check_start(
    start: Start, config: Config, model: Model, optimizer: Optimizer, dataset_name: str
) -> None:
    """Raise ConfigError for a checkpoint that this run cannot go on from."""
    if start.checkpoint is None:
        return
    manifest, where = start.checkpoint.manifest, start.checkpoint.path
    takes_all = start.resumes and config.mode == "train"
    check_arrays(manifest, str(where), model, optimizer if takes_all else None)
    if not takes_all:
        return
    run, batch = manifest.run, config.train.global_batch
    for key, here, there in (
        ("seed", config.seed, run.seed),
        ("train.global_batch", batch if batch is not None else run.global_batch, run.global_batch),
    ):
        if here != there:
            raise ConfigError(
                f"{key}={here} is not the {there} of the checkpoint {where}, and the samples would come in "
                f"another order: take {key}={there}, or the weights alone with resume_weights_only=true"
            )
    _warn_of_schedule(run, config)
    if run.dataset != dataset_name:
        log.warning(
            "the checkpoint was trained on %s, and this run goes on with %s at sample %d",
            run.dataset, dataset_name, manifest.samples,
        )  # fmt: skip
    if run.model.fingerprint != model.fingerprint:
        log.warning(
            "the checkpoint is of a model with other settings, though its arrays have the same shapes "
            "(fingerprint %s, and here %s): heads, dropout or a model's arguments may differ",
            run.model.fingerprint, model.fingerprint,
        )  # fmt: skip


def _warn_of_schedule(run: RunEntry, config: Config) -> None:
    """Decay ends at the last step: with another number of steps it is another schedule."""
    before, decay = run.config.get("train", {}).get("steps"), config.optimizer.decay
    if decay != "constant" and before not in (None, config.train.steps):
        log.warning(
            "train.steps=%d, and the run so far was to have %d: optimizer.decay=%s ends at the last step, so "
            "the learning rate does not go on where it was", config.train.steps, before, decay,
        )  # fmt: skip


def plan_to_keep(start: Start, config: Config, cluster: AnyCluster) -> Plan | None:
    """The checkpoint's plan, if the run goes on with it; None: one is made, or given."""
    if not start.resumes or config.parallel.name == "from_file" or config.replan:
        return None
    there, here = start.plan.cluster, cluster.ref()
    is_same = dataclasses.replace(there, name=here.name) == here
    if not is_same and config.mode == "eval":
        return None
    if not is_same:
        raise ConfigError(
            f"the checkpoint's plan is for {there.hosts} x {there.devices_per_host} devices "
            f"(cluster={there.name}), and cluster={here.name} has {here.hosts} x {here.devices_per_host} "
            f"(replan=false): set replan=true to plan anew for these, or resume on as many as there were"
        )
    asked = dataclasses.asdict(config.parallel)
    before = start.checkpoint.manifest.run.config["parallel"]
    changed = [key for key in asked if asked[key] != before.get(key)]
    if changed:
        log.info("parallel.%s differs from the checkpoint's run: planning anew", changed[0])
        return None
    return start.plan


def make_checkpoints(
    start: Start, config: Config, model: Model, plan: Plan, dataset_name: str,
    arrays: Callable[[], Mapping[str, jax.Array]], *,
    writers: Writers | None = None, since: Callable[[], float] | None = None,
    onlooker: Onlooker | None = None,
) -> Checkpoints:  # fmt: skip
    """What writes the checkpoints of a run; `writers` and `since` are for hosts that do it together."""
    asked = config.checkpoint
    if not asked.writes:
        return NoCheckpoints()
    model_entry = ModelEntry(
        name=model.name,
        size=model.size,
        dtype=model.dtype,
        fingerprint=model.fingerprint,
        overrides=dict(model.overrides),
    )
    run = RunEntry(
        model=model_entry,
        seed=config.seed,
        dataset=dataset_name,
        global_batch=plan.global_batch,
        origin=start.origin,
        config=dataclasses.asdict(config),
        plan=to_json(plan),
    )
    settings = SaveSettings(
        every_steps=asked.every_steps or None,
        every_s=60 * asked.every_minutes if asked.every_minutes else None,
        keep=asked.keep,
        best=asked.best,
    )
    store = SharedStore(start.store, writers) if writers else start.store
    return Checkpointer(
        store, settings, run, arrays, first_step=start.step, since=since, onlooker=onlooker
    )
