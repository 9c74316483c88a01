"""The buffers that a stage of a finished plan is predicted to hold, in bytes per device.

What lies between instructions is read off the stage's layout; what a program needs while it runs comes from
the layers' workspaces (`layer_workspace`).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from launcher.autopar.graphs.trace import Role
from launcher.autopar.graphs.work import aval_bytes
from launcher.autopar.intra_op.layer_workspace import half_workspaces
from launcher.autopar.intra_op.memory import ClassMemory, class_memories
from launcher.autopar.programs.buffers import Footprint, StageBuffers
from launcher.autopar.programs.instructions import Op
from launcher.autopar.realized.realize import RealizedPlan, RealizedStage
from launcher.autopar.sharding.param_costs import gradient_spec, optimizer_spec
from launcher.autopar.sharding.spec import Spec, num_shards

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
        realized, index, sizes, lasting, lambda passing: _programs(realized, index, passing)
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
    if realized.program.splits_backward:
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
    realized: RealizedPlan, index: int, passing: Mapping[str, float]
) -> dict[str, Footprint]:
    stage = realized.stages[index]
    wiring = realized.planner.wiring(*stage.stage.layers)
    memories = class_memories(realized.planner, stage.sharding, wiring)
    walk = _LayerWalk(realized, stage, memories)
    returns, exports = passing["returns"], passing["exports"]
    for_weights = passing.get("kept for weights", 0.0)
    found = {
        "forward": Footprint(passing["kept"] + exports, walk.forward()),
        "backward": Footprint(returns, walk.backward()),
        "forward_backward": Footprint(returns + exports, walk.forward_backward()),
        "synchronize": Footprint(passing["gradients"], 0.0),
        "update": Footprint(0.0, 0.0),  # XLA updates parameters and optimizer state in place
    }
    if "kept for weights" in passing:
        input_half, weight_half = walk.halves()
        found |= {
            "backward_input": Footprint(returns + for_weights, input_half),
            "backward_weight": Footprint(0.0, weight_half),
        }
    if stage.stage.overlap:
        found |= _ending_programs(found, _Ending(realized, index), walk.forward_backward_by_layer())
    return found


def _ending_programs(
    found: Mapping[str, Footprint], ending: "_Ending", by_layer: Sequence[float]
) -> dict[str, Footprint]:
    """The programs of backward passes that end with `synchronize`.

    The most that a layer needs, and all sums and gradients, are rarely there at once: what one layer needs
    goes as the next ones' sums come. Where the forward pass is in the same program, what it left goes too,
    layer by layer, as gradients come: at a layer there are those of the layers behind it.

    Args:
        by_layer: what each layer needs of a program that goes forward and back.
    """
    ended = {}
    for name in ("backward", "backward_weight", "forward_backward"):
        if name not in found:
            continue
        most_bytes = found[name].temporary_bytes
        if name == "forward_backward":
            at_layers = zip(by_layer, ending.at_layers, strict=True)
            most_bytes = max(map(sum, at_layers)) - ending.made_bytes
        ended[f"{name}_synchronize"] = Footprint(
            found[name].result_bytes + ending.made_bytes, max(most_bytes, ending.sum_bytes)
        )
    return ended


class _Ending:
    """What `synchronize` adds to a program: gradients, but for those that sums become where they are; and
    the sums that it brings together, which are not written to the accumulators unless these are the
    program's own, as in a step that is one program.

    Attributes:
        at_layers: by layer, what is there of it when a backward pass is there: the gradients of the
            layers behind it, and the largest of its own sums on its way.
    """

    def __init__(self, realized: RealizedPlan, index: int):
        stage, traced = realized.stages[index], realized.planner.model.traced
        shape, sums = stage.settings.mesh.shape, stage.layout.accumulators
        gradients = _gradient_specs(realized, index)
        made, brought = {}, {}
        for path, where in gradients.items():
            if sums.get(path) != where:
                whole_bytes = aval_bytes(traced.param_avals[path])
                made[path] = whole_bytes / num_shards(where, shape)
                brought[path] = whole_bytes / num_shards(sums.get(path, where), shape)
        self.sum_bytes = sum(brought.values()) if len(realized.stages) > 1 else 0.0
        self.made_bytes, self.at_layers = sum(made.values()), []
        coming = dict(made)
        for layer in realized.planner.model.layers[slice(*stage.stage.layers)]:
            paths = {traced.inputs[v].path for v in layer.inputs if v in traced.inputs}
            # Final behind the first layer that reads the parameter.
            own = [path for path in paths if coming.pop(path, None) is not None]
            most_brought = max((brought[path] for path in own), default=0.0)
            self.at_layers.append(sum(coming.values()) + most_brought)


class _LayerWalk:
    """The temporary buffers of programs that go through a stage's layers one by one."""

    def __init__(
        self, realized: RealizedPlan, stage: RealizedStage, memories: Mapping[str, ClassMemory]
    ):
        self.stage, self.recompute = stage, stage.stage.recompute
        self.wiring = realized.planner.wiring(*stage.stage.layers)
        self.layers = list(enumerate(realized.planner.model.layers))[slice(*stage.stage.layers)]
        self.memories = [memories[layer.cls.name] for _, layer in self.layers]
        made = {value for _, layer in self.layers for value in layer.outputs}
        self.passed_on = [
            {slot: size for slot, size in memory.input_bytes.items() if layer.inputs[slot] in made}
            for (_, layer), memory in zip(self.layers, self.memories, strict=True)
        ]

    def backward(self) -> float:
        """Of a backward pass to which the forward pass left what it keeps."""
        if self.recompute == "full":
            return max(self._in_turn())
        again = self.recompute == "layer"
        needs = [memory.workspace for memory in self.memories]
        return max(w.again_bytes if again else w.backward_bytes for w in needs)

    def forward_backward(self) -> float:
        """Of both passes in one: what is kept ends with the layer that reads it."""
        return max(self.forward_backward_by_layer())

    def forward_backward_by_layer(self) -> list[float]:
        """The same, at each layer."""
        if self.recompute != "layer":
            return self._in_turn()
        found, before = [], 0.0
        for memory, inputs in zip(self.memories, self.passed_on, strict=True):
            before += sum(inputs.values())
            needs = memory.workspace
            found.append(before + max(needs.passing_bytes, needs.again_bytes))
        return found

    def _in_turn(self) -> list[float]:
        """Where the layers before one still keep everything, and those after it nothing any more."""
        found, before = [], 0.0
        for memory, inputs in zip(self.memories, self.passed_on, strict=True):
            before += sum(size for slot, size in inputs.items() if slot in memory.backward_slots)
            found.append(before + memory.workspace.both_bytes)
            before += memory.residual_bytes
        return found

    def forward(self) -> float:
        """Of a forward pass. What its results are to hold is free until the last layer makes them."""
        if self.recompute == "none":
            return self.memories[-1].workspace.forward_bytes
        return max(memory.workspace.passing_bytes for memory in self.memories)

    def halves(self) -> tuple[float, float]:
        """Of the halves of a split backward pass."""
        aliases, starts = self.wiring.aliases, self.stage.emitter.split.starts
        needs = [
            half_workspaces(layer.cls, self.stage.sharding, aliases, self.recompute, starts[index])
            for index, layer in self.layers
        ]
        most = left = 0.0
        before = sum(layer.there_bytes for layer in needs)
        for layer in reversed(needs):
            before -= layer.there_bytes
            most = max(most, before + left + layer.input_bytes)
            left += layer.left_bytes
        return max(0.0, most - left), max(layer.weight_bytes for layer in needs)


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
