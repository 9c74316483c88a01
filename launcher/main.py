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

from launcher import data, models
from launcher.autopar.budget import check_tokens
from launcher.autopar.cluster import cluster_at_hand, cluster_from_config
from launcher.autopar.hosts import AnyCluster
from launcher.autopar.make_plan import Planned, adopt_plan, find_plan
from launcher.autopar.plan import Plan
from launcher.autopar.plan_file import read_plan
from launcher.autopar.planned_model import as_planned, describe_model
from launcher.autopar.predict import model_flops_per_step
from launcher.autopar.space import PlanOptions
from launcher.autopar.stage_hosts import peak_flops_per_s
from launcher.config import Config
from launcher.data.dataset import Dataset
from launcher.errors import TrainingError
from launcher.models.model import Model
from launcher.models.optimizer import Optimizer, build_optimizer
from launcher.runtime import devices, evaluation_run, memory_audit, plan_audit, train_loop
from launcher.runtime.compilation_cache import use_cache
from launcher.runtime.compile_all import Compilation
from launcher.runtime.evaluation_run import Evaluation
from launcher.runtime.executor import Executor
from launcher.runtime.initial import initial_values
from launcher.runtime.local_executor import LocalExecutor
from launcher.runtime.memory_error import memory_error
from launcher.runtime.metrics import Meter
from launcher.runtime.plan_report import PlanReporter
from launcher.runtime.profile import run_profile
from launcher.runtime.progress import phase, progress_sink
from launcher.runtime.run_end import RunEnd
from launcher.runtime.sampling import Sampler, SampleSettings, make_sampler
from launcher.runtime.sinks import JsonlSink, Sink, SummarySink, check_metrics
from launcher.runtime.wandb_sink import WandbRun, WandbSink
from launcher.runtime.watched_executor import Watch, WatchedExecutor
from launcher.runtime.weights import WeightsFile, open_weights

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
    given: Plan | None  # the plan of parallel.path
    options: PlanOptions
    dataset: Dataset | None  # from here on: of a run that computes; a plan alone needs none
    weights: WeightsFile | None
    sampler: Sampler | None


def run(config: Config, run_dir: Path) -> int:
    """Run what the config says, write into `run_dir`, and return the exit status."""
    use_cache(config.runtime.compilation_cache)
    if config.mode == "profile":
        with phase(Console(), "measuring") as progress:
            written = run_profile(find_cluster(config), config.profile, run_dir, progress)
        log.info("%s", written)
        return 0
    setup = make_setup(config, run_dir, Console())
    cluster, model, optimizer = setup.cluster, setup.model, setup.optimizer
    reporter = make_reporter(setup)
    other = reporter.price_other()  # before the search: what is wrong with its file is said at once
    planned = make_plan(setup)
    reporter.report(planned, other)
    if config.plan.audit:
        audit_plan(config, planned, model, cluster, optimizer, setup.console)
    if config.mode == "plan":
        reporter.write_summary(planned)
        return 0
    grid = devices.acquire(cluster, emulated=emulates(config))
    if config.mode == "eval":
        evaluate(setup, planned, grid)
    else:
        train(setup, planned, grid)
    return 0


def make_setup(config: Config, run_dir: Path, console: Console) -> Setup:
    """Build everything but the plan; what the user got wrong about it is found here."""
    cluster = find_cluster(config)
    from_file = config.parallel.name == "from_file"
    given = read_plan(Path(config.parallel.path)) if from_file else None
    model = build_model(config, cluster, given)
    check_tokens(config.train.tokens, model)
    optimizer = build_optimizer(config.optimizer, config.train.steps, model.dtype)
    computes = config.mode != "plan"
    if computes:
        check_metrics(run_dir)
    path = config.model.weights
    dataset = data.build(config.data, model, config.seed) if computes else None
    return Setup(
        config=config,
        run_dir=run_dir,
        console=console,
        cluster=cluster,
        model=model,
        optimizer=optimizer,
        given=given,
        options=plan_options(config, given, model, optimizer),
        dataset=dataset,
        weights=open_weights(Path(path), model) if computes and path else None,
        sampler=find_sampler(config, cluster, model, dataset) if computes else None,
    )


def train(setup: Setup, planned: Planned, grid: np.ndarray) -> None:
    """Compile the plan, and train."""
    config, model, optimizer = setup.config, setup.model, setup.optimizer
    with phase(setup.console, "compiling") as progress:
        local = LocalExecutor(
            planned.realized, model, optimizer, grid, seed=config.seed, progress=progress,
            weights=setup.weights and setup.weights.values(model),
            evaluates=config.train.eval_batches > 0,
        )  # fmt: skip
    log.info("%s", local.compilation)
    meter = make_meter(planned, model, setup.cluster, emulated=emulates(config))
    log.info("training on %s", setup.dataset.name)
    with contextlib.closing(watched(local, setup, planned, meter)) as executor:
        train_loop.run(
            executor,
            setup.dataset,
            train_settings(config, planned),
            meter,
            make_sinks(setup, planned, meter, config.train.steps, local.compilation),
            learning_rate=optimizer.schedule,
            explain_memory=explain_memory(planned, grid),
            at_end=make_end(setup, planned, local.arrays),
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
    config, model, weights = setup.config, setup.model, setup.weights
    if weights is None:
        log.info(
            "model.weights is not given: these are the initial weights of seed=%d", config.seed
        )
    values = weights.values(model) if weights else initial_values(model, config.seed)
    with phase(setup.console, "compiling") as progress:
        evaluation = Evaluation(planned.realized, model, setup.optimizer, grid, values, progress)
    log.info("%s", evaluation.compilation)
    meter = make_meter(planned, model, setup.cluster, emulated=emulates(config))
    log.info("evaluating on %s", setup.dataset.name)
    step = weights.step if weights else 0
    evaluation_run.run(
        evaluation,
        setup.dataset,
        dataclasses.replace(train_settings(config, planned), steps=step, first_step=step),
        meter,
        make_sinks(setup, planned, meter, step, evaluation.compilation),
        explain_memory=explain_memory(planned, grid),
        at_end=make_end(setup, planned, evaluation.arrays),
    )


def train_settings(config: Config, planned: Planned) -> train_loop.TrainSettings:
    """How long to train, and when to evaluate."""
    watched_steps = {*config.train.trace_steps, *config.train.profile_steps}
    return train_loop.TrainSettings(
        steps=config.train.steps,
        global_batch=planned.plan.global_batch,
        eval_every=config.train.eval_every,
        eval_batches=config.train.eval_batches,
        # What is written after a watched step holds up the next one.
        untypical_steps=frozenset(step + late for step in watched_steps for late in (0, 1)),
    )


def find_sampler(
    config: Config, cluster: AnyCluster, model: Model, dataset: Dataset
) -> Sampler | None:
    """What writes a text at the end, if one is asked for."""
    if not config.train.sample_tokens:
        return None
    settings = SampleSettings(
        num_tokens=config.train.sample_tokens,
        prompt=config.train.sample_prompt,
        temperature=config.train.sample_temperature,
        top_k=config.train.sample_top_k,
        seed=config.seed,
    )
    is_real = cluster.has_accelerators and not emulates(config)
    first_bytes = cluster.kinds[0].device.memory_bytes if is_real else None
    return make_sampler(settings, model, dataset, first_bytes)


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


def find_cluster(config: Config) -> AnyCluster:
    """The cluster of the config; `local` is whatever this machine has."""
    cluster = cluster_from_config(config.cluster)
    audits = config.plan.audit and config.mode == "plan"
    is_local = cluster.name == "local"
    if emulates(config) or audits or not (is_local or cluster.has_accelerators):
        devices.emulate(cluster.num_devices)
    elif is_local:
        found = devices.discover(cluster.num_devices)
        if found.count:
            cluster = cluster_at_hand(found.kind, found.count, found.memory_bytes)
    log.info("cluster: %s", cluster.describe())
    return cluster


def emulates(config: Config) -> bool:
    """Whether CPU devices stand for the cluster's."""
    return config.runtime.name == "emulate"


def build_model(config: Config, cluster: AnyCluster, given: Plan | None) -> Model:
    """The model; what is left open is as in the given plan, or decided by the cluster."""
    emulated = emulates(config) or not cluster.has_accelerators
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "fp32" if emulated else cluster.default_dtype
    if dtype == "fp64":
        jax.config.update("jax_enable_x64", True)
    resolved = models.resolve(
        as_planned(config.model, given),
        memory_bytes=cluster.memory_bytes,
        has_accelerator=cluster.has_accelerators,
        dtype=dtype,
        without_cudnn=cluster.without_cudnn,
        prefer_plain=emulated and given is None,
    )
    model = models.build(resolved)
    log.info("model: %s", describe_model(model))
    return model


def make_plan(setup: Setup) -> Planned:
    """Search for a plan, or take the one of a file."""
    with phase(setup.console, "planning") as progress:
        if setup.given is not None:
            return adopt_plan(setup.given, setup.model, setup.cluster, setup.options)
        return find_plan(setup.model, setup.cluster, setup.options, progress)


def plan_options(
    config: Config, given: Plan | None, model: Model, optimizer: Optimizer
) -> PlanOptions:
    """What the config asks of the planner."""
    parallel = config.parallel
    count = parallel.num_microbatches
    default_batch = given.global_batch if given else model.default_global_batch
    return PlanOptions(
        mode=parallel.name,
        global_batch=config.train.global_batch or default_batch,
        num_microbatches=None if count == "auto" else int(count),
        dp=parallel.dp,
        tp=parallel.tp,
        pp=parallel.pp,
        ep=parallel.ep,
        zero=parallel.zero,
        recompute=parallel.recompute,
        schedule=parallel.schedule,
        virtual_stages=parallel.virtual_stages,
        optimizer=optimizer.transform,
    )


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
    stand_in = emulates(config) or config.mode == "plan"
    grid = devices.acquire(cluster, emulated=stand_in)
    with phase(console, "auditing") as progress:
        audits = plan_audit.audit_plan(planned.realized, model, optimizer, grid, progress)
        memory = memory_audit.audit_memory(planned.realized, model, optimizer, grid, progress)
    log.info("%s", plan_audit.report(audits))
    log.info("%s", memory_audit.report(memory))


def make_meter(planned: Planned, model: Model, cluster: AnyCluster, *, emulated: bool) -> Meter:
    """How step times become throughput and MFU; emulated devices have no peak."""
    plan = planned.plan
    traced = planned.realized.planner.model.traced
    return Meter(
        model_flops_per_step=model_flops_per_step(traced, plan.num_microbatches),
        num_devices=plan.num_devices,
        peak_flops_per_s=None if emulated else peak_flops_per_s(plan, cluster, model.dtype),
        global_batch=plan.global_batch,
        units_per_sample=model.units_per_sample,
        sample_unit=model.sample_unit,
        predicted_step_s=plan.predicted.step_s,
        predicted_peak_bytes_per_stage=tuple(plan.predicted.peak_bytes_per_device),
        incomparable=_incomparable(cluster, emulated=emulated),
    )


def _incomparable(cluster: AnyCluster, *, emulated: bool) -> str | None:
    """Why a step time measured here says nothing of the predicted one; None where it does."""
    if emulated and cluster.has_accelerators:
        return f"CPU devices stand for {' and '.join(k.device.kind for k in cluster.kinds)}"
    return f"the figures of cluster={cluster.name} are nominal" if cluster.nominal else None


def make_sinks(
    setup: Setup, planned: Planned, meter: Meter, steps: int, compiled: Compilation
) -> list[Sink]:
    """Where the numbers go: files, the terminal, and W&B, which comes last since it may be slow."""
    config, run_dir = setup.config, setup.run_dir
    metrics = make_reporter(setup).metrics(planned, compiled)
    sinks: list[Sink] = [
        JsonlSink(run_dir),
        SummarySink(run_dir, metrics),
        progress_sink(setup.console, meter, steps, run_dir),
    ]
    if config.logger.name == "wandb":
        settings = WandbRun(
            run_dir=run_dir,
            config=dataclasses.asdict(config),
            plan=metrics,
            project=config.logger.project or "launcher",
            entity=config.logger.entity,
            group=config.logger.group,
            tags=tuple(config.logger.tags),
        )
        sinks.append(WandbSink(settings))
    return sinks
