"""The planner and the paper's baselines, each as a set of forced choices of which the best plan counts.

auto          nothing is forced
manual        as Megatron-LM is used: every data x tensor x pipeline degree, number of microbatches and with
              or without recomputation, 1F1B. Ops are sharded by the solver inside these degrees, and stages
              are cut where they balance, so it is at least as good as Megatron-LM's own strategies
pp-dp         of these the ones without a tensor axis
data, zero-2, zero-3     one stage, all devices on the data axis
inter-op      stages of one device each
intra-op      one stage
equal-layers  all that auto has, but stages have equally many layers

Of Wide-ResNet pp-dp and inter-op do not recompute, as the paper did not: so memory can be compared. In the
intra-operator experiment all have one microbatch, and recompute as the paper did.

Left out: Megatron-LM's own strategies (`megatron` has them, for GPT), and manual plans that the bound on
memory rules out: a device holds at least its share of weights and optimizer state.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from launcher.autopar.graphs.optimizer_state import OptimizerFootprint
from launcher.autopar.graphs.work import aval_bytes
from launcher.autopar.inter_op.space import divisors
from launcher.bench.paper_cases import Case
from launcher.bench.paper_figures import END_TO_END

Choices = dict[str, Any]
"""Fields of `PlanOptions`."""

_RECOMPUTE = ("layer", "none")
_RECOMPUTED_BY_THE_PAPER = {"gpt": "layer", "moe": "layer", "wrn": "none"}


def _auto(case: Case) -> Iterator[Choices]:
    yield {"mode": "auto"}


def _equal_layers(case: Case) -> Iterator[Choices]:
    yield {"mode": "auto", "equal_layers": True}


def _inter_op(case: Case) -> Iterator[Choices]:
    forced = {"recompute": "none"} if case.family == "wrn" else {}
    yield {"mode": "auto", "dp": 1, "tp": 1, "pp": case.num_devices, **forced}


def _intra_op(case: Case) -> Iterator[Choices]:
    yield {"mode": "auto", "pp": 1}


def _data(case: Case) -> Iterator[Choices]:
    yield from ({"mode": "data", "recompute": recompute} for recompute in _RECOMPUTE)


def _zero_2(case: Case) -> Iterator[Choices]:
    yield from ({"mode": "zero", "zero": 2, "recompute": recompute} for recompute in _RECOMPUTE)


def _zero_3(case: Case) -> Iterator[Choices]:
    yield from ({"mode": "zero", "zero": 3, "recompute": recompute} for recompute in _RECOMPUTE)


def _manual(case: Case) -> Iterator[Choices]:
    for tensor in divisors(case.cluster().devices_per_host):
        yield from _grid(case, tensor)


def _without_tensor(case: Case) -> Iterator[Choices]:
    """A method of Wide-ResNet alone."""
    yield from (choices for choices in _grid(case, 1) if choices["recompute"] == "none")


def _grid(case: Case, tensor: int) -> Iterator[Choices]:
    """Every pipeline degree that leaves a device room for its share, and what else is free."""
    state_bytes, usable_bytes = _state_bytes(case), case.cluster().device.usable_bytes
    for stages in divisors(case.num_devices // tensor):
        if state_bytes > usable_bytes * tensor * stages:
            continue
        for recompute in _RECOMPUTE:
            yield {
                "mode": "manual",
                "dp": case.num_devices // (tensor * stages),
                "tp": tensor,
                "pp": stages,
                "recompute": recompute,
            }


def _state_bytes(case: Case) -> float:
    """Weights and what the optimizer keeps of them, all devices together, without copies."""
    footprint = OptimizerFootprint(case.optimizer)
    params = case.model().abstract_params.values()
    kept = (footprint.kept(aval) for aval in params)
    return sum(state.alike_bytes + state.whole_bytes for state in kept) + sum(
        map(aval_bytes, params)
    )


_Method = Callable[[Case], Iterator[Choices]]
_METHODS: Mapping[str, _Method] = {
    "auto": _auto,
    "manual": _manual,
    "pp-dp": _without_tensor,
    "data": _data,
    "zero-2": _zero_2,
    "zero-3": _zero_3,
    "inter-op": _inter_op,
    "intra-op": _intra_op,
    "equal-layers": _equal_layers,
}
METHODS = tuple(_METHODS)
_INTRA_OP_METHODS = ("intra-op", "data", "zero-2", "zero-3")


def methods_of(experiment: str, family: str) -> tuple[str, ...]:
    """The methods of an experiment, the planner's own first."""
    if experiment != END_TO_END:
        return _INTRA_OP_METHODS
    return tuple(name for name in METHODS if name != "pp-dp" or family == "wrn")


def points_of(case: Case, method: str) -> list[list[Choices]]:
    """What a method tries, in groups: of each, the next is in vain once one does not fit into memory.

    Microbatches grow from point to point of a group, and what a device holds grows with them.
    """
    if case.experiment != END_TO_END:
        return [[_as_the_paper_did(case, choices)] for choices in _METHODS[method](case)][:1]
    return [_with_microbatches(case, choices) for choices in _METHODS[method](case)]


def _as_the_paper_did(case: Case, choices: Choices) -> Choices:
    recompute = _RECOMPUTED_BY_THE_PAPER[case.family]
    return {**choices, "recompute": recompute, "num_microbatches": 1, "schedule": "1f1b"}


def _with_microbatches(case: Case, choices: Choices) -> list[Choices]:
    """Every number of microbatches of a manual plan; the other modes search them."""
    if choices["mode"] != "manual":
        return [choices]
    batch = case.global_batch
    sizes = (size for size in divisors(batch) if size % choices["dp"] == 0)
    return [{**choices, "num_microbatches": batch // size} for size in sizes]
