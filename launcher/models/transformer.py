"""The parts of a decoder that GPT and MoE share: embedding, attention, dense feed-forward layer.

Letters of shapes: B batch, S sequence (T where a key's position), H hidden, N heads, D features of
a head, V vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from launcher.models.cudnn_attention import causal_attention
from launcher.models.kernels import CUDNN, Kernels
from launcher.models.layers import (
    Dropout,
    LayerNorm,
    Linear,
    Weights,
    cross_entropy,
    gelu,
    softmax,
)
from launcher.models.sizes import TransformerSize

# GPT-2's scale of all weights; what is added to the residual stream starts smaller, see
# residual_stddev.
STDDEV = 0.02

# Added to the scores of later positions: their exponential is 0 in every precision.
MASKED = -1e9


def residual_stddev(size: TransformerSize) -> float:
    """Return the scale of the 2 L projections whose sum makes the residual stream."""
    return STDDEV / math.sqrt(2 * size.layers)


def token_batch(batch_size: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Describe a batch of token sequences and, at each position, the token that follows."""
    tokens = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32)
    return {"tokens": tokens, "targets": tokens}


class Embedding(nnx.Module):
    """Tokens to vectors at the start of a decoder, vectors to logits at its end."""

    def __init__(self, size: TransformerSize, *, weights: Weights):
        self.token = weights.normal((size.vocab_size, size.hidden), STDDEV)  # [V, H]
        self.position = weights.normal((size.seq_len, size.hidden), STDDEV)  # [S, H]
        self.head = (
            None
            if size.tied_embeddings
            else weights.normal((size.vocab_size, size.hidden), STDDEV)  # [V, H]
        )
        self.dropout = Dropout(size.dropout, weights=weights)
        self.dtype = weights.precision.compute

    def __call__(self, tokens_BS: Array) -> Array:
        gather = self.token[...].at[tokens_BS]
        x_BSH = gather.get(mode="clip", wrap_negative_indices=False).astype(self.dtype)
        position_SH = lax.slice_in_dim(self.position[...], 0, tokens_BS.shape[1])
        position_BSH = lax.broadcast_in_dim(position_SH.astype(self.dtype), x_BSH.shape, (1, 2))
        return self.dropout(x_BSH + position_BSH)

    def logits(self, x_BSH: Array) -> Array:
        """Score every token of the vocabulary as the next."""
        return _logits(x_BSH, self._table[...])

    def loss(self, x_BSH: Array, targets_BS: Array, num_chunks: int) -> Array:
        """Return the mean cross entropy of the next token.

        In several chunks of the sequence, each of which makes its logits again in the backward pass, so
        that those of one chunk are in memory at a time. Written out and not as a loop, inside which nothing
        would be sharded; cut all at once, so that the chunks are alike; and the gradients of the table are
        added up in its own precision.
        """
        if num_chunks == 1:
            return cross_entropy(self.logits(x_BSH), targets_BS)
        lengths = (x_BSH.shape[1] // num_chunks,) * num_chunks
        chunks = zip(lax.split(x_BSH, lengths, 1), lax.split(targets_BS, lengths, 1), strict=True)
        losses = [_chunk_loss(*chunk, self._table[...]) for chunk in chunks]
        return functools.reduce(jnp.add, losses) / num_chunks

    @property
    def _table(self) -> nnx.Param:
        return self.token if self.head is None else self.head


def _logits(x_BSH: Array, table_VH: Array) -> Array:
    return jnp.einsum("BSH,VH->BSV", x_BSH, table_VH.astype(x_BSH.dtype))


@jax.checkpoint
def _chunk_loss(x_BSH: Array, targets_BS: Array, table_VH: Array) -> Array:
    return cross_entropy(_logits(x_BSH, table_VH), targets_BS)


class Attention(nnx.Module):
    """Causal self-attention with queries, keys and values from one fused projection.

    The features of that projection are ordered head by head, [N, 3, D], so that splitting them over
    devices splits the heads.
    """

    def __init__(self, size: TransformerSize, kernels: Kernels, *, weights: Weights):
        self.heads = size.heads
        self.is_fused = kernels.attention == CUDNN
        self.qkv = Linear(size.hidden, 3 * size.hidden, stddev=STDDEV, weights=weights)
        self.out = Linear(size.hidden, size.hidden, stddev=residual_stddev(size), weights=weights)
        self.score_dropout = Dropout(size.dropout, weights=weights)
        self.out_dropout = Dropout(size.dropout, weights=weights)
        self.dtype = weights.precision.compute
        self.reduce_dtype = weights.precision.reduce

    def __call__(self, x_BSH: Array) -> Array:
        B, S, H = x_BSH.shape
        D = H // self.heads
        fused = self.qkv(x_BSH).reshape(B, S, self.heads, 3 * D)
        q_BSND, k_BSND, v_BSND = (
            lax.slice_in_dim(fused, i * D, (i + 1) * D, axis=3) for i in range(3)
        )
        mix = causal_attention if self.is_fused else self._plain
        y_BSND = mix(q_BSND, k_BSND, v_BSND)
        return self.out_dropout(self.out(y_BSND.reshape(B, S, H)))

    def _plain(self, q_BSND: Array, k_BSND: Array, v_BSND: Array) -> Array:
        """Attend with the scores of all pairs of positions in memory."""
        D = q_BSND.shape[-1]
        # Scaled before the product, which could leave the range of fp16.
        scores_BNST = jnp.einsum("BSND,BTND->BNST", q_BSND * (1.0 / math.sqrt(D)), k_BSND)
        scores_BNST = scores_BNST.astype(self.reduce_dtype)
        probabilities_BNST = softmax(scores_BNST + _causal_bias(scores_BNST)).astype(self.dtype)
        probabilities_BNST = self.score_dropout(probabilities_BNST)
        return jnp.einsum("BNST,BTND->BSND", probabilities_BNST, v_BSND)


def _causal_bias(scores_BNST: Array) -> Array:
    """Return what hides later positions; made anew in each block, so that blocks share no value."""
    S, T = scores_BNST.shape[-2:]
    later = lax.broadcasted_iota(jnp.int32, (S, T), 0) < lax.broadcasted_iota(jnp.int32, (S, T), 1)
    bias_ST = later.astype(scores_BNST.dtype) * MASKED
    return lax.broadcast_in_dim(bias_ST, scores_BNST.shape, (2, 3))


class FeedForward(nnx.Module):
    """The dense feed-forward layer."""

    def __init__(self, size: TransformerSize, *, weights: Weights):
        width = size.mlp_factor * size.hidden
        self.up = Linear(size.hidden, width, stddev=STDDEV, weights=weights)
        self.down = Linear(width, size.hidden, stddev=residual_stddev(size), weights=weights)
        self.dropout = Dropout(size.dropout, weights=weights)

    def __call__(self, x_BSH: Array) -> Array:
        return self.dropout(self.down(gelu(self.up(x_BSH))))


class DenseBlock(nnx.Module):
    """Attention, then the dense feed-forward layer, each added to the residual stream."""

    def __init__(self, size: TransformerSize, kernels: Kernels, *, weights: Weights):
        self.attention_norm = LayerNorm(size.hidden, weights=weights)
        self.attention = Attention(size, kernels, weights=weights)
        self.mlp_norm = LayerNorm(size.hidden, weights=weights)
        self.mlp = FeedForward(size, weights=weights)

    def __call__(self, x_BSH: Array) -> Array:
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH))
        return x_BSH + self.mlp(self.mlp_norm(x_BSH))
