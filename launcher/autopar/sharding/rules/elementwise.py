"""Rules for ops that work element by element: any dim may be split; linear ones pass partial sums on."""

import itertools
import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prim

from launcher.autopar.graphs.graph import Op
from launcher.autopar.sharding.rules.registry import AxisStrategy, local, rule
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED, Shape

# A barrier over several values whose independent choices are more than this splits them alike.
_MAX_BARRIER_CHOICES = 32


def entry_along(dim: int, shape: Shape, target: Shape) -> int:
    """What splitting a dim of the result does to an operand: scalars and stretched dims stay whole."""
    return dim if len(shape) == len(target) and shape[dim] == target[dim] else REPLICATED


def split_any_dim(op: Op) -> Iterator[AxisStrategy]:
    """Split the same dim of every operand and result."""
    target = op.eqn.outvars[0].aval.shape
    for dim in range(len(target)):
        operands = tuple(entry_along(dim, atom.aval.shape, target) for atom in op.eqn.invars)
        yield AxisStrategy(operands, (dim,) * len(op.results))


def with_partial(op: Op, *patterns: Sequence[int]) -> Iterator[AxisStrategy]:
    """Add choices with a partial result, one per pattern of partial operands."""
    yield from split_any_dim(op)
    for pattern in patterns:
        yield AxisStrategy(tuple(pattern), (PARTIAL,) * len(op.results))


@rule(
    prim.abs_p, prim.acos_p, prim.acosh_p, prim.and_p, prim.asin_p, prim.asinh_p, prim.atan2_p,
    prim.atan_p, prim.atanh_p, prim.bessel_i0e_p, prim.bessel_i1e_p, prim.cbrt_p, prim.ceil_p,
    prim.clamp_p, prim.clz_p, prim.cos_p, prim.cosh_p, prim.digamma_p, prim.eq_p, prim.eq_to_p,
    prim.erf_inv_p, prim.erf_p, prim.erfc_p, prim.exp2_p, prim.exp_p, prim.expm1_p, prim.floor_p,
    prim.ge_p, prim.gt_p, prim.igamma_grad_a_p, prim.igamma_p, prim.igammac_p, prim.integer_pow_p,
    prim.is_finite_p, prim.le_p, prim.le_to_p, prim.lgamma_p, prim.log1p_p, prim.log_p,
    prim.logistic_p, prim.lt_p, prim.lt_to_p, prim.max_p, prim.min_p, prim.ne_p,
    prim.nextafter_p, prim.not_p, prim.or_p, prim.polygamma_p, prim.population_count_p, prim.pow_p,
    prim.regularized_incomplete_beta_p, prim.rem_p, prim.round_p, prim.rsqrt_p, prim.shift_left_p,
    prim.shift_right_arithmetic_p, prim.shift_right_logical_p, prim.sign_p, prim.sin_p, prim.sinh_p,
    prim.sqrt_p, prim.square_p, prim.tan_p, prim.tanh_p, prim.xor_p, prim.zeta_p,
)  # fmt: skip
def nonlinear(op: Op) -> Iterator[AxisStrategy]:
    yield from split_any_dim(op)


@rule(
    prim.neg_p, prim.copy_p, prim.name_p, prim.real_p, prim.imag_p, prim.conj_p,
    prim.stop_gradient_p, "zeros_like",
)  # fmt: skip
def linear_unary(op: Op) -> Iterator[AxisStrategy]:
    yield from with_partial(op, (PARTIAL,))


@rule(prim.sharding_constraint_p)
def annotated(op: Op) -> Iterator[AxisStrategy]:
    """A model's own sharding annotations advise another partitioner; here they are the identity."""
    yield from with_partial(op, (PARTIAL,))


@rule(prim.reduce_precision_p)
def reduce_precision(op: Op) -> Iterator[AxisStrategy]:
    """Rounding the summands is as good as rounding the sum, down to 16 bits, as for a cast."""
    params = op.eqn.params
    is_narrow = params["mantissa_bits"] < jnp.finfo(jnp.bfloat16).nmant
    return split_any_dim(op) if is_narrow else with_partial(op, (PARTIAL,))


@rule(prim.convert_element_type_p)
def convert(op: Op) -> Iterator[AxisStrategy]:
    """A cast between floats keeps a sum a sum up to rounding; integers round or wrap otherwise."""
    source, target = op.eqn.invars[0].aval.dtype, op.eqn.outvars[0].aval.dtype
    if jnp.issubdtype(source, jnp.inexact) and jnp.issubdtype(target, jnp.inexact):
        return with_partial(op, (PARTIAL,))
    return split_any_dim(op)


@rule(prim.bitcast_convert_type_p)
def bitcast(op: Op) -> Iterator[AxisStrategy]:
    """Where the width changes, the last dim of the wider type appears or goes."""
    ranks = (len(op.eqn.invars[0].aval.shape), len(op.eqn.outvars[0].aval.shape))
    for dim in range(min(ranks)):
        yield AxisStrategy((dim,), (dim,))


@rule(prim.add_p, prim.sub_p, prim.add_jaxvals_p, prim.complex_p)
def sums(op: Op) -> Iterator[AxisStrategy]:
    """Linear in both operands together: what is added to a sum must be a sum itself."""
    yield from with_partial(op, (PARTIAL, PARTIAL))


@rule(prim.mul_p)
def products(op: Op) -> Iterator[AxisStrategy]:
    yield from with_partial(op, (PARTIAL, REPLICATED), (REPLICATED, PARTIAL))


@rule(prim.div_p)
def quotients(op: Op) -> Iterator[AxisStrategy]:
    """Integer division rounds, and is not linear."""
    if jnp.issubdtype(op.eqn.outvars[0].aval.dtype, jnp.inexact):
        return with_partial(op, (PARTIAL, REPLICATED))
    return split_any_dim(op)


@rule(prim.select_n_p)
def select(op: Op) -> Iterator[AxisStrategy]:
    """The predicate may be a scalar; the cases may be sums."""
    yield from with_partial(op, (REPLICATED, *(PARTIAL,) * (len(op.operands) - 1)))


@rule(lax.optimization_barrier_p, prim.device_put_p)
def side_by_side(op: Op) -> Iterator[AxisStrategy]:
    """Values pass through beside one another, each as it is.

    Independent choices multiply, so many values are all split at the same dim instead, as far as they
    have it.
    """
    ranks = [len(atom.aval.shape) for atom in op.eqn.invars]
    if math.prod(rank + 2 for rank in ranks) <= _MAX_BARRIER_CHOICES:
        entries = [(REPLICATED, PARTIAL, *range(rank)) for rank in ranks]
        choices = itertools.product(*entries)
    else:
        dims = (PARTIAL, *range(max(ranks, default=0)))
        choices = (tuple(d if d < rank else REPLICATED for rank in ranks) for d in dims)
    for choice in choices:
        yield AxisStrategy(choice, choice)


@local(prim.device_put_p, prim.sharding_constraint_p)
def identity(op, strategy, mesh, values):
    """Where values lie is the plan's business."""
    del op, strategy, mesh
    return tuple(values)
