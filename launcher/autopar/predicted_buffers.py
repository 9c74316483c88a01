"""The buffers that a stage of a finished plan is predicted to hold, in bytes per device.

What lies between instructions is read off the stage's layout; what a program needs while it runs comes from
the layers' workspaces (`layer_workspace`).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping

from launcher.autopar.buffers import FUSED, Footprint, StageBuffers
from launcher.autopar.instructions import Op
from launcher.autopar.memory import backward_workspace, class_memories
from launcher.autopar.param_costs import gradient_spec, optimizer_spec
from launcher.autopar.realize import RealizedPlan, RealizedStage
from launcher.autopar.spec import Spec, num_shards
from launcher.autopar.trace import Role
from launcher.autopar.work import aval_bytes

Sizes = Callable[[Mapping, Mapping], float]
"""(name -> spec, name -> aval) -> bytes per device."""


def predicted_buffers(realized: RealizedPlan, index: int) -> StageBuffers:
    """What stage `index` keeps, makes, receives and needs."""
    stage = realized.stages[index]
    shape = stage.settings.mesh.shape

    def sizes(specs: Mapping, avals: Mapping) -> float:
        return sum(
            aval_bytes(avals[name]) / num_shards(spec, shape) for name, spec in specs.items()
        )

    traced = realized.planner.model.traced
    params = {
        i.path: traced.graph.avals[v] for v, i in traced.inputs.items() if i.role is Role.PARAM
    }
    lasting = {
        "parameters": sizes(stage.layout.params, params),
        "optimizer state": _optimizer_bytes(realized, index, params),
    }
    return stage_buffers(
        realized, index, sizes, lasting, lambda passing: _programs(realized, stage, passing)
    )


def stage_buffers(
    realized: RealizedPlan, index: int, sizes: Sizes, lasting: Mapping[str, float],
    programs: Callable[[Mapping[str, float]], Mapping[str, Footprint]],
) -> StageBuffers:  # fmt: skip
    """Lay out a stage's buffers by its layout, given how many bytes specs amount to."""
    stage, traced = realized.stages[index], realized.planner.model.traced
    layout, layers, values = stage.layout, realized.planner.model.layers, traced.graph.avals
    by_role = {
        role: {i.path: values[v] for v, i in traced.inputs.items() if i.role is role}
        for role in Role
    }
    params, joint = (
        by_role[Role.PARAM],
        {i: layer.cls.joint.avals for i, layer in enumerate(layers)},
    )
    kept = {name: joint[name[0]][name[1]] for name in layout.kept}
    passing = {
        "accumulators": sizes(layout.accumulators, params),
        "gradients": sizes(_gradient_specs(realized, index), params),
        "kept": sizes(layout.kept, kept),
        "exports": sizes(layout.exports, values),
        "returns": sizes(layout.returns, values),
    }
    if any(
        entry.op is Op.BACKWARD_WEIGHT for entries in realized.program.lists for entry in entries
    ):
        split = stage.emitter.split
        left = {name: joint[name[0]][name[1]] for name in split.weight_kept}
        ended = {name: spec for name, spec in layout.kept.items() if name not in split.kept}
        passing["kept for weights"] = sizes(split.weight_kept, left)
        passing["let go of"] = sizes(ended, kept)
    batch = realized.plan.num_microbatches * sizes(layout.batch, by_role[Role.BATCH])
    state = sizes(layout.state, by_role[Role.STATE])
    return StageBuffers(
        lasting={**lasting, "model state": state, "batch": batch},
        passing=passing,
        received=_received(realized, index, sizes, params),
        programs=programs(passing),
    )


def _gradient_specs(realized: RealizedPlan, index: int) -> dict[str, Spec]:
    """Where the summed gradients lie of the parameters that a stage updates."""
    stage, traced = realized.stages[index], realized.planner.model.traced
    shapes = {path: aval.shape for path, aval in traced.param_avals.items()}
    mesh, zero = stage.settings.mesh, stage.settings.zero
    return {
        path: gradient_spec(home, shapes[path], mesh, zero)
        for path, home in stage.layout.params.items()
        if realized.owner[path] == index
    }


def _optimizer_bytes(realized: RealizedPlan, index: int, params: Mapping) -> float:
    stage = realized.stages[index]
    mesh, total = stage.settings.mesh, 0.0
    for path in _gradient_specs(realized, index):
        home, aval = stage.layout.params[path], params[path]
        kept = stage.settings.optimizer.kept(aval)
        where = optimizer_spec(home, aval.shape, mesh, stage.settings.zero)
        total += kept.alike_bytes / num_shards(where, mesh.shape) + kept.whole_bytes
    return total


def _programs(
    realized: RealizedPlan, stage: RealizedStage, passing: Mapping[str, float]
) -> dict[str, Footprint]:
    wiring = realized.planner.wiring(*stage.stage.layers)
    memories = class_memories(realized.planner, stage.sharding, wiring)
    forward = max(memories[name].workspace.forward_bytes for name in wiring.classes)
    backward = backward_workspace(memories, wiring, stage.stage.recompute)
    returns, exports = passing["returns"], passing["exports"]
    for_weights = passing.get("kept for weights", 0.0)
    return {
        "forward": Footprint(passing["kept"] + exports, forward),
        "backward": Footprint(returns, backward),
        "backward_input": Footprint(returns + for_weights, backward),
        "backward_weight": Footprint(0.0, backward),
        FUSED: Footprint(returns + exports, passing["kept"] + backward),
        "synchronize": Footprint(passing["gradients"], 0.0),
        "update": Footprint(0.0, _update_bytes(realized, stage)),
    }


def _update_bytes(realized: RealizedPlan, stage: RealizedStage) -> float:
    """What the update needs beside what it replaces.

    XLA's CPU backend computes the new moments of all parameters before it updates the first of them, beside
    the old ones; on accelerators a parameter and its moments are updated in one loop, in place.
    """
    if stage.settings.compute.device.accelerator:
        return 0.0
    traced = realized.planner.model.traced
    params = {
        i.path: traced.graph.avals[v] for v, i in traced.inputs.items() if i.role is Role.PARAM
    }
    return _optimizer_bytes(realized, realized.stages.index(stage), params)


def _received(realized: RealizedPlan, index: int, sizes: Sizes, params: Mapping):
    layout, values = realized.stages[index].layout, realized.planner.model.traced.graph.avals
    found: dict[tuple[Op, int], float] = defaultdict(float)
    for (source, target), sent in realized.sent.items():
        if target == index:
            specs = {value: layout.imports[value] for value in sent}
            found[Op.RECEIVE_ACTIVATION, source] = sizes(specs, values)
    for (maker, reader), returned in realized.returned.items():
        if maker == index:
            specs = {value: layout.cotangents[value] for value in returned}
            found[Op.RECEIVE_COTANGENT, reader] = sizes(specs, values)
    gradients = _gradient_specs(realized, index)
    for path, users in realized.users.items():
        if index in users:
            home = {path: layout.params[path]}
            found[Op.RECEIVE_TIED_PARAMETER, realized.owner[path]] += sizes(home, params)
        if realized.owner[path] == index:
            for user in realized.contributors[path]:
                arrived = sizes({path: gradients[path]}, params)
                found[Op.RECEIVE_TIED_GRADIENT, user] += arrived
    return dict(found)
