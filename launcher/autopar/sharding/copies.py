"""Which shards of a value the devices hold while a sharded graph runs, and what another reader costs.

A value is produced under one spec. A reader that wants another gets it by resharding steps from the
cheapest shard at hand, and the shards made on the way stay for later readers: what several readers need
is resharded once. The solver may name a spec that a value is brought to before any reader is served
(a gathered copy for two readers that slice it differently): the `via` of a value.

The planner walks through here to price a plan, and the emitter to write it: same steps, same order.
"""

from collections.abc import Sequence

import jax

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.graph import Value
from launcher.autopar.sharding.reshard import Step, reshard, reshard_costs
from launcher.autopar.sharding.spec import Spec


class Copies:
    """The specs under which each value is held."""

    def __init__(self, avals: Sequence[jax.core.ShapedArray], mesh: LogicalMesh):
        self.avals, self.mesh = avals, mesh
        self._held: dict[Value, list[Spec]] = {}

    def put(self, value: Value, spec: Spec) -> None:
        """A value is produced."""
        self._held[value] = [spec]

    def put_more(self, value: Value, spec: Spec) -> None:
        """Another shard of a value is at hand from the start."""
        self._held.setdefault(value, []).append(spec)

    def held(self) -> dict[Value, tuple[Spec, ...]]:
        """The specs under which each value is held by now, in the order in which they came."""
        return {value: tuple(specs) for value, specs in self._held.items()}

    def __contains__(self, value: Value) -> bool:
        return value in self._held

    def steps(self, value: Value, wanted: Spec, via: Spec | None) -> list[Step]:
        """The steps that make a shard of `value` under `wanted` available, by way of `via`; [] if it is."""
        if wanted in self._held[value]:
            return []
        found: list[Step] = []
        if via is not None and via not in self._held[value]:
            found += self._extend(value, via)
        if wanted not in self._held[value]:
            found += self._extend(value, wanted)
        return found

    def _extend(self, value: Value, wanted: Spec) -> tuple[Step, ...]:
        aval, held = self.avals[value], self._held[value]
        shape, itemsize = aval.shape, aval.dtype.itemsize
        costs = reshard_costs(shape, itemsize, self.mesh)
        target = costs.number[wanted]
        nearest = min(held, key=lambda spec: costs.between[costs.number[spec], target])
        steps = reshard(shape, itemsize, nearest, wanted, self.mesh)
        held += [step.target for step in steps if step.target not in held]
        return steps
