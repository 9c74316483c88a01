"""A user's model with everything that is hard to cut into stages; it shares no code with ours."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx


class Ladder(nnx.Module):
    """Say a word for each word, going down some rungs and up again, as a U-Net does.

    What each rung had on the way down is added on the way up. A boolean and an integer that are made on
    the first rung are read behind the last. The table of words is the head too, and has the name of an
    entry of the batch. `frozen` is read and not trained, and `spare` is not read.
    """

    vocab_size = 11

    def __init__(self, rngs: nnx.Rngs, width: int = 8, rungs: int = 3):
        # Not an nnx.Embed, which computes in float32 whatever its weights are.
        self.words = nnx.Param(rngs.params.normal((self.vocab_size, width)) / width**0.5)
        self.down = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(rungs)])
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.up = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(rungs)])
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.frozen = nnx.Param(1.0 + rngs.params.uniform((width,)))
        self.spare = nnx.Param(rngs.params.normal((3, 5)))

    def loss(self, batch):
        x = self.words[...][batch["words"]]
        is_positive, strongest = x > 0.0, jnp.argmax(x, axis=-1)
        held = []
        for down in self.down:
            held.append(x)
            x = self.dropout(nnx.tanh(down(x)))
        x = self.norm(x)
        for up in self.up:
            x = nnx.tanh(up(x)) + held.pop()
        x = jnp.where(is_positive, x, 0.5 * x)
        x = x * jnp.broadcast_to(jax.lax.stop_gradient(self.frozen[...]), x.shape)
        logits = x @ self.words[...].T
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["says"])
        is_odd = (strongest % 2).astype(losses.dtype)
        right = jnp.mean((jnp.argmax(logits, axis=-1) == batch["says"]).astype(losses.dtype))
        return jnp.mean(losses * (1.0 + 0.5 * is_odd)), {"right": right, "odd": jnp.mean(is_odd)}

    def example_batch(self, batch_size):
        words = jax.ShapeDtypeStruct((batch_size, 4), jnp.int32)
        return {"words": words, "says": words}


def build(rngs, **args):
    return Ladder(rngs, **args)
