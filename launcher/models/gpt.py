"""GPT: a pre-LN decoder with learned positions."""

import jax
from flax import nnx
from jax import Array

from launcher.models.layers import LayerNorm, Precision, Weights, cross_entropy
from launcher.models.sizes import TransformerSize
from launcher.models.transformer import DenseBlock, Embedding, token_batch


class Gpt(nnx.Module):
    """A GPT decoder with its language-modelling loss."""

    def __init__(self, size: TransformerSize, precision: Precision, rngs: nnx.Rngs):
        weights = Weights.seeded(rngs, precision)
        self.size = size
        self.embedding = Embedding(size, weights=weights)
        self.blocks = nnx.List([DenseBlock(size, weights=weights) for _ in range(size.layers)])
        self.final_norm = LayerNorm(size.hidden, weights=weights)

    def logits(self, tokens_BS: Array) -> Array:
        """Score every token of the vocabulary as the next one at each position."""
        x_BSH = self.embedding(tokens_BS)
        for block in self.blocks:
            x_BSH = block(x_BSH)
        return self.embedding.logits(self.final_norm(x_BSH))

    def loss(self, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Return the mean cross entropy of the next token."""
        return cross_entropy(self.logits(batch["tokens"]), batch["targets"]), {}

    def example_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Describe a batch."""
        return token_batch(batch_size, self.size.seq_len)
