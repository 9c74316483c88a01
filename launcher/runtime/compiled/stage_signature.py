"""A stage's mesh of devices, and what everything that its programs exchange looks like from outside."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launcher.autopar.graphs.graph import Value
from launcher.autopar.realized.emit import StageEmitter
from launcher.autopar.sharding.spec import Spec, partial_axes, to_partition_spec
from launcher.runtime.compiled.stage_avals import stage_avals


class StageSignature:
    """Shapes and shardings by the names of the layout.

    Args:
        emitter: the stage's local functions.
        devices: the stage's devices, in row-major order of its mesh.
    """

    def __init__(self, emitter: StageEmitter, devices: Sequence[jax.Device]):
        self.emitter, self.layout, self.logical = emitter, emitter.layout, emitter.mesh
        self.devices = tuple(devices)
        self.mesh = Mesh(
            np.array(devices, dtype=object).reshape(self.logical.shape), self.logical.axis_names
        )
        self.avals = stage_avals(emitter)

    @property
    def whole(self) -> NamedSharding:
        """Every device of the stage holds the whole array."""
        return NamedSharding(self.mesh, PartitionSpec())

    def sharding(self, spec: Spec, rank: int) -> NamedSharding:
        return NamedSharding(self.mesh, to_partition_spec(spec, rank, self.logical.axis_names))

    def param_sharding(self, path: str) -> NamedSharding:
        return self.sharding(self.layout.params[path], self.avals.params[path].ndim)

    def abstract(self, aval, spec: Spec) -> jax.ShapeDtypeStruct:
        leading = tuple(self.logical.shape[axis] for axis in partial_axes(spec))
        shape = (*leading, *aval.shape)
        return jax.ShapeDtypeStruct(
            shape, aval.dtype, sharding=self.sharding(spec, len(aval.shape))
        )

    def abstract_export(self, value: Value) -> jax.ShapeDtypeStruct:
        return self.abstract(self.avals.values[value], self.layout.exports[value])

    def abstract_cotangent(self, value: Value) -> jax.ShapeDtypeStruct:
        return self.abstract(self.avals.values[value], self.layout.cotangents[value])

    def abstracts(self, specs: Mapping, avals: Mapping) -> dict:
        return {k: self.abstract(avals[k], spec) for k, spec in specs.items()}

    def abstract_key(self) -> jax.ShapeDtypeStruct:
        """The random key of a microbatch."""
        return jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=self.whole)

    def partition_specs(self, specs: Mapping, avals: Mapping) -> dict:
        names = self.logical.axis_names
        return {k: to_partition_spec(s, len(avals[k].shape), names) for k, s in specs.items()}

    def shard_map(self, function, in_specs, out_specs, **jit_options):
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return jax.jit(mapped, **jit_options)
