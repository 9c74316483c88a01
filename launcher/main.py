"""The only place that wires. Read top to bottom, it is the program:

config -> cluster -> model -> plan -> devices -> executor -> training loop -> weights
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from launcher import data
from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import Planned, adopt_plan, find_plan, no_garbage_collection
from launcher.autopar.plans.budget import check_tokens
from launcher.autopar.plans.plan import Plan
from launcher.autopar.plans.plan_file import errors_of, read_plan
from launcher.config import Config
from launcher.data.dataset import Dataset
from launcher.errors import ConfigError, InfeasiblePlanError, TrainingError
from launcher.inputs import (
    build_model,
    emulates,
    find_cluster,
    plan_options,
    runs_on_hosts,
    train_settings,
)
from launcher.machine_limits import free_memory_bytes
from launcher.models.model import Model
from launcher.models.optimizer import Optimizer, build_optimizer
from launcher.on_hosts import HostsJob, train_on_hosts
from launcher.outputs import find_sampler, make_meter, make_sinks
from launcher.resume import Start, check_start, find_start, make_checkpoints, plan_to_keep
from launcher.run_state import note_phase
from launcher.runtime import devices, memory_audit, plan_audit
from launcher.runtime.checkpoints.weights import WeightsFile, open_weights
from launcher.runtime.compiled.compilation_cache import use_cache
from launcher.runtime.compiled.compile_all import Compilation
from launcher.runtime.profiling.profile import run_profile
from launcher.runtime.records.goodput import Goodput
from launcher.runtime.records.metrics import Meter
from launcher.runtime.records.plan_report import PlanReporter
from launcher.runtime.records.progress import phase
from launcher.runtime.records.sinks import Sink, check_metrics, drop_rows_after
from launcher.runtime.steps.executor import Executor
from launcher.runtime.steps.initial import Values, initial_values
from launcher.runtime.steps.local_executor import LocalExecutor
from launcher.runtime.steps.memory_error import memory_error
from launcher.runtime.steps.watched_executor import Watch, WatchedExecutor
from launcher.runtime.training import evaluation_run, train_loop
from launcher.runtime.training.evaluation_run import Evaluation
from launcher.runtime.training.interrupt import stop_at_once
from launcher.runtime.training.run_end import RunEnd
from launcher.runtime.training.sampling import Sampler

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a run is made of, before there is a plan."""

    config: Config
    run_dir: Path
    console: Console
    cluster: AnyCluster
    model: Model
    optimizer: Optimizer
    given: Plan | None  # the plan of parallel.path, or of the checkpoint
    options: PlanOptions
    start: Start
    goodput: Goodput
    dataset: Dataset | None  # from here on: of a run that computes; a plan alone needs none
    weights: WeightsFile | None
    sampler: Sampler | None


def run(config: Config, run_dir: Path) -> int:
    """Run what the config says, write into `run_dir`, and return the exit status."""
    with stop_at_once():
        return _run(config, run_dir)


def _run(config: Config, run_dir: Path) -> int:
    use_cache(config.runtime.compilation_cache)
    if config.mode == "profile":
        note_phase(run_dir, "measuring")
        with phase(Console(), "measuring") as progress:
            written = run_profile(find_cluster(config), config.profile, run_dir, progress)
        log.info("%s", written)
        return 0
    setup = make_setup(config, run_dir, Console())
    if config.mode == "train" and setup.start.step >= config.train.steps:
        if not setup.start.lacks_end(run_dir, config.train.steps):
            log.info(
                "all %d steps are done already (the checkpoint is of step %d): give more with train.steps",
                config.train.steps, setup.start.step,
            )  # fmt: skip
            return 0
        log.info(
            "all %d steps are done already, but the run was ended before it had written its summary: "
            "that is left to do", config.train.steps,
        )  # fmt: skip
    cluster, model, optimizer = setup.cluster, setup.model, setup.optimizer
    reporter = make_reporter(setup)
    other = reporter.price_other()  # before the search: what is wrong with its file is said at once
    with no_garbage_collection(is_last=config.mode == "plan" and not config.plan.audit):
        planned = make_plan(setup)
        reporter.report(planned, other)
    if config.plan.audit:
        audit_plan(config, planned, model, cluster, optimizer, setup.console)
    if config.mode == "plan":
        reporter.write_summary(planned)
        return 0
    if config.mode == "train" and config.checkpoint.writes:
        setup.start.store.check_writable()
    if runs_on_hosts(config, cluster):
        train_on_hosts(hosts_job(setup, planned), partial(plan_for_fewer, setup))
        return 0
    grid = devices.acquire(cluster, emulated=emulates(config))
    if emulates(config) or not cluster.has_accelerators:
        devices.warn_of_shared_memory(planned.plan, free_memory_bytes())
    if config.mode == "eval":
        evaluate(setup, planned, grid)
    else:
        train(setup, planned, grid)
    return 0


def make_setup(
    config: Config, run_dir: Path, console: Console, cluster: AnyCluster | None = None
) -> Setup:
    """Build everything but the plan; what the user got wrong about it is found here.

    `cluster` is that of the config, where it has been found already.
    """
    goodput = Goodput(run_dir if config.mode == "train" else None)
    cluster = cluster or find_cluster(config)
    start = find_start(config, run_dir)
    from_file = config.parallel.name == "from_file"
    given = read_plan(Path(config.parallel.path)) if from_file else None
    model = build_model(config, cluster, given or start.plan, emulated=emulates(config))
    check_tokens(config.train.tokens, model)
    optimizer = build_optimizer(config.optimizer, config.train.steps, model.dtype)
    computes = config.mode != "plan"
    if computes:
        check_metrics(run_dir)
    path = None if start.checkpoint else config.model.weights
    dataset = data.build(config.data, model, config.seed) if computes else None
    if dataset is not None:
        check_start(start, config, model, optimizer, dataset.name)
    given = given or plan_to_keep(start, config, cluster)
    begun_with = start.plan if start.resumes else None
    return Setup(
        config=config,
        run_dir=run_dir,
        console=console,
        cluster=cluster,
        model=model,
        optimizer=optimizer,
        given=given,
        options=plan_options(config, given or begun_with, model, optimizer),
        start=start,
        goodput=goodput,
        dataset=dataset,
        weights=open_weights(Path(path), model) if computes and path else None,
        sampler=find_sampler(config, cluster, model, dataset, emulated=emulates(config))
        if computes
        else None,
    )


def train(setup: Setup, planned: Planned, grid: np.ndarray) -> None:
    """Compile the plan, and train."""
    config, model, optimizer = setup.config, setup.model, setup.optimizer
    start, plan, name = setup.start, planned.plan, setup.dataset.name
    note_phase(setup.run_dir, "compiling")
    with phase(setup.console, "compiling") as progress:
        local = LocalExecutor(
            planned.realized, model, optimizer, grid, seed=config.seed, progress=progress,
            weights=first_weights(setup),
            restored=start.checkpoint.arrays if start.resumes else None,
            evaluates=config.train.eval_batches > 0,
        )  # fmt: skip
    if start.checkpoint is not None:
        start.checkpoint.release()
    if config.checkpoint.writes or start.resumes:
        drop_rows_after(setup.run_dir, start.step)
    log.info("%s", local.compilation)
    meter = make_meter(planned, model, setup.cluster, emulated=emulates(config))
    log.info("training on %s", name)
    note_phase(setup.run_dir, "training")
    setup.goodput.went_back(start.progress.step_s if start.resumes else 0.0)
    setup.goodput.ready(local.compilation.wall_s)
    with contextlib.closing(watched(local, setup, planned, meter)) as executor:
        train_loop.run(
            executor,
            setup.dataset,
            train_settings(config, planned.plan, start),
            meter,
            sinks_of(setup, planned, meter, config.train.steps, local.compilation),
            learning_rate=optimizer.schedule,
            explain_memory=explain_memory(planned, grid),
            checkpoints=make_checkpoints(start, config, model, plan, name, local.training_arrays),
            goodput=setup.goodput,
            at_end=make_end(setup, planned, local.arrays),
        )


def hosts_job(setup: Setup, planned: Planned) -> HostsJob:
    """What the processes of the hosts carry out, who read the checkpoint themselves."""
    if setup.start.checkpoint is not None:
        setup.start.checkpoint.release()
    return HostsJob(
        config=setup.config,
        run_dir=setup.run_dir,
        started_s=setup.goodput.started_s,
        console=setup.console,
        cluster=setup.cluster,
        model=setup.model,
        planned=planned,
        metrics=make_reporter(setup).metrics(planned),
        progress=setup.start.progress,
    )


def plan_for_fewer(setup: Setup, num_hosts: int) -> HostsJob:
    """The same run from its last checkpoint, on so many hosts."""
    asked = dataclasses.replace(setup.config.cluster, hosts=num_hosts)
    config = dataclasses.replace(setup.config, cluster=asked)
    cluster = setup.cluster.replace(hosts=num_hosts)
    setup = make_setup(config, setup.run_dir, setup.console, cluster)
    planned = make_plan(setup)
    make_reporter(setup).report(planned, None)
    return hosts_job(setup, planned)


def first_weights(setup: Setup) -> Values | None:
    """Those of a checkpoint or a file; None: those of the seed."""
    if setup.start.checkpoint is not None:
        return setup.start.weights(setup.model)
    return setup.weights and setup.weights.values(setup.model)


def sinks_of(
    setup: Setup, planned: Planned, meter: Meter, steps: int, compiled: Compilation
) -> list[Sink]:
    """Where the numbers of the run go."""
    metrics = make_reporter(setup).metrics(planned, compiled)
    return make_sinks(
        setup.config,
        setup.run_dir,
        setup.console,
        meter,
        steps,
        metrics,
        resumes=setup.start.resumes,
    )


def watched(local: LocalExecutor, setup: Setup, planned: Planned, meter: Meter) -> Executor:
    """The executor, or one that also looks into some of its steps, if that is asked for."""
    steps, plan = setup.config.train, planned.plan
    if not (steps.trace_steps or steps.profile_steps):
        return local
    watch = Watch(
        run_dir=setup.run_dir,
        trace_steps=frozenset(steps.trace_steps),
        profile_steps=frozenset(steps.profile_steps),
        planned=planned.outlook.timeline,
        title=f"A step of {plan.model.name} {plan.model.size} on {setup.cluster.name}",
        incomparable=meter.incomparable,
    )
    return WatchedExecutor(local, watch)


def evaluate(setup: Setup, planned: Planned, grid: np.ndarray) -> None:
    """Bring the weights where the plan wants them, and evaluate them."""
    config, model, start = setup.config, setup.model, setup.start
    values = first_weights(setup)
    if values is None:
        log.info(
            "model.weights is not given: these are the initial weights of seed=%d", config.seed
        )
        values = initial_values(model, config.seed)
    note_phase(setup.run_dir, "compiling")
    with phase(setup.console, "compiling") as progress:
        evaluation = Evaluation(planned.realized, model, setup.optimizer, grid, values, progress)
    log.info("%s", evaluation.compilation)
    meter = make_meter(planned, model, setup.cluster, emulated=emulates(config))
    log.info("evaluating on %s", setup.dataset.name)
    note_phase(setup.run_dir, "evaluating")
    if start.checkpoint is not None:
        step = start.checkpoint.manifest.step
    else:
        step = setup.weights.step if setup.weights else 0
    evaluation_run.run(
        evaluation,
        setup.dataset,
        dataclasses.replace(
            train_settings(config, planned.plan, start), steps=step, first_step=step
        ),
        meter,
        sinks_of(setup, planned, meter, step, evaluation.compilation),
        explain_memory=explain_memory(planned, grid),
        at_end=make_end(setup, planned, evaluation.arrays),
    )


def make_end(
    setup: Setup, planned: Planned, arrays: Callable[[], Mapping[str, jax.Array]]
) -> RunEnd:
    """What is written after the last step."""
    return RunEnd(
        run_dir=setup.run_dir,
        model=setup.model,
        plan=planned.plan,
        arrays=arrays,
        exports=setup.config.train.export_weights,
        sampler=setup.sampler,
    )


def explain_memory(planned: Planned, grid: np.ndarray) -> Callable[[BaseException], TrainingError]:
    """What to say when a device's memory is used up and nobody knows by which instruction."""
    return partial(memory_error, plan=planned.plan, doing=None, devices=[d for d in grid.flat if d])


def make_plan(setup: Setup) -> Planned:
    """Search for a plan, or take the one of a file."""
    with phase(setup.console, "planning") as progress:
        if setup.given is not None:
            path = setup.config.parallel.path
            if path is None:
                log.info("the plan is that of the checkpoint")
            with errors_of(path):
                return adopt_plan(setup.given, setup.model, setup.cluster, setup.options)
        note_phase(setup.run_dir, "planning")
        if setup.start.resumes and setup.options.num_microbatches is None:
            try:
                return find_plan(setup.model, setup.cluster, as_begun(setup), progress)
            except (InfeasiblePlanError, ConfigError) as error:
                log.warning(
                    "no plan has the microbatches of the checkpoint's, so what is drawn at random will "
                    "differ, as will BatchNorm and the experts' capacity (%s)", error,
                )  # fmt: skip
        return find_plan(setup.model, setup.cluster, setup.options, progress)


def as_begun(setup: Setup) -> PlanOptions:
    """The options with the checkpoint's number of microbatches, on which random draws depend."""
    count = setup.start.plan.num_microbatches
    return dataclasses.replace(setup.options, num_microbatches=count)


def make_reporter(setup: Setup) -> PlanReporter:
    """What is asked about the plan."""
    config = setup.config
    return PlanReporter(
        model=setup.model,
        cluster=setup.cluster,
        options=setup.options,
        run_dir=setup.run_dir,
        console=setup.console,
        tokens=config.train.tokens,
        compare=config.plan.compare,
        choices=config.plan.why_not,
    )


def audit_plan(
    config: Config,
    planned: Planned,
    model: Model,
    cluster: AnyCluster,
    optimizer: Optimizer,
    console: Console,
) -> None:
    """Compile the plan's stages, and print collectives and memory as priced, beside those compiled.

    With `mode=plan`, CPU devices stand for the cluster's.
    """
    stand_in = emulates(config) or config.mode == "plan" or runs_on_hosts(config, cluster)
    grid = devices.acquire(cluster, emulated=stand_in)
    with phase(console, "auditing") as progress:
        audits = plan_audit.audit_plan(planned.realized, model, optimizer, grid, progress)
        memory = memory_audit.audit_memory(planned.realized, model, optimizer, grid, progress)
    log.info("%s", plan_audit.report(audits))
    log.info("%s", memory_audit.report(memory))
