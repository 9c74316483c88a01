"""Rules for ops that work element by element: any dim may be split; linear ones pass partial sums on."""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prim

from launcher.autopar.graph import Op
from launcher.autopar.rules.registry import AxisStrategy, operand_rank, rule
from launcher.autopar.spec import PARTIAL, REPLICATED


def split_any_dim(op: Op) -> Iterator[AxisStrategy]:
    """Split the same dim of every operand and result; scalars stay whole."""
    for dim in range(len(op.eqn.outvars[0].aval.shape)):
        operands = tuple(
            dim if operand_rank(op, i) else REPLICATED for i in range(len(op.operands))
        )
        yield AxisStrategy(operands, (dim,) * len(op.results))


def with_partial(op: Op, *patterns: Sequence[int]) -> Iterator[AxisStrategy]:
    """Add choices with a partial result, one per pattern of partial operands."""
    yield from split_any_dim(op)
    for pattern in patterns:
        yield AxisStrategy(tuple(pattern), (PARTIAL,) * len(op.results))


@rule(
    prim.abs_p, prim.acos_p, prim.acosh_p, prim.and_p, prim.asin_p, prim.asinh_p, prim.atan2_p,
    prim.atan_p, prim.atanh_p, prim.bitcast_convert_type_p, prim.cbrt_p, prim.ceil_p, prim.clamp_p,
    prim.clz_p, prim.cos_p, prim.cosh_p, prim.digamma_p, prim.eq_p, prim.erf_inv_p, prim.erf_p,
    prim.erfc_p, prim.exp2_p, prim.exp_p, prim.expm1_p, prim.floor_p, prim.ge_p, prim.gt_p,
    prim.integer_pow_p, prim.is_finite_p, prim.le_p, prim.lgamma_p, prim.log1p_p, prim.log_p,
    prim.logistic_p, prim.lt_p, prim.max_p, prim.min_p, prim.ne_p, prim.nextafter_p, prim.not_p,
    prim.or_p, prim.population_count_p, prim.pow_p, prim.rem_p, prim.round_p, prim.rsqrt_p,
    prim.shift_left_p, prim.shift_right_arithmetic_p, prim.shift_right_logical_p, prim.sign_p,
    prim.sin_p, prim.sinh_p, prim.sqrt_p, prim.square_p, prim.stop_gradient_p, prim.tan_p,
    prim.tanh_p, prim.xor_p,
)  # fmt: skip
def nonlinear(op: Op) -> Iterator[AxisStrategy]:
    yield from split_any_dim(op)


@rule(prim.neg_p, prim.copy_p, prim.name_p, prim.real_p, prim.imag_p, prim.reduce_precision_p)
def linear_unary(op: Op) -> Iterator[AxisStrategy]:
    yield from with_partial(op, (PARTIAL,))


@rule(prim.convert_element_type_p)
def convert(op: Op) -> Iterator[AxisStrategy]:
    """A cast from float to float keeps a sum a sum; others do not."""
    source, target = op.eqn.invars[0].aval.dtype, op.eqn.outvars[0].aval.dtype
    if jnp.issubdtype(source, jnp.floating) and jnp.issubdtype(target, jnp.floating):
        return with_partial(op, (PARTIAL,))
    return split_any_dim(op)


@rule(prim.add_p, prim.sub_p, prim.add_jaxvals_p)
def sums(op: Op) -> Iterator[AxisStrategy]:
    """A scalar literal could not be made partial: then sums stay whole."""
    if operand_rank(op, 0) == operand_rank(op, 1):
        return with_partial(op, (PARTIAL, PARTIAL))
    return split_any_dim(op)


@rule(prim.mul_p)
def products(op: Op) -> Iterator[AxisStrategy]:
    yield from with_partial(op, (PARTIAL, REPLICATED), (REPLICATED, PARTIAL))


@rule(prim.div_p)
def quotients(op: Op) -> Iterator[AxisStrategy]:
    yield from with_partial(op, (PARTIAL, REPLICATED))


@rule(prim.select_n_p)
def select(op: Op) -> Iterator[AxisStrategy]:
    """The predicate may be a scalar; the cases may be sums."""
    yield from with_partial(op, (REPLICATED, *(PARTIAL,) * (len(op.operands) - 1)))


@rule(lax.optimization_barrier_p)
def barrier(op: Op) -> Iterator[AxisStrategy]:
    """Operands of different shapes pass through side by side: they are held together, so kept whole."""
    del op
    return iter(())
