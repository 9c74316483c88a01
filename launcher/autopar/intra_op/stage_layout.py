"""What goes in and out of a stage's programs, and where it lies: the signature that the emitter, the memory
model and the runtime share.

Names: parameters and state go by path, batch leaves by name, values that cross stages by their number in
the traced model, kept values by (layer, value of the layer's joint graph).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from launcher.autopar.graphs.graph import Value, used_values
from launcher.autopar.graphs.layers import Layer, LayerClass, LayeredModel
from launcher.autopar.graphs.trace import Role
from launcher.autopar.intra_op.intra_op import IntraOpPlanner, StageSharding
from launcher.autopar.intra_op.stage_problem import StageSettings
from launcher.autopar.sharding.param_costs import state_spec
from launcher.autopar.sharding.spec import Spec, replicated

Kept = tuple[int, Value]  # (index of the layer in the model, value in its joint graph)


@dataclass(frozen=True, slots=True, eq=False)
class StageLayout:
    """The specs of everything that a stage's forward and backward programs exchange.

    `gradient_outputs` are the exports whose cotangents come back; `returns` the imports whose gradients
    are sent back. `kept` is what the forward pass of a microbatch leaves for its backward pass.
    """

    first: int
    last: int
    recompute: str
    params: dict[str, Spec]
    accumulators: dict[str, Spec]
    state: dict[str, Spec]
    new_state: dict[str, Value]
    batch: dict[str, Spec]
    imports: dict[Value, Spec]
    exports: dict[Value, Spec]
    cotangents: dict[Value, Spec]
    returns: dict[Value, Spec]
    kept: dict[Kept, Spec]


def layout(planner: IntraOpPlanner, sharding: StageSharding, first: int, last: int, recompute: str):
    """Read a stage's signature off its solution; it has all that the layers read."""
    return _Layouter(planner, sharding, first, last, recompute).layout()


def training_layout(
    planner: IntraOpPlanner, sharding: StageSharding, first: int, last: int, recompute: str
) -> StageLayout:
    """The signature of a stage that trains: the last one also has what no layer reads."""
    described = layout(planner, sharding, first, last, recompute)
    if not planner.wiring(first, last).unread:
        return described
    unread = unread_specs(planner, sharding.settings)
    return replace(described, params=dict(sorted({**described.params, **unread}.items())))


def unread_specs(planner: IntraOpPlanner, settings: StageSettings) -> dict[str, Spec]:
    """Where the parameters lie that no layer reads: whole on every device, but for ZeRO-3.

    The last stage has them: under 1F1B it holds the fewest microbatches, and a head that only evaluation
    reads comes after all layers.
    """
    traced, mesh = planner.model.traced, settings.mesh
    whole = replicated(mesh.num_axes)
    return {
        traced.inputs[value].path: state_spec(whole, shape, mesh.shape)
        if settings.zero == 3
        else whole
        for value in planner.model.unread_params()
        for shape in [traced.graph.avals[value].shape]
    }


class _Layouter:
    def __init__(self, planner, sharding: StageSharding, first: int, last: int, recompute: str):
        self.model: LayeredModel = planner.model
        self.picks = sharding.picks
        self.first, self.last, self.recompute = first, last, recompute
        self.wiring = planner.wiring(first, last)
        self.layers = list(enumerate(self.model.layers))[first:last]
        self.num_axes = sharding.settings.mesh.num_axes

    def slot_spec(self, cls: LayerClass, slot: int) -> Spec:
        name, slot = self.wiring.aliases.get((cls.name, slot), (cls.name, slot))
        return self.picks["slot", name, slot]

    def layout(self) -> StageLayout:
        imports, returns = self._imports()
        exports, cotangents = self._exports()
        new_state = self._new_state()
        # State that is written and not read, such as a last loss, lies whole on every device.
        written = dict.fromkeys(new_state, replicated(self.num_axes))
        return StageLayout(
            first=self.first,
            last=self.last,
            recompute=self.recompute,
            params=self._by_path(Role.PARAM),
            accumulators=self._accumulators(),
            state=written | self._by_path(Role.STATE),
            new_state=new_state,
            batch=self._by_path(Role.BATCH),
            imports=imports,
            exports=exports,
            cotangents=cotangents,
            returns=returns,
            kept=dict(self._kept()),
        )

    def _slots(self, role: Role | None) -> Iterable[tuple[Layer, int, Value]]:
        for _, layer in self.layers:
            for slot, value in enumerate(layer.inputs):
                if layer.cls.slots[slot].role is role:
                    yield layer, slot, value

    def _by_path(self, role: Role) -> dict[str, Spec]:
        """The first reader decides where a batch leaf lies; parameters and state agree everywhere."""
        found: dict[str, Spec] = {}
        for layer, slot, value in self._slots(role):
            found.setdefault(self.model.traced.inputs[value].path, self.slot_spec(layer.cls, slot))
        return dict(sorted(found.items()))

    def _accumulators(self) -> dict[str, Spec]:
        found: dict[str, Spec] = {}
        for layer, slot, value in self._slots(Role.PARAM):
            name, index = self.wiring.aliases.get((layer.cls.name, slot), (layer.cls.name, slot))
            spec = self.picks.get(("accumulator", name, index))
            if spec is not None:
                found.setdefault(self.model.traced.inputs[value].path, spec)
        return dict(sorted(found.items()))

    def _new_state(self) -> dict[str, Value]:
        produced = {value for _, layer in self.layers for value in layer.outputs}
        state = self.model.traced.state
        return {path: value for path, value in state.items() if value in produced}

    def _imports(self) -> tuple[dict[Value, Spec], dict[Value, Spec]]:
        imports: dict[Value, Spec] = {}
        returns: dict[Value, Spec] = {}
        for layer, slot, value in self._slots(None):
            if (layer.cls.name, slot) not in self.wiring.imports or self._is_internal(value):
                continue
            imports.setdefault(value, self.slot_spec(layer.cls, slot))
            spec = self.picks.get(("return", layer.cls.name, slot))
            if spec is not None:
                returns.setdefault(value, spec)
        return imports, returns

    def _is_internal(self, value: Value) -> bool:
        return any(value in layer.outputs for _, layer in self.layers)

    def _exports(self) -> tuple[dict[Value, Spec], dict[Value, Spec]]:
        exports: dict[Value, Spec] = {}
        cotangents: dict[Value, Spec] = {}
        traced = self.model.traced
        later = {v for layer in self.model.layers[self.last :] for v in layer.inputs}
        wanted = later | {traced.loss, *traced.metrics.values()}
        for _, layer in self.layers:
            for output, value in enumerate(layer.outputs):
                if value not in wanted:
                    continue
                key = (layer.cls.name, output)
                exports[value] = self.picks.get(("export", *key), replicated(self.num_axes))
                if ("cotangent", *key) in self.picks and value in later | {traced.loss}:
                    cotangents[value] = self.picks["cotangent", *key]
        return exports, cotangents

    def _kept(self) -> Iterable[tuple[Kept, Spec]]:
        """Residuals as they were produced, and the layer inputs that come from inside the stage."""
        for index, value, slot in kept_values(self.model, self.first, self.last, self.recompute):
            cls = self.model.layers[index].cls
            produced = slot is None
            spec = produced_spec(cls, value, self.picks) if produced else self.slot_spec(cls, slot)
            yield (index, value), spec


def kept_values(
    model: LayeredModel, first: int, last: int, recompute: str
) -> Iterator[tuple[int, Value, int | None]]:
    """Yield what the forward pass of layers [first, last) leaves for its backward pass.

    Each as the number of its layer, its value in the layer's class, and its slot; None for a residual.
    """
    made = {value for layer in model.layers[first:last] for value in layer.outputs}
    again = recompute != "none"
    for index, layer in enumerate(model.layers[first:last], start=first):
        cls = layer.cls
        read = used_values((*cls.forward_ops, *cls.backward_ops) if again else cls.backward_ops)
        read |= {value for value in cls.gradients.values() if isinstance(value, Value)}
        for slot, value in enumerate(cls.joint.inputs[: cls.num_slots]):
            role = cls.slots[slot].role
            inside = role is None and layer.inputs[slot] in made
            if value in read and (role is Role.STATE or (inside and recompute != "full")):
                yield index, value, slot
        if not again:
            yield from ((index, value, None) for value in cls.residuals)


def read_later(
    model: LayeredModel,
    layout: StageLayout,
    index: int,
    slot_spec: Callable[[LayerClass, int], Spec],
) -> list[tuple[Value, Spec]]:
    """What of a layer its stage's later layers, and the results of the forward pass, read, and how."""
    layer, later = model.layers[index], model.layers[index + 1 : layout.last]
    found = []
    for value, inner in zip(layer.outputs, layer.cls.outputs, strict=True):
        specs = [
            slot_spec(other.cls, slot)
            for other in later
            for slot, read in enumerate(other.inputs)
            if read == value
        ]
        specs += [layout.exports[value]] if value in layout.exports else []
        specs += [layout.state[path] for path, new in layout.new_state.items() if new == value]
        found += [(inner, spec) for spec in specs if isinstance(inner, Value)]
    return found + [(v, spec) for (owner, v), spec in layout.kept.items() if owner == index]


def produced_spec(cls: LayerClass, value: Value, picks) -> Spec:
    """The spec in which an op of a class produces a value."""
    index, position = cls.makers[value]
    return picks["op", cls.name, index].result_spec(position)
