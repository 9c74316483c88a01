"""From search results to a `Plan`: the best candidate after simulation, with the others as runners-up."""

import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from launcher.autopar.clusters.hosts import AnyCluster, Cluster
from launcher.autopar.clusters.mesh import DATA
from launcher.autopar.graphs.optimizer_state import OptimizerFootprint
from launcher.autopar.inter_op.advice import memory_cures
from launcher.autopar.inter_op.candidate import Candidate, differing
from launcher.autopar.inter_op.neighbours import Neighbours
from launcher.autopar.inter_op.placement import Placement
from launcher.autopar.inter_op.search import Search, search
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.inter_op.stage_costs import LEAST_SAVING
from launcher.autopar.inter_op.stage_table import StageChoice
from launcher.autopar.intra_op.stage_layout import training_layout
from launcher.autopar.plans.plan import Plan, RunnerUp, SearchStats, Stage
from launcher.autopar.plans.plan_checks import check_without_model
from launcher.autopar.plans.planned_model import for_model, model_ref
from launcher.autopar.plans.stage_hosts import TightStage, tightest
from launcher.autopar.predictions.predict import Outlook, foresee
from launcher.autopar.realized.open_stages import fill_in
from launcher.autopar.realized.picks import specs_as_dims, strategies_of
from launcher.autopar.realized.realize import RealizedPlan, realize
from launcher.autopar.sharding.param_costs import optimizer_spec
from launcher.autopar.text.wording import count, ranges, seconds, size
from launcher.errors import InfeasiblePlanError, PlanError
from launcher.models.model import Model

log = logging.getLogger(__name__)

_JUDGED = 3  # candidates that the simulator judges in full, or more until one fits
PLAN_VERSION = 1
_MORE_SEARCHES = 2  # where no finished plan fits
_CLOSE = 1.03  # how much faster a plan may be, finished, than the search thinks, or slower


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """A plan, realized, with its prediction's timeline."""

    plan: Plan
    realized: RealizedPlan
    outlook: Outlook

    @property
    def tight(self) -> TightStage:
        """Return the stage that fills its devices most."""
        return _tightest(self.realized, self.outlook)


def make_plan(model: Model, cluster: AnyCluster, options: PlanOptions) -> Plan:
    """Plan how a model trains on a cluster."""
    return find_plan(model, cluster, options, lambda text: None).plan


def find_plan(
    model: Model, cluster: AnyCluster, options: PlanOptions, progress: Callable[[str], None]
) -> Planned:
    """Search, let the simulator judge the best candidates, and return the winner."""
    with no_garbage_collection():
        return _find_plan(model, cluster, options, progress)


@contextmanager
def no_garbage_collection(*, is_last: bool = False) -> Iterator[None]:
    """Planning makes millions of objects that stay: looking for garbage among them takes a fifth longer.

    The first look comes behind this, and takes seconds for a large plan.

    Args:
        is_last: nothing comes after it, as a rule: the look is left to a next plan in this process, as there
            is in a sweep.
    """
    if gc.get_freeze_count():
        gc.unfreeze()
        gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_last:
            gc.freeze()
        if was_enabled:
            gc.enable()


def _find_plan(
    model: Model, cluster: AnyCluster, options: PlanOptions, progress: Callable[[str], None]
) -> Planned:
    found = search(model, cluster, options, progress)
    judged = _judge(found, model, cluster, options, progress)
    counted = cluster
    for _ in range(_MORE_SEARCHES):
        tight = min((_tightest(r, o) for _, r, o in judged), key=lambda stage: stage.over_bytes)
        if tight.fits:
            break
        # The search counts less memory than a finished plan has need of: leave it so much less.
        progress(f"searching again with {size(tight.over_bytes)} less memory")
        of_kind = [kind.device == tight.device for kind in cluster.kinds]
        counted = _with_less_memory(counted, of_kind, tight.over_bytes)
        try:
            again = search(model, counted, options, progress)
        except InfeasiblePlanError:
            break
        found = replace(again, bound_s=min(found.bound_s, again.bound_s))
        judged = _judge(found, model, cluster, options, progress)
    behind = found.candidates[len(judged) :]
    judged.sort(key=lambda it: (not _tightest(*it[1:]).fits, it[2].prediction.step_s))
    best, realized, outlook = judged[0]
    _check_memory(_tightest(realized, outlook), model, cluster, options)
    best_s = outlook.prediction.step_s
    others = [
        _runner_up(
            other, best, its.prediction.step_s, its.prediction.bubble_fraction, best_s,
            _tightest(r, its).over_bytes,
        )
        for other, r, its in judged[1:]
        if other.decisions != best.decisions
    ]  # fmt: skip
    others += [
        _runner_up(o, best, o.step_s, _bubble(o, found, cluster), best_s)
        for o in behind
        if o.decisions != best.decisions
    ]
    plan = replace(
        realized.plan,
        predicted=outlook.prediction,
        search=SearchStats(
            wall_s=found.wall_s,
            ilp_solved=found.ilp_solved,
            candidates=found.priced,
            # Both by the search's own clock.
            optimality_gap=max(0.0, 1.0 - found.bound_s / best.step_s),
            space=found.describe_space(),
        ),
        runners_up=tuple(others[: _JUDGED - 1]),
    )
    return Planned(plan, replace(realized, plan=plan), outlook)


def _judge(
    found: Search, model: Model, cluster: AnyCluster, options: PlanOptions,
    progress: Callable[[str], None],
) -> list[tuple[Candidate, RealizedPlan, Outlook]]:  # fmt: skip
    """Simulate candidates in full: until one fits, and then those that might still be faster."""
    footprint = OptimizerFootprint(options.optimizer)
    judged: list[tuple[Candidate, RealizedPlan, Outlook]] = []
    for candidate in found.candidates:
        fitting_s = [o.prediction.step_s for _, r, o in judged if _tightest(r, o).fits]
        if fitting_s and (len(judged) >= _JUDGED or candidate.step_s > _CLOSE * min(fitting_s)):
            break
        progress(f"simulating {candidate.num_microbatches} microbatches, {candidate.schedule}")
        plan = _as_plan(candidate, model, cluster, options)
        realizing = partial(
            realize, model=model, cluster=cluster, planner=candidate.planner, optimizer=footprint
        )
        judged.append((candidate, *_foreseen(plan, cluster, realizing)))
    return judged


def _foreseen(
    plan: Plan, cluster: AnyCluster, realizing: Callable[[Plan], RealizedPlan]
) -> tuple[RealizedPlan, Outlook]:
    """Simulate a plan in full; without overlap, if that saves too little of the step, or takes memory
    that is not there."""
    realized = realizing(plan)
    outlook = foresee(realized, cluster)
    if not any(stage.overlap for stage in plan.stages):
        return realized, outlook
    stages = tuple(replace(stage, overlap=False) for stage in plan.stages)
    plain = realizing(replace(plan, stages=stages))
    without = foresee(plain, cluster)
    limit_s = (1.0 - LEAST_SAVING) * without.prediction.step_s
    is_worth_it = outlook.prediction.step_s <= limit_s
    fits = _tightest(realized, outlook).fits or not _tightest(plain, without).fits
    return (realized, outlook) if is_worth_it and fits else (plain, without)


def _with_less_memory(cluster: AnyCluster, which: Sequence[bool], over_bytes: float) -> AnyCluster:
    """Leave out so much of it on some kinds of hosts."""

    def reserving(kind: Cluster) -> Cluster:
        reserved_bytes = kind.device.reserved_bytes + math.ceil(over_bytes)
        return replace(kind, device=replace(kind.device, reserved_bytes=reserved_bytes))

    kinds = tuple(
        reserving(kind) if is_meant else kind
        for kind, is_meant in zip(cluster.kinds, which, strict=True)
    )
    return replace(cluster, kinds=kinds) if len(kinds) > 1 else kinds[0]


def adopt_plan(plan: Plan, model: Model, cluster: AnyCluster, options: PlanOptions) -> Planned:
    """Take a plan as it is, completing what it leaves out and pricing it anew."""
    check_plan(plan, model, cluster)
    if options.global_batch != plan.global_batch:
        raise PlanError(
            f"the plan is for a global batch of {plan.global_batch} samples "
            f"(train.global_batch={options.global_batch}): leave it out, or plan again"
        )
    plan = for_model(plan, model)
    footprint = OptimizerFootprint(options.optimizer)
    plan = fill_in(plan, model, cluster, footprint)
    _check_batch(plan)
    realized = realize(plan, model, cluster, optimizer=footprint)
    outlook = foresee(realized, cluster)
    completed = replace(_completed(realized, model, cluster), predicted=outlook.prediction)
    tight = _tightest(realized, outlook)
    plan = _without_other_figures(completed, plan, fits=tight.fits)
    if not tight.fits:
        layers = range(*plan.stages[tight.stage].layers)
        log.warning(
            "the plan does not fit: stage %s (layers %s) and what shares its devices need %s on a device "
            "that has %s to fill (cluster.device.memory_gib less reserved_gib); give the layers more or "
            "larger devices, or let it recompute (stages[%s].recompute)", tight.stage, ranges(layers),
            size(tight.needed_bytes), size(tight.device.usable_bytes), tight.stage,
        )  # fmt: skip
    return Planned(plan, replace(realized, plan=plan), outlook)


def check_plan(plan: Plan, model: Model, cluster: AnyCluster) -> None:
    """Raise `PlanError` for a plan of another model, or one that cannot be on this cluster."""
    if plan.model.name != model.name:
        raise PlanError(
            f"the plan is for model={plan.model.name}, and the model to train is model={model.name}: "
            f"take the plan's, or plan again"
        )
    # A fingerprint says more than the size, and a module of a user's own has no size.
    may_differ = plan.model.fingerprint != model.fingerprint and model.name != "custom"
    if may_differ and plan.model.size != model.size:
        raise PlanError(
            f"the plan is for model.size={plan.model.size}, and the model to train is "
            f"model.size={model.size}: take the plan's, or write that size into the plan"
        )
    check_without_model(plan, num_layers=None, cluster=cluster, fingerprint=model.fingerprint)


def _tightest(realized: RealizedPlan, outlook: Outlook) -> TightStage:
    devices = [stage.settings.compute.device for stage in realized.stages]
    return tightest(outlook.prediction, devices)


def _check_memory(
    tight: TightStage, model: Model, cluster: AnyCluster, options: PlanOptions
) -> None:
    if not tight.fits:
        device, cures = tight.device, memory_cures(options, cluster, model.num_parameters)
        raise InfeasiblePlanError(
            f"the best plan needs {size(tight.needed_bytes)} for stage {tight.stage} on a device that has "
            f"{size(device.usable_bytes)} to fill, {size(tight.over_bytes)} too many "
            f"(cluster.device.memory_gib={device.memory_bytes / 2**30:g} less "
            f"reserved_gib={device.reserved_bytes / 2**30:g}); "
            f"{cures(tight.needed_bytes / device.usable_bytes)}"
        )


def _as_plan(candidate: Candidate, model: Model, cluster: AnyCluster, options: PlanOptions) -> Plan:
    stages = tuple(
        _stage(candidate, choice, place)
        for choice, place in zip(
            candidate.arrangement.stages, candidate.arrangement.placement, strict=True
        )
    )
    return Plan(
        version=PLAN_VERSION,
        model=model_ref(model),
        cluster=cluster.ref(),
        global_batch=options.global_batch,
        num_microbatches=candidate.num_microbatches,
        schedule=candidate.schedule,
        virtual_stages=candidate.virtual_stages,
        num_layers=len(candidate.planner.model.layers),
        stages=stages,
    )


def _stage(candidate: Candidate, choice: StageChoice, place: Placement) -> Stage:
    pick = choice.option.tag
    hosts, devices = place
    stage = Stage(
        layers=(choice.first, choice.last),
        hosts=hosts,
        devices=devices,
        mesh=tuple(zip(pick.mesh.axis_names, pick.mesh.shape, strict=True)),
        recompute=pick.recompute,
        zero=pick.zero,
        scatter=pick.scatter,
        overlap=pick.overlap,
        params={},
        optimizer_state={},
        strategies={},
    )
    pins = {key: (choice,) for key, choice in pick.sharding.picks.items()}
    settings = replace(pick.sharding.settings, recompute=pick.recompute)
    sharding = candidate.planner.solve(*stage.layers, settings, pins=pins)
    return _with_shardings(stage, candidate.planner, sharding)


def _with_shardings(stage: Stage, planner, sharding) -> Stage:
    """Write down where a stage's tensors lie, and how its ops are computed."""
    described = training_layout(planner, sharding, *stage.layers, stage.recompute)
    traced, settings = planner.model.traced, sharding.settings
    shapes = {path: aval.shape for path, aval in traced.param_avals.items()}
    ranks = {path: len(shapes[path]) for path in described.params}
    states = {
        path: optimizer_spec(spec, shapes[path], settings.mesh, settings.zero)
        for path, spec in described.params.items()
    }
    names = settings.mesh.axis_names
    return replace(
        stage,
        params=specs_as_dims(described.params, ranks, names),
        optimizer_state=specs_as_dims(states, ranks, names),
        strategies=strategies_of(sharding),
    )


def _completed(realized: RealizedPlan, model: Model, cluster: AnyCluster) -> Plan:
    """A plan with everything written down that realizing it decided."""
    stages = tuple(
        _with_shardings(stage.stage, realized.planner, stage.sharding) for stage in realized.stages
    )
    return replace(
        realized.plan,
        model=model_ref(model),
        cluster=cluster.ref(),
        stages=stages,
        num_layers=len(realized.planner.model.layers),
    )


def _without_other_figures(plan: Plan, given: Plan, *, fits: bool) -> Plan:
    """Say what a plan promised elsewhere, and drop what it says of other plans there."""
    promised, predicted = given.predicted, plan.predicted
    as_promised = promised is not None and math.isclose(
        promised.step_s, predicted.step_s, rel_tol=1e-6
    )
    if promised is not None and not as_promised:
        log.info(
            "the plan file promises %s a step on %s, and here, on %s, it is %s",
            seconds(promised.step_s), given.cluster.name, plan.cluster.name,
            seconds(predicted.step_s),
        )  # fmt: skip
    if as_promised and fits and given.cluster == plan.cluster:
        return plan
    return replace(plan, search=None, runners_up=())


def _check_batch(plan: Plan) -> None:
    """Each stage's data axis takes an equal part of a microbatch."""
    for index, stage in enumerate(plan.stages):
        data = dict(stage.mesh)[DATA]
        if plan.microbatch_size % data:
            raise PlanError(
                f"a microbatch of {count(plan.microbatch_size, 'sample')} cannot be cut into {data} equal "
                f"parts (stages[{index}].mesh.{DATA}={data}); change the mesh or num_microbatches"
            )


def _bubble(candidate: Candidate, found: Search, cluster: AnyCluster) -> float | None:
    """None where devices slow one another down, which are busy for other times than options say."""
    is_crowded = Neighbours(cluster, found.space).slow_down
    return None if is_crowded else candidate.bubble_fraction


def _runner_up(
    candidate: Candidate, best: Candidate, step_s: float, bubble_fraction: float | None, best_s: float,
    over_bytes: float = 0.0,
) -> RunnerUp:  # fmt: skip
    """Say how a candidate compares.

    Args:
        over_bytes: by how much it is too large for a device, where it was found to be.
    """
    description = candidate.describe()
    if description == best.describe():
        description += f", other {', '.join(differing(candidate, best))}"
    why = [f"{step_s / best_s:.2f} times the step time"]
    if bubble_fraction is not None:
        why.append(f"bubble {bubble_fraction:.1%}")
    if over_bytes > 0:
        why.append(f"{size(over_bytes)} too large for a device")
    return RunnerUp(description=description, step_s=step_s, why="; ".join(why))
