"""How much an op does: floating-point operations, bytes moved, elements, from its shapes alone."""

import math
from functools import lru_cache, partial

from jax.extend.core import ClosedJaxpr, Literal, jaxprs_in_params
from jax.extend.core import primitives as prim

from launcher.autopar.graphs.graph import CALLS, Op, from_jaxpr

_MULTIPLY_ADD = 2  # a fused multiply-add counts as two operations, as everybody counts


@lru_cache(maxsize=2**16)
def op_flops(op: Op) -> float:
    """Operations of the matrix products and convolutions; loops count their body once per trip.

    Left out: factorisations and Fourier transforms, which are priced by their bytes.
    """
    named = _BY_NAME.get(str(op.primitive))
    if named is not None:
        return named(op)
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


def is_kernel_gradient(op: Op) -> bool:
    """Whether a convolution slides a large window over few places: images over their cotangents."""
    numbers = op.eqn.params["dimension_numbers"]
    window = math.prod(op.eqn.invars[1].aval.shape[dim] for dim in numbers.rhs_spec[2:])
    return window > math.prod(op.eqn.outvars[0].aval.shape[dim] for dim in numbers.out_spec[2:])


def _ragged_flops(op: Op) -> float:
    """Every row meets the matrix of its own group only."""
    numbers = op.eqn.params["ragged_dot_dimension_numbers"]
    (contract, _), _ = numbers.dot_dimension_numbers
    lhs, result = op.eqn.invars[0].aval.shape, op.eqn.outvars[0].aval.shape
    is_by_group = any(dim in contract for dim in numbers.lhs_ragged_dimensions)
    one_result = result[1:] if is_by_group else result
    return _MULTIPLY_ADD * math.prod(lhs[dim] for dim in contract) * math.prod(one_result)


def _attention_flops(op: Op, over_keys: int, over_values: int) -> float:
    """Products of queries and keys, and of weights and values; masked ones count, as everybody counts."""
    query, key, value = (atom.aval.shape for atom in op.eqn.invars[:3])
    is_heads_first = op.eqn.params["layout"] == 1
    batch, heads, length = query[0], query[1 + (not is_heads_first)], query[1 + is_heads_first]
    widths = over_keys * key[3] + over_values * value[3]
    return _MULTIPLY_ADD * batch * heads * length * key[1 + is_heads_first] * widths


# By name, because JAX does not export these primitives.
_BY_NAME = {
    "ragged_dot_general": _ragged_flops,
    "dot_product_attention_fwd_wrapper": partial(_attention_flops, over_keys=1, over_values=1),
    # Scores again; gradients of queries, keys, weights and values.
    "dot_product_attention_bwd_wrapper": partial(_attention_flops, over_keys=3, over_values=2),
}


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


ARITHMETIC, DIVISION, TRANSCENDENTAL = "arithmetic", "division", "transcendental"
REDUCTION, TRANSPOSITION = "reduction", "transposition"
KINDS = (ARITHMETIC, DIVISION, TRANSCENDENTAL, REDUCTION, TRANSPOSITION)
"""Kinds of ops that are no products, by what an element of theirs costs."""
PRODUCT, BATCHED_PRODUCT, CONVOLUTION = "product", "batched_product", "convolution"
WORK = (PRODUCT, BATCHED_PRODUCT, CONVOLUTION, *KINDS)
"""Classes of work: products, of which those with a batch are a class of their own, and all kinds."""

_BY_KIND = {
    None: "reshape broadcast_in_dim squeeze expand_dims iota copy stop_gradient slice split "
    "optimization_barrier random_wrap random_unwrap",
    DIVISION: "div rem sqrt rsqrt integer_pow",
    TRANSCENDENTAL: "exp exp2 expm1 log log1p tanh logistic erf erf_inv erfc pow sin cos tan atan2 cbrt",
    REDUCTION: "argmax argmin cumsum cumprod cummax cummin cumlogsumexp",
    TRANSPOSITION: "transpose gather concatenate pad rev dynamic_slice dynamic_update_slice sort",
}
_KIND_OF = {name: kind for kind, names in _BY_KIND.items() for name in names.split()}
_KINDS_BY_PREFIX = {"reduce": REDUCTION, "scatter": TRANSPOSITION}


def op_kind(op: Op) -> str | None:
    """What kind an op is that is no product; None for one that costs nothing by itself."""
    name = str(op.primitive)
    for prefix, kind in _KINDS_BY_PREFIX.items():
        if name.startswith(prefix):
            return kind
    return _KIND_OF.get(name, ARITHMETIC)


def work_class(op: Op) -> str | None:
    """Which of `WORK` an op is; None for one that costs nothing by itself."""
    if op.primitive is prim.conv_general_dilated_p:
        return CONVOLUTION
    if op_flops(op):
        return BATCHED_PRODUCT if num_batches(op) > 1 else PRODUCT
    return op_kind(op)


def num_elements(op: Op) -> int:
    """Elements that an op goes through: those that a reduction reads, or any other op makes."""
    if op_kind(op) == REDUCTION:
        sizes = (math.prod(a.aval.shape) for a in op.eqn.invars if not isinstance(a, Literal))
    else:
        sizes = (math.prod(var.aval.shape) for var in op.eqn.outvars)
    return max(sizes, default=0)


def num_batches(op: Op) -> int:
    """Products that a batched product consists of."""
    if op.primitive is not prim.dot_general_p:
        return 1
    _, (batch, _) = op.eqn.params["dimension_numbers"]
    lhs = op.eqn.invars[0].aval.shape
    return math.prod(lhs[dim] for dim in batch)
