"""Plans that everybody knows, and objectives that can be computed by hand."""

from collections import Counter

import jax
import jax.numpy as jnp
import optax
import pytest

from launcher import autopar


class TestKnownAnswers:
    def test_a_large_batch_becomes_data_parallel(self, zoo):
        params, batch = zoo.mlp(3, 4096, 16)
        sharded = autopar.auto_shard(zoo.training_step(zoo.mlp_loss), params, batch, mesh=zoo.FLAT)
        assert zoo.kinds(sharded) == {"all-reduce": 7}  # three weights, three biases, the loss
        gradients = 3 * (2 * 3 + 2 * 0.75 * 4 * 16 * 16) + 3 * (2 * 3 + 2 * 0.75 * 4 * 16)
        assert sharded.objective == pytest.approx(gradients + 2 * 3 + 2 * 0.75 * 4)
        assert sharded.in_specs[1][0] == jax.sharding.PartitionSpec(("axis0",), None)

    def test_its_gradients_are_reduced_by_one_combined_all_reduce(self, zoo):
        params, batch = zoo.mlp(3, 4096, 16)
        sharded = autopar.auto_shard(zoo.training_step(zoo.mlp_loss), params, batch, mesh=zoo.FLAT)
        text = sharded.compile(jax.devices()[:4]).as_text()
        assert sum(" all-reduce(" in line for line in text.splitlines()) <= 2

    def test_a_small_batch_alternates_columns_and_rows(self, zoo):
        params, batch = zoo.mlp(2, 4, 512)
        sharded = autopar.auto_shard(zoo.training_step(zoo.mlp_loss), params, batch, mesh=zoo.FLAT)
        assert zoo.kinds(sharded, 1000) == {"all-reduce": 1}
        column, row = (specs["w"] for specs in sharded.in_specs[0])
        assert column == jax.sharding.PartitionSpec(None, ("axis0",))
        assert row == jax.sharding.PartitionSpec(("axis0",), None)

    @pytest.mark.parametrize("layers", [1, 2, 4])
    def test_a_transformer_layer_finds_megatrons_four_all_reduces(self, zoo, layers):
        """Two forward and two backward; the first layer's input needs no gradient, which saves one."""
        step, params, batch = zoo.transformer(layers, 2)
        sharded = autopar.auto_shard(step, params, batch, mesh=zoo.FLAT)
        assert zoo.kinds(sharded) == {"all-reduce": 4 * layers - 1}

    def test_recomputation_reduces_again_what_it_needs(self, zoo):
        """Of a layer's two forward reductions, nothing reads the recomputed second."""
        step, params, batch = zoo.transformer(4, 2, remat=True)
        sharded = autopar.auto_shard(step, params, batch, mesh=zoo.FLAT)
        assert zoo.kinds(sharded) == {"all-reduce": 4 * 4 - 1 + 4}

    def test_experts_are_split_and_exchange_four_times_a_layer(self, zoo):
        step, params, batch = zoo.moe(1)
        sharded = autopar.auto_shard(step, params, batch, mesh=zoo.FLAT)
        exchanged = 4 * 8 * 8 * 64 * 8 // 4  # experts x groups x hidden x capacity of a device
        assert zoo.kinds(sharded, exchanged) == {"all-to-all": 4}
        specs = sharded.in_specs[0]["layers"][0]
        assert specs["up"] == specs["down"] == jax.sharding.PartitionSpec(("axis0",), None, None)

    def test_data_parallelism_goes_on_the_slow_axis(self, zoo):
        mesh = autopar.LogicalMesh(shape=(2, 4), alpha=(1.0, 1.0), beta=(1.0, 0.01))
        step, params, batch = zoo.transformer(1, 2, length=1024, hidden=64)
        sharded = autopar.auto_shard(step, params, batch, mesh=mesh)
        first, second = sharded.mesh.axis_names
        slow = [c for c in sharded.collectives if c.axis == first]
        weights = {4 * 64 * n * 64 // k for n in (1, 3, 4) for k in (1, 4)}
        assert {c.num_bytes for c in slow} <= weights | {4}
        assert first in zoo.axes_of(sharded.in_specs[1][0])
        weights = jax.tree.leaves(sharded.in_specs[0])
        assert all(first not in zoo.axes_of(spec) for spec in weights)
        assert any(second in zoo.axes_of(spec) for spec in weights)

    def test_zero_2_scatters_gradients_and_gathers_parameters(self, zoo):
        params, batch = zoo.mlp(3, 4096, 16)
        optimizer = optax.adam(1e-3)
        state = jax.eval_shape(optimizer.init, params)
        step = zoo.training_step(zoo.mlp_loss, optimizer)
        plain = autopar.auto_shard(step, params, state, batch, mesh=zoo.FLAT)
        options = autopar.IntraOpOptions(zero=2)
        sharded = autopar.auto_shard(step, params, state, batch, mesh=zoo.FLAT, options=options)
        assert zoo.kinds(plain, 64) == {"all-reduce": 6}
        assert zoo.kinds(sharded, 64) == {"reduce-scatter": 6, "all-gather": 6}
        assert sharded.objective == pytest.approx(plain.objective)
        assert all(
            spec["w"] != jax.sharding.PartitionSpec(None, None)
            for spec in sharded.in_specs[1][0].mu
        )
        assert all(s["w"] == jax.sharding.PartitionSpec(None, None) for s in sharded.in_specs[0])
        assert sharded.peak_bytes_per_device < plain.peak_bytes_per_device

    def test_zero_3_shards_the_parameters(self, zoo):
        params, batch = zoo.mlp(3, 4096, 16)
        options = autopar.IntraOpOptions(zero=3)
        step = zoo.training_step(zoo.mlp_loss)
        sharded = autopar.auto_shard(step, params, batch, mesh=zoo.FLAT, options=options)
        assert all(s["w"] != jax.sharding.PartitionSpec(None, None) for s in sharded.in_specs[0])

    def test_gradients_accumulated_in_a_scan_are_reduced_once_after_it(self, zoo):
        def step(params, batch):
            def add(total, part):
                gradients = jax.grad(zoo.mlp_loss)(params, part)
                return jax.tree.map(jnp.add, total, gradients), None

            zeros = jax.tree.map(jnp.zeros_like, params)
            total, _ = jax.lax.scan(add, zeros, batch)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, total)

        params, (x, y) = zoo.mlp(2, 512, 16)
        batch = (zoo.shape(4, *x.shape), zoo.shape(4, *y.shape))
        sharded = autopar.auto_shard(step, params, batch, mesh=zoo.FLAT)
        assert zoo.kinds(sharded) == {"all-reduce": 4}
        assert {c.times for c in sharded.collectives} == {1.0}
        zoo.check_runs_as_priced(step, (params, batch), sharded)

    def test_a_tied_embedding_is_reduced_once(self, zoo):
        def loss(params, batch):
            ids, targets = batch
            x = jnp.tanh(params["embedding"][ids] @ params["w"])
            logits = jax.nn.log_softmax(x @ params["embedding"].T)
            return -jnp.mean(jnp.take_along_axis(logits, targets[..., None], -1))

        params = {"embedding": zoo.shape(64, 32), "w": zoo.shape(32, 32)}
        batch = (zoo.shape(64, 64, dtype=jnp.int32),) * 2
        sharded = autopar.auto_shard(zoo.training_step(loss), params, batch, mesh=zoo.FLAT)
        reduced = Counter(c.num_bytes for c in sharded.collectives)
        assert reduced == {4: 1, 4 * 64 * 32: 1, 4 * 32 * 32: 1}
        zoo.check_runs_as_priced(zoo.training_step(loss), (params, batch), sharded)


class TestAlpasCosts:
    """Alpa's own tests compute objectives from its cost functions; so do these."""

    def options(self):
        return autopar.IntraOpOptions(costs=autopar.AlpaCosts())

    def all_reduce(self, num_bytes, n=4):
        return 1.0 + 2 * (n - 1) / n * num_bytes + 0.01

    def test_data_parallel_mlp(self, zoo):
        params, batch = zoo.mlp(2, 4096, 16)
        step = zoo.training_step(zoo.mlp_loss)
        sharded = autopar.auto_shard(step, params, batch, mesh=zoo.FLAT, options=self.options())
        parts = 2 * [4 * 16 * 16] + 2 * [4 * 16] + [4]
        assert sharded.objective == pytest.approx(sum(map(self.all_reduce, parts)))

    def test_tensor_parallel_mlp(self, zoo):
        params, batch = zoo.mlp(2, 4, 512)
        step = zoo.training_step(zoo.mlp_loss)
        sharded = autopar.auto_shard(step, params, batch, mesh=zoo.FLAT, options=self.options())
        assert sharded.objective == pytest.approx(self.all_reduce(4 * 4 * 512))
