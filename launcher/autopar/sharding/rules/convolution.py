"""Rules for convolutions: the batch, the channels, whole groups of channels, and dims without a window.

Where a window reaches over more than one element, a shard would need its neighbours' edge (a halo): such
spatial dims are never split. A dim whose window is one element is like a batch dim, and one that the
kernel covers at a single position is contracted, as in the gradient of such a kernel.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import primitives as prim

from launcher.autopar.graphs.graph import Op
from launcher.autopar.sharding.rules.contraction import BILINEAR
from launcher.autopar.sharding.rules.registry import AxisStrategy, bind_with, local, rule
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED


@rule(prim.conv_general_dilated_p)
def convolution(op: Op) -> Iterator[AxisStrategy]:
    numbers = op.eqn.params["dimension_numbers"]
    batch, feature = numbers.lhs_spec[:2]
    out_feature, in_feature = numbers.rhs_spec[:2]
    result_batch, result_feature = numbers.out_spec[:2]
    feature_groups = op.eqn.params["feature_group_count"]
    batch_groups = op.eqn.params["batch_group_count"]
    if batch_groups == 1:
        yield AxisStrategy((batch, REPLICATED), (result_batch,))
    if feature_groups == 1:
        yield AxisStrategy((feature, in_feature), (PARTIAL,))
    if feature_groups == batch_groups == 1:
        yield AxisStrategy((REPLICATED, out_feature), (result_feature,))
    if feature_groups > 1:
        yield AxisStrategy((feature, out_feature), (result_feature,), pieces=feature_groups)
    if batch_groups > 1:
        yield AxisStrategy((batch, out_feature), (result_feature,), pieces=batch_groups)
    for position in range(len(numbers.lhs_spec) - 2):
        yield from _spatial(op, position)
    yield from BILINEAR


def _spatial(op: Op, position: int) -> Iterator[AxisStrategy]:
    """Ways to split one spatial dim without a halo."""
    params, numbers = op.eqn.params, op.eqn.params["dimension_numbers"]
    lhs_dim, rhs_dim, result_dim = (
        spec[2:][position] for spec in (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
    )
    size = op.eqn.invars[0].aval.shape[lhs_dim]
    kernel = op.eqn.invars[1].aval.shape[rhs_dim]
    stride = params["window_strides"][position]
    is_padded = tuple(params["padding"][position]) != (0, 0)
    if is_padded or params["lhs_dilation"][position] != 1:
        return
    if kernel == 1 and size % stride == 0:  # so that every shard begins where the stride does
        yield AxisStrategy((lhs_dim, REPLICATED), (result_dim,))
    if kernel == size and params["rhs_dilation"][position] == 1:
        yield AxisStrategy((lhs_dim, rhs_dim), (PARTIAL,))


@local(prim.conv_general_dilated_p)
def local_convolution(op, strategy, mesh, values):
    """A shard of the channels holds its share of the groups."""
    grouped = [axis for axis in strategy.axes if axis.pieces]
    shared = strategy.pieces_division(mesh.shape, grouped[0]) if grouped else 1
    changed = {
        name: count // shared
        for name in ("feature_group_count", "batch_group_count")
        if (count := op.eqn.params[name]) > 1
    }
    return lax.platform_dependent(
        *values,
        cpu=lambda *values: (_channels_last(op, values, changed),),
        default=lambda *values: bind_with(op, values, **changed),
    )


def _channels_last(op: Op, values: Sequence[jax.Array], changed: Mapping[str, Any]) -> jax.Array:
    """The same convolution, its dims in the one order that the CPU backend has fast code for.

    That backend brings convolutions into this order itself, but only those that stand in no loop and in no
    call; the others, gradients above all, ran up to 20 times longer (tried with jax 0.10.2).
    """
    lhs, rhs = values
    params = op.eqn.params | changed
    numbers: lax.ConvDimensionNumbers = params["dimension_numbers"]
    (batch, feature, *spatial), (out, into, *window) = numbers.lhs_spec, numbers.rhs_spec
    last = len(spatial) + 1
    result = lax.conv_general_dilated_p.bind(
        lhs.transpose(batch, *spatial, feature),
        rhs.transpose(*window, into, out),
        **params
        | {
            "dimension_numbers": lax.ConvDimensionNumbers(
                lhs_spec=(0, last, *range(1, last)),
                rhs_spec=(last, last - 1, *range(last - 1)),
                out_spec=(0, last, *range(1, last)),
            )
        },
    )
    result_batch, result_feature, *result_spatial = numbers.out_spec
    order = (result_batch, *result_spatial, result_feature)
    return result.transpose([order.index(dim) for dim in range(last + 1)])
