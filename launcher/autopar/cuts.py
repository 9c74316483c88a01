"""Where stages may begin, and what crosses there."""

from launcher.autopar.layers import LayeredModel
from launcher.autopar.work import aval_bytes, op_flops

_MOST_CUTS = 24
_LIGHT = 0.5  # of a mean piece: less work is no stage's


def stage_cuts(model: LayeredModel, num_stages: int) -> tuple[int, ...]:
    """Where stages may begin: before every layer, or, where that is too often, every few equal ones.

    A layer with little work goes with the ones beside it.

    Args:
        num_stages: so many stages there must be room for.
    """
    count, most = len(model.layers), max(_MOST_CUTS, num_stages)
    if count <= most:
        return tuple(range(count + 1))
    for group in range(2, count):
        cuts = _grouped(model, group)
        if len(cuts) - 1 <= most:
            enough = len(cuts) - 1 >= num_stages
            return cuts if enough else tuple(round(i * count / most) for i in range(most + 1))
    return 0, count


def _grouped(model: LayeredModel, group: int) -> tuple[int, ...]:
    """Cuts before every so many equal layers, counted from the first of them."""
    classes = [layer.cls for layer in model.layers]
    work = [sum(op_flops(op) for op in cls.joint.ops) for cls in classes]
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
