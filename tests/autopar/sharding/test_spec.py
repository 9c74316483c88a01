"""Specs, and the resharding between them."""

import itertools
import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.sharding.reshard import reshard, reshard_cost, step_cost
from launcher.autopar.sharding.shards import pack, reshard_local
from launcher.autopar.sharding.spec import (
    PARTIAL,
    REPLICATED,
    all_specs,
    fits,
    from_dims,
    local_shape,
    partial_axes,
    to_dims,
    to_partition_spec,
    to_text,
)

R, P = REPLICATED, PARTIAL
MESH = LogicalMesh(shape=(2, 2), alpha=(3.0, 1.0), beta=(1.0, 0.1))
SHAPE, ITEMSIZE = (8, 4), 4


def test_uneven_splits_do_not_fit():
    assert fits((0, 1), (8, 4), (2, 4))
    assert not fits((0, 0), (4, 4), (2, 4))
    assert not fits((1, R), (8,), (2, 4))


def test_all_specs_of_a_matrix():
    assert set(all_specs((8, 3), (2, 1), partial=True)) == {(R, R), (0, R), (P, R)}


def test_a_spec_as_partition_spec_has_a_leading_dim_per_partial_axis():
    assert to_partition_spec((P, 1), 2, MESH.axis_names) == PartitionSpec("data", None, ("tensor",))
    assert to_partition_spec((0, 0), 2, MESH.axis_names)[0] == ("data", "tensor")


@pytest.mark.parametrize("spec", [s for s in all_specs((8, 4), (2, 2))])
def test_dims_and_spec_are_inverse(spec):
    assert from_dims(to_dims(spec, 2, MESH.axis_names), MESH.axis_names) == spec


def test_text_names_only_what_is_not_replicated():
    assert to_text((R, R), MESH.axis_names) == "R"
    assert to_text((0, P), MESH.axis_names) == "data:0 tensor:P"


def test_prices_are_those_of_rings():
    half = 1.0 + 0.1 * ITEMSIZE * math.prod(SHAPE) / 2
    prices = {
        ((R, 0), (R, R)): half,
        ((R, P), (R, R)): 2 * half,
        ((R, P), (R, 1)): half,
        ((R, 0), (R, 1)): (1.0 + half) / 2,
        ((R, R), (0, 1)): 0.0,
    }
    for (source, target), price in prices.items():
        found = reshard_cost(SHAPE, ITEMSIZE, source, target, MESH)
        assert found == pytest.approx(price, rel=1e-12)


def test_a_major_axis_cannot_leave_before_the_minor_one():
    steps = reshard(SHAPE, ITEMSIZE, (0, 0), (R, 0), MESH)
    assert steps[0].axis == 1, steps


def test_paths_are_no_dearer_than_any_detour():
    specs = all_specs(SHAPE, MESH.shape, partial=True)
    for a, b, c in itertools.product(specs, repeat=3):
        direct = reshard_cost(SHAPE, ITEMSIZE, a, c, MESH)
        detour = reshard_cost(SHAPE, ITEMSIZE, a, b, MESH) + reshard_cost(
            SHAPE, ITEMSIZE, b, c, MESH
        )
        assert direct <= detour + 1e-9


def test_the_steps_add_up_to_the_price():
    for source, target in itertools.product(all_specs(SHAPE, MESH.shape, partial=True), repeat=2):
        steps = reshard(SHAPE, ITEMSIZE, source, target, MESH)
        total = sum(step_cost(step, MESH) for step in steps)
        assert total == pytest.approx(reshard_cost(SHAPE, ITEMSIZE, source, target, MESH))
        assert (steps[-1].target if steps else source) == target


def test_every_resharding_moves_the_right_elements():
    """From replicated to each spec, from there to each other one, and back to the whole."""
    whole = np.arange(math.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    specs = all_specs(SHAPE, MESH.shape, partial=True)
    aval = jax.core.ShapedArray(SHAPE, np.float32)
    devices = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), MESH.axis_names)

    def on_device(array):
        outcomes = []
        for source, target in itertools.product(specs, repeat=2):
            shard = reshard_local(array, aval, (R, R), source, MESH)
            shard = reshard_local(shard, aval, source, target, MESH)
            assert shard.shape == local_shape(target, SHAPE, MESH.shape)
            outcomes.append(reshard_local(shard, aval, target, (R, R), MESH))
        return outcomes

    spec = PartitionSpec()
    run = jax.shard_map(on_device, mesh=devices, in_specs=spec, out_specs=spec, check_vma=False)
    for found in jax.jit(run)(whole):
        np.testing.assert_array_equal(found, whole)


def test_a_packed_partial_shard_leaves_shard_map_as_summands():
    devices = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), MESH.axis_names)
    spec, aval = (P, 1), jax.core.ShapedArray(SHAPE, np.float32)
    run = jax.shard_map(
        lambda x: pack(reshard_local(x, aval, (R, R), spec, MESH), spec),
        mesh=devices, in_specs=PartitionSpec(), out_specs=to_partition_spec(spec, 2, MESH.axis_names),
        check_vma=False,
    )  # fmt: skip
    whole = np.arange(math.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    summands = jax.jit(run)(whole)
    assert summands.shape == (2, *SHAPE)
    assert len(partial_axes(spec)) == 1
    np.testing.assert_array_equal(summands.sum(axis=0), whole)
