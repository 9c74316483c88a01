"""What enters a stage, as its layers ask for it, and the gradients on their way back through them."""

from collections import defaultdict
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.graph import Value, evaluate_op
from launcher.autopar.graphs.layers import LayeredModel
from launcher.autopar.graphs.trace import Role
from launcher.autopar.intra_op.stage_layout import StageLayout
from launcher.autopar.sharding.shards import Ledger, reshard_local
from launcher.autopar.sharding.spec import Spec

Arrays = Mapping


class StageInputs:
    """Local shards of what a stage's programs are given, by role and value of the traced model."""

    def __init__(
        self, model: LayeredModel, layout: StageLayout, mesh: LogicalMesh, ledger: Ledger, *,
        params: Arrays, state: Arrays, batch: Arrays, key_data, imports: Arrays,
    ):  # fmt: skip
        self.model, self.layout, self.mesh, self.ledger = model, layout, mesh, ledger
        self._params, self._state, self._batch, self._imports = params, state, batch, imports
        self._keys = _derive_keys(model, key_data)

    def read(self, role: Role | None, value: Value, spec: Spec) -> jax.Array:
        """The shard of an input under the spec in which a layer takes it."""
        inputs, graph = self.model.traced.inputs, self.model.traced.graph
        match role:
            case Role.RANDOM | Role.CONSTANT:
                return self._keys[value]
            case Role.PARAM:
                return self._params[inputs[value].path]
            case Role.STATE:
                return self._state[inputs[value].path]
            case Role.BATCH:
                shard = self._batch[inputs[value].path]
            case None:
                shard = self._imports[value]
        source = given_spec(self.model, self.layout, role, value)
        return reshard_local(shard, graph.avals[value], source, spec, self.mesh, self.ledger)


def given_spec(
    model: LayeredModel, layout: StageLayout, role: Role | None, value: Value
) -> Spec | None:
    """Where a leaf of the batch or an import lies; the others lie as their readers take them."""
    match role:
        case Role.BATCH:
            return layout.batch[model.traced.inputs[value].path]
        case None:
            return layout.imports[value]
    return None


def _derive_keys(model: LayeredModel, key_data) -> dict[Value, jax.Array]:
    """The random keys of all layers, from the microbatch's key; every device computes them whole."""
    traced = model.traced
    values: dict[Value, jax.Array] = {v: jnp.asarray(a) for v, a in traced.graph.constants.items()}
    values |= {v: key_data for v, i in traced.inputs.items() if i.role is Role.RANDOM}
    for op in model.random_ops:
        operands = [values[o] if isinstance(o, Value) else o.val for o in op.operands]
        values |= dict(zip(op.results, evaluate_op(op, operands), strict=True))
    return values


class Cotangents:
    """Gradients on their way to the layer outputs they belong to, summed in the order they come.

    What later stages sent comes last.
    """

    def __init__(self, external: Arrays):
        self._external = external
        self._internal: dict[Value, list[jax.Array]] = defaultdict(list)

    def add(self, traced_value: Value, shard: jax.Array) -> None:
        self._internal[traced_value].append(shard)

    def total(self, traced_value: Value) -> jax.Array | None:
        """The sum, or None where nothing came."""
        parts = self._internal.pop(traced_value, [])
        if traced_value in self._external:
            parts.append(self._external[traced_value])
        return sum(parts[1:], start=parts[0]) if parts else None


def merge(handed_on: Mapping, returned: Mapping, incoming: Cotangents, outgoing: dict) -> None:
    """Take up the gradients of a layer's inputs: for earlier layers, and for earlier stages."""
    for value, shards in handed_on.items():
        for shard in shards:
            incoming.add(value, shard)
    for value, shards in returned.items():
        for shard in shards:
            known = outgoing.get(value)
            outgoing[value] = shard if known is None else known + shard
