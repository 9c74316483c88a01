"""Causal attention by cuDNN's fused kernel, which never writes the scores of all pairs of positions.

`jax.nn.dot_product_attention(implementation="cudnn")` asks for cuDNN's version before it traces, so a
model with it could be planned only where there is a GPU. `causal_attention` therefore calls the function
that it calls next, which is private to JAX (written against jax 0.10.2); tests compare the two traces.

A CPU, on which plans are rehearsed, has no such kernel: there the forward and the backward call compute
the formulas of attention in at least fp32 (Dao 2023, "FlashAttention-2", section 2.3, without its
tiles), on the same operands and so under the same shardings. Left out there is what this module never
asks for: bias, dropout, lengths, packed and paged sequences.

Letters of shapes: B batch, S sequence (T where a key's position), N heads, D features of a head.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.interpreters import mlir

from launcher.errors import UnsupportedPrimitiveError
from launcher.models.layers import at_least_fp32

# What is planned for where there is no cuDNN: JAX asks no kind of GPU for a later one.
_PLANNED_VERSION = 91100
_SEED = 0  # of the dropout that is not asked for


def causal_attention(q_BSND: Array, k_BTND: Array, v_BTND: Array) -> Array:
    """Attend to the same and to earlier positions, with scores over the root of D."""
    version = _PLANNED_VERSION if cudnn.cuda_versions is None else cudnn.check_cudnn_version()
    unused = jnp.zeros(0, q_BSND.dtype)  # bias, two lengths, two tables of offsets, two of pages
    return cudnn._dot_product_attention(
        q_BSND, k_BTND, v_BTND, *(unused,) * 7,
        1.0 / math.sqrt(q_BSND.shape[-1]), _SEED, 0.0, (False, False), cudnn.MaskType.CAUSAL,
        cudnn.AttentionLayout.BTNH.value, None, version, False,
    )  # fmt: skip


def _forward_on_cpu(q_BSND, k_BTND, v_BTND, *unused, scale, is_training, **params):
    """The output and, in training, the logarithm of each row's sum of exponentials."""
    _check_is_ours(unused, params)
    query, key, value = _widened(q_BSND, k_BTND, v_BTND)
    scores_BNST = _scores(query, key, scale)
    log_total_BNS = jax.nn.logsumexp(scores_BNST, axis=-1)
    probabilities_BNST = jnp.exp(scores_BNST - log_total_BNS[..., None])
    y_BSND = jnp.einsum("BNST,BTND->BSND", probabilities_BNST, value).astype(q_BSND.dtype)
    return (y_BSND, log_total_BNS.astype(jnp.float32)) if is_training else (y_BSND,)


def _backward_on_cpu(q_BSND, k_BTND, v_BTND, *rest, scale, **params):
    """The gradients of queries, keys and values, from what the forward call left."""
    *unused, log_total_BNS, y_BSND, dy_BSND = rest
    _check_is_ours(unused, params)
    query, key, value, y, dy = _widened(q_BSND, k_BTND, v_BTND, y_BSND, dy_BSND)
    probabilities_BNST = jnp.exp(_scores(query, key, scale) - log_total_BNS[..., None])
    dprobabilities_BNST = jnp.einsum("BSND,BTND->BNST", dy, value)
    inner_BNS = jnp.einsum("BSND,BSND->BNS", dy, y)
    dscores_BNST = probabilities_BNST * (dprobabilities_BNST - inner_BNS[..., None]) * scale
    return (
        jnp.einsum("BNST,BTND->BSND", dscores_BNST, key).astype(q_BSND.dtype),
        jnp.einsum("BNST,BSND->BTND", dscores_BNST, query).astype(k_BTND.dtype),
        jnp.einsum("BNST,BSND->BTND", probabilities_BNST, dy).astype(v_BTND.dtype),
    )


def _widened(*arrays: Array) -> list[Array]:
    return [x.astype(at_least_fp32(x.dtype)) for x in arrays]


def _scores(query: Array, key: Array, scale: float) -> Array:
    """Score every pair of positions, later keys with minus infinity."""
    scores_BNST = jnp.einsum("BSND,BTND->BNST", query, key) * scale
    position, place = (lax.broadcasted_iota(jnp.int32, scores_BNST.shape, dim) for dim in (2, 3))
    return lax.select(position < place, jnp.full_like(scores_BNST, -jnp.inf), scores_BNST)


def _check_is_ours(unused: Sequence[Array], params: Mapping[str, Any]) -> None:
    """The formulas cover the calls of `causal_attention`, and not all that cuDNN can do."""
    mask, dropout = params["mask_type"].name, params["dropout_rate"]
    if mask != "CAUSAL" or dropout or any(operand.size for operand in unused):
        raise UnsupportedPrimitiveError(
            f"the model calls cuDNN's attention with {mask} mask, dropout {dropout} and "
            f"{sum(operand.size > 0 for operand in unused)} operands beside queries, keys and values; "
            f"on a CPU (runtime=emulate) only CAUSAL, 0.0 and 0 can be rehearsed: write that attention "
            f"with plain operators, or run it on GPUs"
        )


mlir.register_lowering(
    cudnn._dot_product_attention_fwd_p,
    mlir.lower_fun(_forward_on_cpu, multiple_results=True),
    platform="cpu",
)
mlir.register_lowering(
    cudnn._dot_product_attention_bwd_p,
    mlir.lower_fun(_backward_on_cpu, multiple_results=True),
    platform="cpu",
)
