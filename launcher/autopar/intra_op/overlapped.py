"""What a stage saves that brings its gradients together while its last backward pass goes on.

The pass comes through the layers from the last to the first. A parameter's gradients are final behind the
first layer that has one for it, and are then brought together, one layer after the other, while the pass goes
on. With layers 0, 1, ... of the stage, b_i seconds of the pass in layer i and r_i seconds of what is final
behind it, what is not done yet when the pass ends takes

    exposed = max over j of  (r_0 + ... + r_j)  -  (b_0 + ... + b_{j-1})

more: from the layer on, the j-th, behind which the links do not pause any more. So with little to do it is
r_0, which nothing is left to hide, and with much the whole less all of the pass but layer L-1.

Both are those of the layers themselves, not averages: an embedding, the first layer and last to be final, may
have a third of all gradients. Left out: values that are resharded between layers, which lengthen the pass;
that collectives and computation slow one another down; and what XLA makes of the order, such as waiting for
several layers to send their gradients in one message.
"""

from collections.abc import Mapping

import numpy as np

from launcher.autopar.graphs.graph import Value
from launcher.autopar.graphs.trace import Role
from launcher.autopar.intra_op.intra_op import IntraOpPlanner, StageSharding
from launcher.autopar.intra_op.wiring import Place


def exposed_s(pass_s: np.ndarray, reduce_s: np.ndarray) -> np.ndarray:
    """The formula above, for the first layer, the first two, ...

    Args:
        pass_s: b_i, by layer.
        reduce_s: r_i, by layer.
    """
    return np.maximum.accumulate(np.cumsum(reduce_s) - (np.cumsum(pass_s) - pass_s))


def saved_s(
    planner: IntraOpPlanner, sharding: StageSharding, layers: tuple[int, int], recompute: str, *,
    halves: bool = False,
) -> np.ndarray:  # fmt: skip
    """What the stage of the first of these layers saves, of the first two, ...; nothing on devices whose
    collectives do not run beside computation.

    Args:
        sharding: of these layers.
        recompute: as in a plan's stage.
        halves: whether the pass is only the second half of a split one.
    """
    first, last = layers
    if not sharding.settings.compute.device.overlaps_collectives:
        return np.zeros(last - first)
    reduce_s = _reduce_s(planner, planner.reduce_s(first, last, sharding))
    pass_s = _pass_s(planner, sharding, recompute, halves=halves)
    reduce_s, pass_s = reduce_s[first:last], pass_s[first:last]
    return np.cumsum(reduce_s) - exposed_s(pass_s, reduce_s)


def _reduce_s(planner: IntraOpPlanner, by_place: Mapping[Place, float]) -> np.ndarray:
    """By layer: what becomes final there."""
    found = np.zeros(len(planner.model.layers))
    for index, layer in enumerate(planner.model.layers):
        final: set[Value] = set()
        for slot, value in enumerate(layer.inputs):
            is_param = layer.cls.slots[slot].role is Role.PARAM
            if is_param and planner.param_owners[value] == index and value not in final:
                final.add(value)
                found[index] += by_place.get((layer.cls.name, slot), 0.0)
    return found


def _pass_s(
    planner: IntraOpPlanner, sharding: StageSharding, recompute: str, *, halves: bool
) -> np.ndarray:
    """By layer: the last backward pass. What "full" recomputes comes before all of it."""

    def of_class(name: str) -> float:
        seconds = sharding.group_seconds.get(name)
        if seconds is None:
            return 0.0
        first_s, second_s = seconds.halves("layer" if recompute == "layer" else "none")
        return second_s if halves else first_s + second_s

    known = {cls.name: of_class(cls.name) for cls in planner.model.classes}
    return np.array([known[layer.cls.name] for layer in planner.model.layers])
