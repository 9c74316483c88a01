"""The compiled HLO has the collectives that were priced, and computes what the function computes."""

import jax
import jax.numpy as jnp
import pytest

from launcher import autopar
from launcher.autopar.whole_graph.sharded_graph import Apply, Loop

NAMES = [
    "mlp-data",
    "mlp-tensor",
    "transformer",
    "transformer-remat",
    "moe",
    "convolutions",
    "scan",
    "while",
]


class TestWhatRunsIsWhatWasPriced:
    @pytest.mark.parametrize("mesh", ["FLAT", "SQUARE", "EIGHT"])
    @pytest.mark.parametrize("name", NAMES)
    def test_audit(self, zoo, name, mesh):
        step, args = zoo.CASES[name]
        mesh = vars(zoo)[mesh]
        sharded = autopar.auto_shard(step, *args, mesh=mesh)
        assert sharded.gap_fraction < 1e-6
        zoo.check_runs_as_priced(step, args, sharded)

    def test_what_a_loop_recomputes_stays_recomputed(self, zoo):
        """XLA would merge the recomputation with the original, and hold what it should not."""
        params, batch = zoo.mlp(2, 32, 64)

        @jax.checkpoint
        def loss(params, batch):
            return zoo.mlp_loss(params, batch)

        def step(params, batches):
            def add(total, batch):
                return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, batch)), None

            start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
            return jax.lax.scan(add, start, batches)[0]

        args = (params, jax.tree.map(lambda leaf: zoo.shape(4, *leaf.shape), batch))
        sharded = autopar.auto_shard(step, *args, mesh=zoo.FLAT)
        zoo.check_runs_as_priced(step, args, sharded)
        (loop,) = (i for i in sharded.solved.sharded.instructions if isinstance(i, Loop))
        ops = [i.op for i in loop.bodies[0].instructions if isinstance(i, Apply)]
        products = [op for op in ops if str(op.primitive) == "dot_general"]
        assert len(products) == 7  # two forward, both again, three backward
        assert sharded.compile(jax.devices()[:4]).as_text().count(" dot(") == len(products)

    @pytest.mark.parametrize("zero", [1, 2, 3])
    def test_audit_with_zero(self, zoo, zero):
        params, batch = zoo.mlp(2, 512, 16)
        options = autopar.IntraOpOptions(zero=zero, batch_axis=0)
        step = zoo.training_step(zoo.mlp_loss)
        sharded = autopar.auto_shard(step, params, batch, mesh=zoo.SQUARE, options=options)
        zoo.check_runs_as_priced(step, (params, batch), sharded)

    def test_half_precision_reductions_are_recognised(self, zoo):
        params, batch = zoo.mlp(2, 512, 16, jnp.bfloat16)
        step = zoo.training_step(zoo.mlp_loss)
        sharded = autopar.auto_shard(step, params, batch, mesh=zoo.FLAT)
        audit = sharded.audit(sharded.compile(jax.devices()[:4]))
        assert audit.agrees, f"\n{audit}"
        assert audit.num_widened > 0

    def test_exact_in_double_precision(self, zoo):
        with jax.enable_x64(True):
            params, batch = zoo.mlp(2, 64, 16, jnp.float64)
            step = zoo.training_step(zoo.mlp_loss)
            sharded = autopar.auto_shard(step, params, batch, mesh=zoo.SQUARE)
            zoo.check_runs_as_priced(step, (params, batch), sharded, tolerance=1e-13)
