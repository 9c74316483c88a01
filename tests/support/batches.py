"""Batches of random numbers, for whatever a model reads."""

import jax.numpy as jnp
import numpy as np


def draw_batch(model, batch_size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw what `example_batch` describes; integers are below the size of the vocabulary, or 10."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, model.vocab_size or 10, leaf.shape).astype(leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.integer)
        else rng.normal(size=leaf.shape).astype(leaf.dtype)
        for name, leaf in model.example_batch(batch_size).items()
    }
