"""Rules for ops that every device computes whole.

Random bits are generated in full, whatever the plan, and sliced afterwards: so every plan draws the same.
Loops and branches are whole for now; their bodies are priced by `work`, times the trip count.
"""

from collections.abc import Iterator

from jax.extend.core import primitives as prim

from launcher.autopar.graphs.graph import Op
from launcher.autopar.sharding.rules.registry import AxisStrategy, rule


@rule(
    prim.random_bits_p, prim.random_fold_in_p, prim.random_seed_p, prim.random_split_p,
    prim.random_gamma_p, "random_wrap", "random_unwrap", "random_clone", prim.threefry2x32_p,
    prim.rng_bit_generator_p, prim.rng_uniform_p,
)  # fmt: skip
@rule(prim.scan_p, prim.while_p, prim.cond_p, "platform_index")
@rule(prim.linear_solve_p, prim.empty2_p)
def whole(op: Op) -> Iterator[AxisStrategy]:
    del op
    return iter(())
