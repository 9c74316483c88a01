"""GPT: a pre-LN decoder with learned positions."""

import jax
from flax import nnx
from jax import Array

from launcher.models.kernels import Kernels
from launcher.models.layers import LayerNorm, Precision, Weights
from launcher.models.sizes import TransformerSize
from launcher.models.transformer import DenseBlock, Embedding, token_batch


class Gpt(nnx.Module):
    """A GPT decoder with its language-modelling loss."""

    def __init__(
        self, size: TransformerSize, kernels: Kernels, precision: Precision, rngs: nnx.Rngs
    ):
        weights = Weights.seeded(rngs, precision)
        self.size, self.loss_chunks = size, kernels.loss_chunks
        self.embedding = Embedding(size, weights=weights)
        self.blocks = nnx.List(
            [DenseBlock(size, kernels, weights=weights) for _ in range(size.layers)]
        )
        self.final_norm = LayerNorm(size.hidden, weights=weights)

    def logits(self, tokens_BS: Array) -> Array:
        """Score every token of the vocabulary as the next one at each position."""
        return self.embedding.logits(self._trunk(tokens_BS))

    def _trunk(self, tokens_BS: Array) -> Array:
        """Return what the logits are made of."""
        x_BSH = self.embedding(tokens_BS)
        for block in self.blocks:
            x_BSH = block(x_BSH)
        return self.final_norm(x_BSH)

    def loss(self, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Return the mean cross entropy of the next token."""
        x_BSH = self._trunk(batch["tokens"])
        return self.embedding.loss(x_BSH, batch["targets"], self.loss_chunks), {}

    def example_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Describe a batch."""
        return token_batch(batch_size, self.size.seq_len)
