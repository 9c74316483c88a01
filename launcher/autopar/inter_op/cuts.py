"""Where stages may begin, and what crosses there.

Before every layer, every few equal ones, or so that all stages have equally many.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from launcher.autopar.graphs.layers import LayeredModel
from launcher.autopar.graphs.work import aval_bytes, op_flops
from launcher.autopar.inter_op.space import PlanOptions, Space, divisors

_LIGHT = 0.5  # of a mean piece: less work is no stage's


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A schedule, and where its stages may begin.

    Attributes:
        virtual_stages: on a submesh.
        num_submeshes: None for any number of them.
        cuts: ascending, with 0 and the number of layers.
    """

    schedule: str
    virtual_stages: int
    num_submeshes: int | None
    cuts: tuple[int, ...]

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges of layers that a stage may have."""
        num_stages = self.num_submeshes and self.num_submeshes * self.virtual_stages
        if num_stages == len(self.cuts) - 1:
            return itertools.pairwise(self.cuts)
        return itertools.combinations(self.cuts, 2)


def ways_to_cut(options: PlanOptions, space: Space, model: LayeredModel) -> Iterator[Way]:
    """Yield what there is to search, one schedule after the other.

    Where stages may not begin before every layer, equally many layers may still need other cuts. With virtual
    stages they are tried by themselves in any case: there the search among all cuts is only near the best.
    """
    forced = space.num_submeshes
    everywhere = {
        v: stage_cuts(model, (forced or 0) * v, space.most_pieces) for _, v in space.schedules
    }

    def way(name: str, v: int, number: int | None, cuts: tuple[int, ...]) -> Way:
        return Way(schedule=name, virtual_stages=v, num_submeshes=number, cuts=cuts)

    if not options.equal_layers:
        yield from (way(name, v, forced, everywhere[v]) for name, v in space.schedules)
    for name, v in space.schedules:
        for number in divisors(space.num_devices) if forced is None else (forced,):
            if number * v > len(model.layers):
                continue
            equal = equal_cuts(model, number * v)
            if options.equal_layers or v > 1 or not set(equal) <= set(everywhere[v]):
                yield way(name, v, number, equal)


def stage_cuts(model: LayeredModel, num_stages: int, most_pieces: int) -> tuple[int, ...]:
    """Where stages may begin: before every layer, or, where that is too often, every few equal ones.

    A layer with little work goes with the ones beside it.

    Args:
        num_stages: so many stages there must be room for.
        most_pieces: that there may be, unless there are more stages.
    """
    count, most = len(model.layers), max(most_pieces, num_stages)
    if count <= most:
        return tuple(range(count + 1))
    for group in range(2, count):
        cuts = _grouped(model, group)
        if len(cuts) - 1 <= most:
            enough = len(cuts) - 1 >= num_stages
            return cuts if enough else tuple(round(i * count / most) for i in range(most + 1))
    return 0, count


def equal_cuts(model: LayeredModel, num_stages: int) -> tuple[int, ...]:
    """Cuts into stages of equally many layers, or one more.

    Layers with little work do not count, unless without them there are fewer layers than stages.
    """
    work = _work(model)
    least = _LIGHT * sum(work) / len(work)
    heavy = [index for index, flops in enumerate(work) if flops >= least]
    counted = heavy if len(heavy) >= num_stages else range(len(work))
    starts = (counted[stage * len(counted) // num_stages] for stage in range(1, num_stages))
    return (0, *starts, len(work))


def _work(model: LayeredModel) -> list[float]:
    """The operations of each layer."""
    return [sum(op_flops(op) for op in layer.cls.joint.ops) for layer in model.layers]


def _grouped(model: LayeredModel, group: int) -> tuple[int, ...]:
    """Cuts before every so many equal layers, counted from the first of them."""
    classes = [layer.cls for layer in model.layers]
    work = _work(model)
    least = _LIGHT * sum(work) / len(work) * group
    cuts, run = [0], 0
    for index in range(1, len(classes)):
        run = run if classes[index] is classes[index - 1] else index
        if (index - run) % group == 0 and sum(work[cuts[-1] : index]) >= least:
            cuts.append(index)
    if len(cuts) > 1 and sum(work[cuts[-1] :]) < least:
        cuts.pop()
    return (*cuts, len(classes))


def crossing_bytes(model: LayeredModel) -> dict[int, float]:
    """Bytes that cross each boundary per microbatch: values on, gradients back."""
    layers, avals = model.layers, model.traced.graph.avals
    crossing: dict[int, float] = {0: 0.0, len(layers): 0.0}
    for cut in range(1, len(layers)):
        made = {value for layer in layers[:cut] for value in layer.outputs}
        read = {value for layer in layers[cut:] for value in layer.inputs}
        crossing[cut] = 2.0 * sum(aval_bytes(avals[value]) for value in made & read)
    return crossing
