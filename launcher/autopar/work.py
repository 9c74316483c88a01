"""How much an op does: floating-point operations and bytes moved, from its shapes alone."""

import math
from functools import lru_cache

from jax.extend.core import ClosedJaxpr, Literal, jaxprs_in_params
from jax.extend.core import primitives as prim

from launcher.autopar.graph import CALLS, Op, from_jaxpr

_MULTIPLY_ADD = 2  # a fused multiply-add counts as two operations, as everybody counts


@lru_cache(maxsize=2**16)
def op_flops(op: Op) -> float:
    """Operations of the matrix products and convolutions; loops count their body once per trip."""
    match op.primitive:
        case prim.dot_general_p:
            (contract, _), _ = op.eqn.params["dimension_numbers"]
            lhs = op.eqn.invars[0].aval.shape
            contracted = math.prod(lhs[dim] for dim in contract)
            return _MULTIPLY_ADD * contracted * math.prod(op.eqn.outvars[0].aval.shape)
        case prim.conv_general_dilated_p:
            return _convolution_flops(op)
        case prim.scan_p:
            return op.eqn.params["length"] * _inner_flops(op)
        case prim.custom_jvp_call_p | prim.custom_vjp_call_p | prim.remat_p:
            return _inner_flops(op)
        case prim.while_p | prim.cond_p:
            return _inner_flops(op)
    return 0.0


def _convolution_flops(op: Op) -> float:
    """Each output element sums over the kernel and the input channels of its group.

    Zeros that a dilated input is stretched with are no work: the gradient of a strided convolution costs
    what the convolution costs.
    """
    numbers = op.eqn.params["dimension_numbers"]
    kernel = op.eqn.invars[1].aval.shape
    stretched = math.prod(op.eqn.params["lhs_dilation"])
    dims = (numbers.rhs_spec[1], *numbers.rhs_spec[2:])
    products = math.prod(kernel[dim] for dim in dims)
    return _MULTIPLY_ADD * products * math.prod(op.eqn.outvars[0].aval.shape) / stretched


def _inner_flops(op: Op) -> float:
    """Operations of the op's inner jaxprs; of the most expensive one for a branch."""
    totals = []
    for inner in jaxprs_in_params(op.eqn.params):
        graph = from_jaxpr(ClosedJaxpr(inner, [None] * len(inner.constvars)), inline=CALLS)
        totals.append(sum(op_flops(inner_op) for inner_op in graph.ops))
    if not totals:
        return 0.0
    return max(totals) if op.primitive is prim.cond_p else sum(totals)


def aval_bytes(aval) -> int:
    """Bytes of an array; a typed random key counts as its data."""
    return math.prod(aval.shape) * aval.dtype.itemsize


def result_bytes(op: Op) -> int:
    return sum(aval_bytes(var.aval) for var in op.eqn.outvars)


def operand_bytes(op: Op) -> int:
    return sum(aval_bytes(a.aval) for a in op.eqn.invars if not isinstance(a, Literal))
