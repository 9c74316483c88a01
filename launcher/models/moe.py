"""A mixture of experts as in GShard (arXiv 2006.16668, section 2.2), in every second layer.

Tokens are routed in groups. Within a group each expert has C slots; a token takes the next free
slot of its best expert, then, if it may, of its second best, and is dropped by an expert that is
full (the residual stream carries it on). First choices of the whole group come before second
choices. Routing is by products with one-hot tensors, so that groups and experts are dims like any
other.

Letters of shapes: B batch, S sequence, H hidden, F features inside an expert; G groups, T tokens of
a group, E experts, C slots of an expert.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from launcher.errors import ConfigError
from launcher.models.kernels import Kernels
from launcher.models.layers import (
    Dropout,
    LayerNorm,
    Precision,
    Weights,
    gelu,
    one_hot,
    softmax,
    spread_last,
    uniform,
)
from launcher.models.sizes import ExpertsSize, MoeSize, capacity
from launcher.models.transformer import (
    STDDEV,
    Attention,
    DenseBlock,
    Embedding,
    residual_stddev,
    token_batch,
)


class Router(nnx.Module):
    """Choose two experts for each token, and a slot in each."""

    def __init__(self, hidden: int, size: ExpertsSize, *, weights: Weights):
        self.size = size
        self.kernel = weights.normal((hidden, size.experts), STDDEV)  # [H, E]
        self.reduce_dtype = weights.precision.reduce
        # What nnx's train() and eval() set.
        self.deterministic = False
        self.key = weights.stream() if size.second_expert == "random" else None

    def __call__(self, x_GTH: Array) -> tuple[Array, Array]:
        """Return the weight of each token in each slot, [G, T, E, C], and the balancing loss."""
        kernel_HE = self.kernel[...].astype(self.reduce_dtype)
        scores_GTE = jnp.einsum("GTH,HE->GTE", x_GTH.astype(self.reduce_dtype), kernel_HE)
        gates_GTE = softmax(scores_GTE)
        first_GTE = _best(gates_GTE)
        second_GTE = _best(gates_GTE * (1.0 - first_GTE))
        aux_loss = _balancing_loss(gates_GTE, first_GTE)

        first_gate_GT = jnp.sum(gates_GTE * first_GTE, axis=-1)
        second_gate_GT = jnp.sum(gates_GTE * second_GTE, axis=-1)
        both_GT = first_gate_GT + second_gate_GT
        first_gate_GT, second_gate_GT = first_gate_GT / both_GT, second_gate_GT / both_GT
        if self.key is not None and not self.deterministic:
            second_GTE = second_GTE * self._drawn(second_gate_GT, second_GTE.shape)

        slots = capacity(self.size, x_GTH.shape[1])
        nobody_GE = jnp.zeros((x_GTH.shape[0], self.size.experts), gates_GTE.dtype)
        first_GTE, first_slot_GT = _queue(first_GTE, nobody_GE, slots)
        second_GTE, second_slot_GT = _queue(second_GTE, jnp.sum(first_GTE, axis=1), slots)
        combine_GTEC = _in_slots(first_gate_GT, first_GTE, first_slot_GT, slots)
        combine_GTEC += _in_slots(second_gate_GT, second_GTE, second_slot_GT, slots)
        return combine_GTEC, aux_loss

    def _drawn(self, second_gate_GT: Array, shape_GTE: tuple[int, ...]) -> Array:
        """Return 1 where the second expert gets the token: always at half of the weight."""
        chance_GT = uniform(self.key[...], second_gate_GT.shape, second_gate_GT.dtype)
        drawn_GT = (chance_GT < 2.0 * second_gate_GT).astype(second_gate_GT.dtype)
        return spread_last(drawn_GT, shape_GTE)


def _best(gates_GTE: Array) -> Array:
    best_GT = lax.argmax(gates_GTE, gates_GTE.ndim - 1, jnp.int32)
    return one_hot(best_GT, gates_GTE.shape[-1], gates_GTE.dtype)


def _balancing_loss(gates_GTE: Array, first_GTE: Array) -> Array:
    """Return GShard's auxiliary loss, scaled to 1 where all experts get the same.

    The share of tokens that an expert gets has no gradient; its mean gate stands in for one factor.
    """
    share_GE = jnp.mean(first_GTE, axis=1)
    mean_gate_GE = jnp.mean(gates_GTE, axis=1)
    return gates_GTE.shape[-1] * jnp.mean(jnp.sum(share_GE * mean_gate_GE, axis=-1))


def _queue(choice_GTE: Array, taken_GE: Array, slots: int) -> tuple[Array, Array]:
    """Queue tokens at their experts, behind those already there.

    Returns the choices without those that found no free slot, and the slot of each token.
    """
    before_GTE = lax.cumsum(choice_GTE, axis=1) - choice_GTE
    place_GTE = before_GTE + lax.broadcast_in_dim(taken_GE, choice_GTE.shape, (0, 2))
    kept_GTE = choice_GTE * (place_GTE < slots).astype(choice_GTE.dtype)
    slot_GT = jnp.sum(place_GTE * kept_GTE, axis=-1)
    return kept_GTE, slot_GT.astype(jnp.int32)


def _in_slots(gate_GT: Array, choice_GTE: Array, slot_GT: Array, slots: int) -> Array:
    """Put each token's gate at its expert and slot."""
    weight_GTE = choice_GTE * spread_last(gate_GT, choice_GTE.shape)
    slot_GTC = one_hot(slot_GT, slots, gate_GT.dtype)
    shape_GTEC = (*choice_GTE.shape, slots)
    return spread_last(weight_GTE, shape_GTEC) * lax.broadcast_in_dim(
        slot_GTC, shape_GTEC, (0, 1, 3)
    )


class Experts(nnx.Module):
    """The feed-forward layer as a mixture of experts; without biases, as in GShard."""

    def __init__(self, size: MoeSize, *, weights: Weights):
        trunk, experts = size.transformer, size.experts
        width = trunk.mlp_factor * trunk.hidden
        self.size = experts
        self.router = Router(trunk.hidden, experts, weights=weights)
        self.up = weights.normal((experts.experts, trunk.hidden, width), STDDEV)  # [E, H, F]
        self.down = weights.normal(
            (experts.experts, width, trunk.hidden), residual_stddev(trunk)
        )  # [E, F, H]
        self.dropout = Dropout(trunk.dropout, weights=weights)
        self.dtype = weights.precision.compute

    def __call__(self, x_BSH: Array) -> tuple[Array, Array]:
        """Return what the experts make of the tokens, and the balancing loss."""
        x_GTH = x_BSH.reshape(-1, self._group_tokens(x_BSH), x_BSH.shape[-1])
        combine_GTEC, aux_loss = self.router(x_GTH)
        dispatch_GTEC = (combine_GTEC > 0.0).astype(self.dtype)
        slots_GECH = jnp.einsum("GTEC,GTH->GECH", dispatch_GTEC, x_GTH)
        inner_EGCF = jnp.einsum("GECH,EHF->EGCF", slots_GECH, self.up[...].astype(self.dtype))
        outer_EGCH = jnp.einsum(
            "EGCF,EFH->EGCH", gelu(inner_EGCF), self.down[...].astype(self.dtype)
        )
        y_GTH = jnp.einsum("GTEC,EGCH->GTH", combine_GTEC.astype(self.dtype), outer_EGCH)
        return self.dropout(y_GTH.reshape(x_BSH.shape)), aux_loss

    def _group_tokens(self, x_BSH: Array) -> int:
        B, S, _ = x_BSH.shape
        group = min(self.size.expert_group_size, B * S)
        if B * S % group:
            raise ConfigError(
                f"groups of {group} tokens do not divide a microbatch of {B} x {S} = {B * S} "
                f"tokens (model.expert_group_size={group}): choose a divisor, or other "
                f"microbatches (parallel.num_microbatches)"
            )
        return group


class ExpertsBlock(nnx.Module):
    """Attention, then the experts, each added to the residual stream."""

    def __init__(self, size: MoeSize, kernels: Kernels, *, weights: Weights):
        self.attention_norm = LayerNorm(size.transformer.hidden, weights=weights)
        self.attention = Attention(size.transformer, kernels, weights=weights)
        self.experts_norm = LayerNorm(size.transformer.hidden, weights=weights)
        self.experts = Experts(size, weights=weights)

    def __call__(self, x_BSH: Array) -> tuple[Array, Array]:
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH))
        y_BSH, aux_loss = self.experts(self.experts_norm(x_BSH))
        return x_BSH + y_BSH, aux_loss


class Moe(nnx.Module):
    """A decoder whose every second block has experts, with its language-modelling loss."""

    def __init__(self, size: MoeSize, kernels: Kernels, precision: Precision, rngs: nnx.Rngs):
        weights = Weights.seeded(rngs, precision)
        self.size, self.loss_chunks = size, kernels.loss_chunks
        self.embedding = Embedding(size.transformer, weights=weights)
        self.blocks = nnx.List(
            [
                ExpertsBlock(size, kernels, weights=weights)
                if index % 2
                else DenseBlock(size.transformer, kernels, weights=weights)
                for index in range(size.transformer.layers)
            ]
        )
        self.final_norm = LayerNorm(size.transformer.hidden, weights=weights)
        self.reduce_dtype = precision.reduce

    def logits(self, tokens_BS: Array) -> Array:
        """Score every token of the vocabulary as the next one at each position.

        Not quite causal: a later token may take the place of an earlier one's second expert.
        """
        return self.embedding.logits(self._trunk(tokens_BS)[0])

    def _trunk(self, tokens_BS: Array) -> tuple[Array, Array]:
        """Return what the logits are made of, and the balancing losses of all blocks, added up."""
        x_BSH = self.embedding(tokens_BS)
        # A running sum, so that one scalar goes from stage to stage and not one for each block.
        # It begins at zero, but at a value of the model: with a literal the first block would be unlike
        # the others, and the planner would have to plan it by itself.
        total_aux_loss = 0.0 * jnp.mean(x_BSH.astype(self.reduce_dtype))
        for block in self.blocks:
            if isinstance(block, ExpertsBlock):
                x_BSH, aux_loss = block(x_BSH)
                total_aux_loss = total_aux_loss + aux_loss
            else:
                x_BSH = block(x_BSH)
        return self.final_norm(x_BSH), total_aux_loss

    def loss(self, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Return the mean cross entropy of the next token plus the weighted balancing loss."""
        x_BSH, total_aux_loss = self._trunk(batch["tokens"])
        text_loss = self.embedding.loss(x_BSH, batch["targets"], self.loss_chunks)
        balance = total_aux_loss / (self.size.transformer.layers // 2)
        loss = text_loss + self.size.experts.aux_loss_weight * balance
        return loss, {"cross_entropy": text_loss, "aux_loss": balance}

    def example_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Describe a batch."""
        return token_batch(batch_size, self.size.transformer.seq_len)
