"""How many arrays the programs of a stage take and make: what starting them costs beside a fixed time.

They depend on its layers and on what is recomputed, not on how anything is sharded. Left out: scalars, and
what differs for parameters that several stages read.
"""

from dataclasses import dataclass

from launcher.autopar.graphs.optimizer_state import OptimizerFootprint
from launcher.autopar.graphs.trace import Role
from launcher.autopar.graphs.work import aval_bytes
from launcher.autopar.intra_op.intra_op import IntraOpPlanner
from launcher.autopar.intra_op.stage_layout import kept_values


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchArrays:
    """Arrays of each program of a stage."""

    forward: int
    backward: int
    synchronize: int
    update: int


def launch_arrays(
    planner: IntraOpPlanner, first: int, last: int, recompute: str, optimizer: OptimizerFootprint
) -> LaunchArrays:
    """Count them for layers [first, last).

    Where these are all layers, the stage is the plan's only one, whose step is one program: it takes and
    makes what an update does.
    """
    model = planner.model
    traced, layers = model.traced, model.layers[first:last]
    slots = [
        (value, slot.role, layer.cls.has_gradient(index))
        for layer in layers
        for index, (value, slot) in enumerate(zip(layer.inputs, layer.cls.slots, strict=True))
    ]
    made = {value for layer in layers for value in layer.outputs}
    read = {role: {value for value, its, _ in slots if its is role} for role in (*Role, None)}
    params = read[Role.PARAM] | set(planner.wiring(first, last).unread)
    trained = {value for value, role, has_one in slots if role is Role.PARAM and has_one}
    moments = sum(_moments(traced.graph.avals[value], optimizer) for value in params)
    new_state = {path for path, value in traced.state.items() if value in made}
    update = 2 * (len(params) + moments) + len(trained) + 3 * len(new_state)
    if len(layers) == len(model.layers):
        return LaunchArrays(forward=0, backward=0, synchronize=0, update=update)
    later = {value for layer in model.layers[last:] for value in layer.inputs}
    imports, exports = read[None] - made, made & (later | {traced.loss, *traced.metrics.values()})
    returned = {value for value, _, has_one in slots if has_one} & imports
    differentiated = {
        value
        for layer in layers
        for at, value in enumerate(layer.outputs)
        if at in layer.cls.cotangents
    }
    back = len(returned) + len(differentiated & (later | {traced.loss}))
    state = new_state | {traced.inputs[value].path for value in read[Role.STATE]}
    kept = len(list(kept_values(model, first, last, recompute)))
    taken = len(params) + len(read[Role.BATCH]) + len(imports)
    return LaunchArrays(
        forward=taken + len(state) + len(exports) + len(new_state) + kept,
        backward=taken + kept + back + 2 * len(trained),
        synchronize=2 * len(trained),
        update=update,
    )


def _moments(aval, optimizer: OptimizerFootprint) -> int:
    """The arrays of its size that the optimizer keeps for a parameter."""
    return optimizer.kept(aval).alike_bytes // max(1, aval_bytes(aval))
