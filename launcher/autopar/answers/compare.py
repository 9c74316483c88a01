"""How two plans for one model and cluster differ, and why one is faster.

Both are priced on the same figures. The difference of their step times is the sum of the differences of the
seven parts of `step_parts`, so naming the largest of them explains it, and nothing is left over. What was
decided differently stands beside it: microbatches, schedule, stages, recomputation, ZeRO, tensors.

Left out: which of the decisions makes which part longer; that takes a search with the decision forced
(`why_not`).
"""

import itertools
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import Planned, adopt_plan, check_plan
from launcher.autopar.plans.plan import Plan, Stage
from launcher.autopar.plans.plan_file import errors_of, read_plan
from launcher.autopar.plans.stage_hosts import TightStage
from launcher.autopar.plans.summary import WIDTH, schedule_text
from launcher.autopar.plans.tensor_groups import Shapes, TensorGroup, tensor_groups
from launcher.autopar.predictions.step_parts import PARTS, StepParts, device_parts
from launcher.autopar.text.wording import aligned, digits, percent, ranges, seconds, shortened, size
from launcher.errors import PlanError
from launcher.models.model import Model

THIS_PLAN = "this plan"
_MOST_PARTS = 3  # that a sentence names
_LEAST_PART = 0.1  # of the largest part; smaller ones are not named
_NOTHING_S = 1e-9  # less is rounding
_SAME = 1e-3  # step times that differ by less are the same
_MOST_TENSORS = 5  # that a terminal shows
_WIDEST = 38  # columns of a cell in a terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedPlan:
    """A plan under the name that a comparison gives it."""

    name: str
    plan: Plan
    parts: StepParts
    tight: TightStage

    @property
    def peak_bytes(self) -> float:
        return max(self.plan.predicted.peak_bytes_per_device)

    @property
    def step_s(self) -> float:
        return self.plan.predicted.step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One decision that two plans took differently, or a figure of theirs."""

    what: str
    one: str
    other: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two plans side by side.

    Attributes:
        differences: What they do differently; empty if they are the same plan.
        tensors: What lies differently, the largest tensors first.
    """

    one: PricedPlan
    other: PricedPlan
    differences: tuple[Difference, ...]
    tensors: tuple[Difference, ...]

    @property
    def gaps_s(self) -> Mapping[str, float]:
        """By how much each part of `other` is longer; they add up to the difference of the steps."""
        one, other = self.one.parts.named(), self.other.parts.named()
        return {name: other[name] - one[name] for name in PARTS}


def adopt_other(path: Path, model: Model, cluster: AnyCluster, options: PlanOptions) -> Planned:
    """Price the plan of `plan.compare` on the model and the cluster of this run."""
    plan = read_plan(path, key="plan.compare")
    with errors_of(path, key="plan.compare"):
        check_plan(plan, model, cluster)
        _check_batch(plan, options)
        return adopt_plan(plan, model, cluster, options)


def _check_batch(plan: Plan, options: PlanOptions) -> None:
    if plan.global_batch != options.global_batch:
        raise PlanError(
            f"the plan is for a global batch of {plan.global_batch} samples, and this run's has "
            f"{options.global_batch} (train.global_batch), so their steps do not compare: set "
            f"train.global_batch={plan.global_batch}, or give a plan for {options.global_batch}"
        )


def priced(name: str, planned: Planned) -> PricedPlan:
    """Take a plan's predicted step apart."""
    return PricedPlan(
        name=name,
        plan=planned.plan,
        parts=device_parts(planned.realized, planned.outlook.timeline),
        tight=planned.tight,
    )


def compare(one: PricedPlan, other: PricedPlan, params: Shapes) -> Comparison:
    """Put two plans side by side; `params` are the model's `abstract_params`."""
    return Comparison(
        one=one,
        other=other,
        differences=tuple(_differences(one.plan, other.plan)),
        tensors=tuple(_tensors(one.plan, other.plan, params)),
    )


def verdict(comparison: Comparison) -> str:
    """Say in one sentence which is faster, and what makes up the difference."""
    one, other = comparison.one, comparison.other
    if abs(other.step_s - one.step_s) <= _SAME * one.step_s:
        head = f"{other.name} takes the same time as {one.name}"
    elif other.step_s > one.step_s:
        head = f"{other.name} is {digits(other.step_s / one.step_s)} times slower than {one.name}"
    else:
        head = f"{other.name} is {digits(one.step_s / other.step_s)} times faster than {one.name}"
    reason = reasons(comparison)
    text = f"{head}: {reason}" if reason else head
    for plan in (one, other):
        if not plan.tight.fits:
            text += (
                f"; {plan.name} does not fit, it needs {size(plan.tight.needed_bytes)} on a device "
                f"that has {size(plan.tight.device.usable_bytes)} to fill"
            )
    return text


def reasons(comparison: Comparison) -> str:
    """Name the largest parts of a difference, the largest first; nothing if none is worth a word."""
    before, after = comparison.one.parts.named(), comparison.other.parts.named()
    gaps_s = comparison.gaps_s
    by_size = sorted(gaps_s, key=lambda name: -abs(gaps_s[name]))[:_MOST_PARTS]
    least_s = max(_SAME * comparison.one.step_s, _LEAST_PART * abs(gaps_s[by_size[0]]))
    return ", ".join(
        f"{seconds(abs(gaps_s[name]))} {'more' if gaps_s[name] > 0 else 'less'} {name} "
        f"({_time(after[name])} against {_time(before[name])})"
        for name in by_size
        if abs(gaps_s[name]) > least_s
    )


def _time(value_s: float) -> str:
    return "none" if value_s <= _NOTHING_S else seconds(value_s)


def _differences(one: Plan, other: Plan) -> Iterator[Difference]:
    """What the plans decided, each decision that is not the same."""
    for what, told in _DECISIONS.items():
        texts = told(one), told(other)
        if texts[0] != texts[1]:
            yield Difference(what=what, one=texts[0], other=texts[1])


def _per_stage(told: Callable[[Stage], str]) -> Callable[[Plan], str]:
    """Describe every stage, with equal neighbours folded: `3 x none, layer`; equal ones once."""

    def text(plan: Plan) -> str:
        runs = [(text, len(list(run))) for text, run in itertools.groupby(map(told, plan.stages))]
        if len(runs) == 1:
            return runs[0][0]
        return ", ".join(text if times == 1 else f"{times} x {text}" for text, times in runs)

    return text


def _submesh_text(stage: Stage) -> str:
    return f"{ranges(stage.hosts)}/{ranges(stage.devices)}"


_DECISIONS: Mapping[str, Callable[[Plan], str]] = {
    "devices": lambda plan: str(plan.num_devices),
    "microbatches": lambda plan: str(plan.num_microbatches),
    "schedule": schedule_text,
    "stages": lambda plan: str(len(plan.stages)),
    "layers of a stage": _per_stage(lambda stage: str(stage.layers[1] - stage.layers[0])),
    "hosts/devices": _per_stage(_submesh_text),
    "data x tensor": _per_stage(lambda stage: "x".join(str(n) for _, n in stage.mesh)),
    "recompute": _per_stage(lambda stage: stage.recompute),
    "zero": _per_stage(lambda stage: str(stage.zero)),
    "scatter": _per_stage(lambda stage: "yes" if stage.scatter else "no"),
    "overlap": _per_stage(lambda stage: "yes" if stage.overlap else "no"),
}


def _tensors(one: Plan, other: Plan, params: Shapes) -> Iterator[Difference]:
    """The groups of parameters that lie differently, with their optimizer state."""
    theirs = {(group.name, group.shape): group for group in tensor_groups(other, params)}
    for group in tensor_groups(one, params):
        pair = _placements(group), _placements(theirs.get((group.name, group.shape)))
        if pair[0] != pair[1]:
            what = group.name if group.shape is None else f"{group.name} {list(group.shape)}"
            yield Difference(what=what, one=pair[0], other=pair[1])


def _placements(group: TensorGroup | None) -> str:
    """How a group lies; stages are named only where they differ."""
    if group is None:
        return "not said"
    texts: dict[str, list[int]] = {}
    for placement in group.placements:
        weights, state = placement.weights.text, placement.optimizer_state
        apart = state is not None and state.text != weights
        text = f"{weights}, state {state.text}" if apart else weights
        texts.setdefault(text, []).extend(placement.stages)
    if len(texts) == 1:
        return next(iter(texts))
    return "; ".join(
        f"{'stage' if len(set(stages)) == 1 else 'stages'} {ranges(set(stages))} {text}"
        for text, stages in texts.items()
    )


def part_rows(comparison: Comparison) -> Iterator[tuple[str, str, str, str]]:
    """Yield (part, in one plan, in the other, difference), and the step that they add up to."""
    one, other = comparison.one.parts.named(), comparison.other.parts.named()
    for name, gap_s in comparison.gaps_s.items():
        if max(one[name], other[name]) > _NOTHING_S:
            yield name, _time(one[name]), _time(other[name]), signed(gap_s)
    gap_s = sum(comparison.gaps_s.values())
    yield (
        "a step", seconds(comparison.one.step_s), seconds(comparison.other.step_s), signed(gap_s),
    )  # fmt: skip


def figure_rows(comparison: Comparison) -> Iterator[tuple[str, str, str]]:
    """Yield (figure, of one plan, of the other) of what is promised besides the time."""
    one, other = comparison.one.plan.predicted, comparison.other.plan.predicted
    yield "bubble fraction", percent(one.bubble_fraction), percent(other.bubble_fraction)
    yield "memory", size(comparison.one.peak_bytes), size(comparison.other.peak_bytes)
    yield "sent per step", size(one.communicated_bytes), size(other.communicated_bytes)


def signed(value_s: float) -> str:
    """Write a difference of times: `+1.2 s`, `-30 ms`, `0 s`."""
    if abs(value_s) <= _NOTHING_S:
        return "0 s"
    return f"{'+' if value_s > 0 else '-'}{seconds(abs(value_s))}"


def comparison_text(comparison: Comparison) -> str:
    """Write a comparison for a terminal."""
    names = (shortened(comparison.one.name, _WIDEST), shortened(comparison.other.name, _WIDEST))
    rows = [("", *names, "difference"), *part_rows(comparison)]
    rows += [(*figures, "") for figures in figure_rows(comparison)]
    lines = [
        *textwrap.wrap(verdict(comparison), WIDTH),
        "",
        *aligned(rows, right=(1, 2, 3)),
        "times: of the average device; the parts add up to the step",
        "",
    ]
    if not (comparison.differences or comparison.tensors):
        return "\n".join([*lines, "the plans decide nothing differently"])
    decided = [
        (d.what, shortened(d.one, _WIDEST), shortened(d.other, _WIDEST))
        for d in comparison.differences
    ]
    if decided:
        lines += aligned([("what differs", *names), *decided])
    return "\n".join([*lines, *_tensor_lines(comparison.tensors, names)])


def _tensor_lines(tensors: tuple[Difference, ...], names: tuple[str, str]) -> Iterator[str]:
    width = max(map(len, names))
    for tensor in tensors[:_MOST_TENSORS]:
        yield f"{tensor.what} lies as"
        for name, text in zip(names, (tensor.one, tensor.other), strict=True):
            lead = f"  {name:<{width}}  "
            yield from textwrap.wrap(
                text, WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead)
            )
    more = len(tensors) - _MOST_TENSORS
    if more > 0:
        yield f"and {more} more groups of tensors"
