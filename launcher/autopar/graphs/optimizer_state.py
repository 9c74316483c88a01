"""What an optimizer keeps of a parameter, asked of the optimizer itself on shapes.

Left out: scalars (a step count), and optimizers that treat two weights of one shape differently.
"""

from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import optax

from launcher.autopar.graphs.work import aval_bytes


@dataclass(frozen=True, slots=True)
class KeptState:
    """The optimizer's state of one parameter.

    Attributes:
        alike_bytes: tensors of the parameter's shape; they lie as it does, and ZeRO splits them.
        whole_bytes: all others, such as the factors of Adafactor; every device has them whole.
    """

    alike_bytes: int
    whole_bytes: int


@dataclass(frozen=True, slots=True)
class OptimizerFootprint:
    """The memory and the traffic of an optimizer, parameter by parameter."""

    transform: optax.GradientTransformation

    def kept(self, aval) -> KeptState:
        """The state of one parameter; what is no floating-point number is not trained."""
        return _kept(self.transform, tuple(aval.shape), jnp.dtype(aval.dtype))

    def update_bytes(self, aval) -> tuple[int, int]:
        """What an update reads and writes: (split as the state is, whole on every device).

        It reads and writes the parameter and the state, and reads the gradient.
        """
        kept = self.kept(aval)
        return 3 * aval_bytes(aval) + 2 * kept.alike_bytes, 2 * kept.whole_bytes


@lru_cache(maxsize=2**12)
def _kept(transform: optax.GradientTransformation, shape: tuple[int, ...], dtype) -> KeptState:
    if not jnp.issubdtype(dtype, jnp.floating):
        return KeptState(0, 0)
    state = jax.eval_shape(transform.init, {"weight": jax.ShapeDtypeStruct(shape, dtype)})
    leaves = jax.tree.leaves(state)
    alike = [leaf for leaf in leaves if leaf.shape == shape]
    others = [leaf for leaf in leaves if leaf.shape not in (shape, ())]
    return KeptState(sum(map(aval_bytes, alike)), sum(map(aval_bytes, others)))


ADAMW = OptimizerFootprint(optax.adamw(1e-3))
