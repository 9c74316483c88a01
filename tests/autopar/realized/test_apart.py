"""Calls that take turns wait for the collectives of their own program, and for no others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.clusters.mesh import logical_mesh
from launcher.autopar.realized.apart import Turns
from launcher.autopar.sharding.shards import Ledger, reshard_local

SPLIT, WHOLE = (0, -1), (-1, -1)


@pytest.fixture(scope="module")
def mesh():
    return logical_mesh(load_cluster("cpu8"), hosts=1, devices=2, data=2)


def test_programs_that_are_traced_side_by_side_do_not_mix(mesh):
    ledger = Ledger()
    one, other = Turns(ledger.of_program()), Turns(ledger.of_program())
    aval = jax.core.ShapedArray((4,), np.dtype(np.float32))
    waits = []

    def gathers_first(shard):
        gathered = reshard_local(shard, aval, SPLIT, WHOLE, mesh, one.ledger)
        waits.append(jax.make_jaxpr(lambda: other.call(lambda: jnp.zeros(())))())
        return one.call(lambda: gathered + 1)

    devices = np.array(jax.devices()[:2]).reshape(2, 1)
    grid = jax.sharding.Mesh(devices, mesh.axis_names)
    spec = jax.sharding.PartitionSpec(mesh.axis_names[0])
    function = jax.shard_map(
        gathers_first, mesh=grid, in_specs=spec, out_specs=jax.P(), check_vma=False
    )
    text = str(jax.make_jaxpr(function)(np.arange(4, dtype=np.float32)))
    assert text.index("all_gather") < text.index("convert_element_type") < text.index("in_turn")
    assert "convert_element_type" not in str(waits[0])  # nothing of the first one's
    assert [c.kind for c in ledger.collectives] == ["all-gather"]
    np.testing.assert_array_equal(jax.jit(function)(np.arange(4.0, dtype=np.float32)), [1, 2, 3, 4])
