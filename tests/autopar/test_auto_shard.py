"""`auto_shard` by itself: known answers, exact results, the audit, brute force, and bad input."""

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launcher import autopar
from launcher.autopar.sharded_graph import collectives
from launcher.autopar.solve_step import write_step
from launcher.errors import ClusterError, ConfigError, InfeasiblePlanError

FLAT = autopar.LogicalMesh(shape=(4,), alpha=(1.0,), beta=(1.0,))
SQUARE = autopar.LogicalMesh(shape=(2, 2), alpha=(1.0, 1.0), beta=(1.0, 0.1))
EIGHT = autopar.LogicalMesh(shape=(2, 4), alpha=(1.0, 1.0), beta=(1.0, 0.1))


@pytest.fixture(autouse=True)
def promotion():
    """A user's function may promote ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def training_step(loss, optimizer=None):
    """`loss(params, batch)` as a step of gradient descent, or of an optax optimizer."""

    def descend(params, batch):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    def update(params, state, batch):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return descend if optimizer is None else update


def mlp_loss(params, batch):
    x, y = batch
    for layer in params:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return jnp.mean((x - y) ** 2)


def mlp(layers, samples, width, dtype=jnp.float32):
    layer = {"w": shape(width, width, dtype=dtype), "b": shape(width, dtype=dtype)}
    return [layer] * layers, (shape(samples, width, dtype=dtype),) * 2


def transformer_block(p, x, heads):
    """A pre-LN block with a fused QKV projection, heads outermost."""
    samples, length, hidden = x.shape

    def norm(h):
        h = h - h.mean(-1, keepdims=True)
        return h * jax.lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-5)

    qkv = (norm(x) @ p["qkv"]).reshape(samples, length, heads, 3, hidden // heads)
    q, k, v = (qkv[:, :, :, i] for i in range(3))
    scores = jnp.einsum("bshd,bthd->bhst", q, k)
    mask = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9), -1)
    mixed = jnp.einsum("bhst,bthd->bshd", weights, v).reshape(x.shape)
    x = x + mixed @ p["out"]
    return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]


def transformer(layers, samples, *, length=16, hidden=256, heads=8, remat=False):
    block = jax.checkpoint(transformer_block, static_argnums=2) if remat else transformer_block

    def loss(params, batch):
        x, y = batch
        for p in params:
            x = block(p, x, heads)
        return jnp.mean((x - y) ** 2)

    layer = {
        "qkv": shape(hidden, 3 * hidden),
        "out": shape(hidden, hidden),
        "up": shape(hidden, 4 * hidden),
        "down": shape(4 * hidden, hidden),
    }
    return training_step(loss), [layer] * layers, (shape(samples, length, hidden),) * 2


def moe_layer(p, x):
    """Top-1 routing in groups, with the expert dim in front of the weights."""
    groups, tokens, hidden = x.shape
    experts = p["up"].shape[0]
    capacity = 2 * tokens // experts
    gates = jax.nn.softmax(x @ p["router"])
    mask = jax.nn.one_hot(jnp.argmax(gates, -1), experts)
    position = jnp.cumsum(mask, 1) * mask - mask
    slots = jax.nn.one_hot(position.sum(-1).astype(jnp.int32), capacity)
    kept = mask * (position < capacity)
    combine = (gates * kept)[..., None] * slots[:, :, None]
    dispatch = (combine > 0).astype(x.dtype)
    inside = jnp.einsum("gtec,gth->egch", dispatch, x)
    inside = jax.nn.relu(jnp.einsum("egch,ehf->egcf", inside, p["up"]))
    outside = jnp.einsum("egcf,efh->egch", inside, p["down"])
    return x + jnp.einsum("gtec,egch->gth", combine, outside)


def moe(layers, *, groups=8, tokens=32, hidden=64, wide=1024, experts=8):
    def loss(params, batch):
        x, y = batch
        x = x @ params["in"]
        for p in params["layers"]:
            x = moe_layer(p, x)
        return jnp.mean((x - y) ** 2)

    layer = {
        "router": shape(hidden, experts),
        "up": shape(experts, hidden, wide),
        "down": shape(experts, wide, hidden),
    }
    params = {"in": shape(hidden, hidden), "layers": [layer] * layers}
    return training_step(loss), params, (shape(groups, tokens, hidden),) * 2


def kinds(sharded, at_least=0):
    """How many collectives of each kind, of so many bytes at least."""
    return Counter(c.kind for c in sharded.collectives if c.num_bytes >= at_least)


def axes_of(spec):
    """All mesh axes of a PartitionSpec."""
    entries = [(e,) if isinstance(e, str) else e for e in spec if e is not None]
    return [axis for entry in entries for axis in entry]


def random_arrays(tree):
    rng = np.random.default_rng(0)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return (0.1 * rng.normal(size=leaf.shape)).astype(leaf.dtype)
        return rng.integers(0, 4, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, tree)


def check_runs_as_priced(step, args, sharded, tolerance=2e-4, arrays=None):
    """The compiled function has the priced collectives, and computes what the function computes."""
    compiled = sharded.compile(jax.devices()[: sharded.mesh.num_devices])
    audit = sharded.audit(compiled)
    assert audit.agrees, f"\n{audit}"
    arrays = random_arrays(args) if arrays is None else arrays
    expected = jax.jit(step)(*arrays)
    for got, want in zip(
        jax.tree.leaves(compiled(*arrays)), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(want).max() if np.size(want) else 1.0
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale)


class TestKnownAnswers:
    def test_a_large_batch_becomes_data_parallel(self):
        params, batch = mlp(3, 4096, 16)
        sharded = autopar.auto_shard(training_step(mlp_loss), params, batch, mesh=FLAT)
        assert kinds(sharded) == {"all-reduce": 7}  # three weights, three biases, the loss
        gradients = 3 * (2 * 3 + 2 * 0.75 * 4 * 16 * 16) + 3 * (2 * 3 + 2 * 0.75 * 4 * 16)
        assert sharded.objective == pytest.approx(gradients + 2 * 3 + 2 * 0.75 * 4)
        assert sharded.in_specs[1][0] == jax.sharding.PartitionSpec(("axis0",), None)

    def test_its_gradients_are_reduced_by_one_combined_all_reduce(self):
        params, batch = mlp(3, 4096, 16)
        sharded = autopar.auto_shard(training_step(mlp_loss), params, batch, mesh=FLAT)
        text = sharded.compile(jax.devices()[:4]).as_text()
        assert sum(" all-reduce(" in line for line in text.splitlines()) <= 2

    def test_a_small_batch_alternates_columns_and_rows(self):
        params, batch = mlp(2, 4, 512)
        sharded = autopar.auto_shard(training_step(mlp_loss), params, batch, mesh=FLAT)
        assert kinds(sharded, 1000) == {"all-reduce": 1}
        column, row = (specs["w"] for specs in sharded.in_specs[0])
        assert column == jax.sharding.PartitionSpec(None, ("axis0",))
        assert row == jax.sharding.PartitionSpec(("axis0",), None)

    @pytest.mark.parametrize("layers", [1, 2, 4])
    def test_a_transformer_layer_finds_megatrons_four_all_reduces(self, layers):
        """Two forward and two backward; the first layer's input needs no gradient, which saves one."""
        step, params, batch = transformer(layers, 2)
        sharded = autopar.auto_shard(step, params, batch, mesh=FLAT)
        assert kinds(sharded) == {"all-reduce": 4 * layers - 1}

    def test_recomputation_reduces_again_what_it_needs(self):
        """Of a layer's two forward reductions, nothing reads the recomputed second."""
        step, params, batch = transformer(4, 2, remat=True)
        sharded = autopar.auto_shard(step, params, batch, mesh=FLAT)
        assert kinds(sharded) == {"all-reduce": 4 * 4 - 1 + 4}

    def test_experts_are_split_and_exchange_four_times_a_layer(self):
        step, params, batch = moe(1)
        sharded = autopar.auto_shard(step, params, batch, mesh=FLAT)
        exchanged = 4 * 8 * 8 * 64 * 8 // 4  # experts x groups x hidden x capacity of a device
        assert kinds(sharded, exchanged) == {"all-to-all": 4}
        specs = sharded.in_specs[0]["layers"][0]
        assert specs["up"] == specs["down"] == jax.sharding.PartitionSpec(("axis0",), None, None)

    def test_data_parallelism_goes_on_the_slow_axis(self):
        mesh = autopar.LogicalMesh(shape=(2, 4), alpha=(1.0, 1.0), beta=(1.0, 0.01))
        step, params, batch = transformer(1, 2, length=1024, hidden=64)
        sharded = autopar.auto_shard(step, params, batch, mesh=mesh)
        first, second = sharded.mesh.axis_names
        slow = [c for c in sharded.collectives if c.axis == first]
        weights = {4 * 64 * n * 64 // k for n in (1, 3, 4) for k in (1, 4)}
        assert {c.num_bytes for c in slow} <= weights | {4}
        assert first in axes_of(sharded.in_specs[1][0])
        weights = jax.tree.leaves(sharded.in_specs[0])
        assert all(first not in axes_of(spec) for spec in weights)
        assert any(second in axes_of(spec) for spec in weights)

    def test_zero_2_scatters_gradients_and_gathers_parameters(self):
        params, batch = mlp(3, 4096, 16)
        optimizer = optax.adam(1e-3)
        state = jax.eval_shape(optimizer.init, params)
        step = training_step(mlp_loss, optimizer)
        plain = autopar.auto_shard(step, params, state, batch, mesh=FLAT)
        options = autopar.IntraOpOptions(zero=2)
        sharded = autopar.auto_shard(step, params, state, batch, mesh=FLAT, options=options)
        assert kinds(plain, 64) == {"all-reduce": 6}
        assert kinds(sharded, 64) == {"reduce-scatter": 6, "all-gather": 6}
        assert sharded.objective == pytest.approx(plain.objective)
        assert all(
            spec["w"] != jax.sharding.PartitionSpec(None, None)
            for spec in sharded.in_specs[1][0].mu
        )
        assert all(s["w"] == jax.sharding.PartitionSpec(None, None) for s in sharded.in_specs[0])
        assert sharded.peak_bytes_per_device < plain.peak_bytes_per_device

    def test_zero_3_shards_the_parameters(self):
        params, batch = mlp(3, 4096, 16)
        options = autopar.IntraOpOptions(zero=3)
        step = training_step(mlp_loss)
        sharded = autopar.auto_shard(step, params, batch, mesh=FLAT, options=options)
        assert all(s["w"] != jax.sharding.PartitionSpec(None, None) for s in sharded.in_specs[0])

    def test_gradients_accumulated_in_a_scan_are_reduced_once_after_it(self):
        def step(params, batch):
            def add(total, part):
                gradients = jax.grad(mlp_loss)(params, part)
                return jax.tree.map(jnp.add, total, gradients), None

            zeros = jax.tree.map(jnp.zeros_like, params)
            total, _ = jax.lax.scan(add, zeros, batch)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, total)

        params, (x, y) = mlp(2, 512, 16)
        batch = (shape(4, *x.shape), shape(4, *y.shape))
        sharded = autopar.auto_shard(step, params, batch, mesh=FLAT)
        assert kinds(sharded) == {"all-reduce": 4}
        assert {c.times for c in sharded.collectives} == {1.0}
        check_runs_as_priced(step, (params, batch), sharded)

    def test_a_tied_embedding_is_reduced_once(self):
        def loss(params, batch):
            ids, targets = batch
            x = jnp.tanh(params["embedding"][ids] @ params["w"])
            logits = jax.nn.log_softmax(x @ params["embedding"].T)
            return -jnp.mean(jnp.take_along_axis(logits, targets[..., None], -1))

        params = {"embedding": shape(64, 32), "w": shape(32, 32)}
        batch = (shape(64, 64, dtype=jnp.int32),) * 2
        sharded = autopar.auto_shard(training_step(loss), params, batch, mesh=FLAT)
        reduced = Counter(c.num_bytes for c in sharded.collectives)
        assert reduced == {4: 1, 4 * 64 * 32: 1, 4 * 32 * 32: 1}
        check_runs_as_priced(training_step(loss), (params, batch), sharded)


class TestAlpasCosts:
    """Alpa's own tests compute objectives from its cost functions; so do these."""

    def options(self):
        return autopar.IntraOpOptions(costs=autopar.AlpaCosts())

    def all_reduce(self, num_bytes, n=4):
        return 1.0 + 2 * (n - 1) / n * num_bytes + 0.01

    def test_data_parallel_mlp(self):
        params, batch = mlp(2, 4096, 16)
        step = training_step(mlp_loss)
        sharded = autopar.auto_shard(step, params, batch, mesh=FLAT, options=self.options())
        parts = 2 * [4 * 16 * 16] + 2 * [4 * 16] + [4]
        assert sharded.objective == pytest.approx(sum(map(self.all_reduce, parts)))

    def test_tensor_parallel_mlp(self):
        params, batch = mlp(2, 4, 512)
        step = training_step(mlp_loss)
        sharded = autopar.auto_shard(step, params, batch, mesh=FLAT, options=self.options())
        assert sharded.objective == pytest.approx(self.all_reduce(4 * 4 * 512))


def convolutions(params, batch):
    x, y = batch
    numbers = ("NHWC", "HWIO", "NHWC")
    for w in params:
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)
        )
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jnp.mean((x.mean((1, 2)) - y) ** 2)


def scanned(params, batch):
    x, y = batch
    x, _ = jax.lax.scan(lambda h, p: (jnp.tanh(h @ p["up"]) @ p["down"] + h, None), x, params)
    return jnp.mean((x - y) ** 2)


def looped(params, x):
    def body(carry):
        count, h = carry
        return count + 1, jnp.tanh(h @ params)

    _, h = jax.lax.while_loop(lambda c: (c[0] < 5) & (c[1].sum() < 1e9), body, (0, x))
    h = jax.lax.cond(h.sum() > 0, lambda h: h @ params, lambda h: 2.0 * h, h)
    return h.sum(0)


def _cases():
    params, batch = mlp(2, 512, 16)
    yield "mlp-data", training_step(mlp_loss), (params, batch)
    params, batch = mlp(2, 8, 256)
    yield "mlp-tensor", training_step(mlp_loss), (params, batch)
    step, params, batch = transformer(2, 8)
    yield "transformer", step, (params, batch)
    step, params, batch = transformer(2, 8, remat=True)
    yield "transformer-remat", step, (params, batch)
    step, params, batch = moe(1)
    yield "moe", step, (params, batch)
    yield "convolutions", training_step(convolutions), (
        [shape(3, 3, 16, 16)] * 2, (shape(16, 8, 8, 16), shape(16, 16)),
    )  # fmt: skip
    stack = {"up": shape(4, 64, 256), "down": shape(4, 256, 64)}
    yield "scan", training_step(scanned), (stack, (shape(8, 64),) * 2)
    yield "while", looped, (shape(64, 64), shape(256, 64))


CASES = {name: (step, args) for name, step, args in _cases()}


class TestWhatRunsIsWhatWasPriced:
    @pytest.mark.parametrize("mesh", [FLAT, SQUARE, EIGHT], ids=["4", "2x2", "2x4"])
    @pytest.mark.parametrize("name", CASES)
    def test_audit(self, name, mesh):
        step, args = CASES[name]
        sharded = autopar.auto_shard(step, *args, mesh=mesh)
        assert sharded.gap_fraction < 1e-6
        check_runs_as_priced(step, args, sharded)

    @pytest.mark.parametrize("zero", [1, 2, 3])
    def test_audit_with_zero(self, zero):
        params, batch = mlp(2, 512, 16)
        options = autopar.IntraOpOptions(zero=zero, batch_axis=0)
        step = training_step(mlp_loss)
        sharded = autopar.auto_shard(step, params, batch, mesh=SQUARE, options=options)
        check_runs_as_priced(step, (params, batch), sharded)

    def test_half_precision_reductions_are_recognised(self):
        params, batch = mlp(2, 512, 16, jnp.bfloat16)
        step = training_step(mlp_loss)
        sharded = autopar.auto_shard(step, params, batch, mesh=FLAT)
        audit = sharded.audit(sharded.compile(jax.devices()[:4]))
        assert audit.agrees, f"\n{audit}"
        assert audit.num_widened > 0

    def test_exact_in_double_precision(self):
        with jax.enable_x64(True):
            params, batch = mlp(2, 64, 16, jnp.float64)
            step = training_step(mlp_loss)
            sharded = autopar.auto_shard(step, params, batch, mesh=SQUARE)
            check_runs_as_priced(step, (params, batch), sharded, tolerance=1e-13)


class TestOptions:
    def test_forbidden_collectives_are_not_used(self):
        step, params, batch = moe(1)
        options = autopar.IntraOpOptions(allow_all_to_all=False)
        sharded = autopar.auto_shard(step, params, batch, mesh=FLAT, options=options)
        assert "all-to-all" not in kinds(sharded)
        options = autopar.IntraOpOptions(allow_all_gather=False)
        sharded = autopar.auto_shard(step, params, batch, mesh=FLAT, options=options)
        assert "all-gather" not in kinds(sharded)

    def test_the_batch_is_held_to_its_axis(self):
        params, batch = mlp(2, 8, 512)
        options = autopar.IntraOpOptions(batch_axis=0)
        step = training_step(mlp_loss)
        sharded = autopar.auto_shard(step, params, batch, mesh=SQUARE, options=options)
        name = SQUARE.axis_names[0]
        assert all(name in spec[0] for spec in sharded.in_specs[1])
        assert not any(name in axes_of(spec) for spec in jax.tree.leaves(sharded.in_specs[0]))

    def test_one_dim_over_both_axes_only_where_allowed(self):
        params, batch = mlp(2, 4096, 16)
        step = training_step(mlp_loss)
        both = autopar.auto_shard(step, params, batch, mesh=SQUARE)
        assert both.in_specs[1][0][0] == SQUARE.axis_names
        options = autopar.IntraOpOptions(allow_dim_over_axes=False)
        one = autopar.auto_shard(step, params, batch, mesh=SQUARE, options=options)
        split = [entry for spec in jax.tree.leaves(one.in_specs) for entry in spec if entry]
        assert all(isinstance(entry, str) for entry in split)
        assert both.objective <= one.objective

    def test_the_memory_limit_holds(self):
        optimizer = optax.adam(1e-3)
        params, batch = mlp(4, 256, 64)
        step = training_step(mlp_loss, optimizer)
        args = (params, jax.eval_shape(optimizer.init, params), batch)
        free = autopar.auto_shard(step, *args, mesh=FLAT)
        limit = 0.9 * free.peak_bytes_per_device
        options = autopar.IntraOpOptions(memory_limit_bytes=limit)
        tight = autopar.auto_shard(step, *args, mesh=FLAT, options=options)
        assert tight.peak_bytes_per_device <= limit
        assert tight.objective >= free.objective
        true_gap = 1 - free.objective / tight.objective
        assert tight.gap_fraction == pytest.approx(true_gap, abs=1e-3)
        state = optimizer.init(random_arrays(params))
        check_runs_as_priced(
            step, args, tight, arrays=(*random_arrays((params,)), state, random_arrays(batch))
        )

    def test_a_limit_that_cannot_be_met_names_the_least(self):
        params, batch = mlp(2, 64, 64)
        options = autopar.IntraOpOptions(memory_limit_bytes=1000)
        with pytest.raises(InfeasiblePlanError, match=r"memory_limit_bytes=1000 .* \d{5,} bytes"):
            autopar.auto_shard(training_step(mlp_loss), params, batch, mesh=FLAT, options=options)

    def test_explain_prices_the_alternatives(self):
        params, batch = mlp(2, 4, 512)
        sharded = autopar.auto_shard(training_step(mlp_loss), params, batch, mesh=FLAT)
        explanation = sharded.explain("params/0/w")
        best, *others = explanation.alternatives
        assert best.chosen and best.cost == pytest.approx(sharded.objective)
        assert all(other.cost >= best.cost for other in others)
        assert "axis0:1" in str(explanation)
        assert sharded.explain("dot_general").alternatives[0].chosen

    def test_explain_knows_what_is_near(self):
        params, batch = mlp(2, 4, 512)
        sharded = autopar.auto_shard(training_step(mlp_loss), params, batch, mesh=FLAT)
        with pytest.raises(ConfigError, match="params/0/w"):
            sharded.explain("params/0/ww")


def random_function(seed):
    """A small function with shared values, products, sums and reductions."""
    choice = np.random.default_rng(seed).integers(0, 5, size=2)

    def function(x, w):
        values = [x, w]
        for kind in choice:
            a = values[-1]
            match kind:
                case 0:
                    values.append(a @ w)
                case 1:
                    values.append(jnp.tanh(a) + values[0])
                case 2:
                    values.append(a.T)
                case 3:
                    values.append(a * a.sum(0))
                case 4:
                    values.append(x.T @ a)
        return values[-1]

    return function


def check_no_choice_is_cheaper(seed):
    mesh = autopar.LogicalMesh(shape=(2,), alpha=(1.0,), beta=(1.0,))
    function = random_function(seed)
    sharded = autopar.auto_shard(function, shape(4, 4), shape(4, 4), mesh=mesh)
    step, choices = sharded.problem, sharded.problem.problem.choices
    keys = list(choices)
    assert np.prod([len(choices[key]) for key in keys]) <= 30_000
    best = min(
        sum(c.cost for c in collectives(write_step(step, dict(zip(keys, picks, strict=True)))))
        for picks in itertools.product(*(choices[key] for key in keys))
    )
    assert sharded.objective == pytest.approx(best)


class TestRegret:
    @pytest.mark.parametrize("seed", range(4))
    def test_no_choice_is_cheaper(self, seed):
        check_no_choice_is_cheaper(seed)


    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(4, 60))
    def test_no_choice_is_cheaper_for_many(self, seed):
        check_no_choice_is_cheaper(seed)


class TestBadInput:
    def test_a_mesh_that_does_not_match_the_devices(self):
        params, batch = mlp(1, 4, 16)
        sharded = autopar.auto_shard(training_step(mlp_loss), params, batch, mesh=FLAT)
        with pytest.raises(ClusterError, match=r"4 devices, but 3"):
            sharded.compile(jax.devices()[:3])

    def test_a_function_that_cannot_be_traced(self):
        with pytest.raises(ConfigError, match="cannot be traced"):
            autopar.auto_shard(lambda x: float(x.sum()), shape(4), mesh=FLAT)

    def test_an_argument_without_a_shape(self):
        with pytest.raises(ConfigError, match="has no shape"):
            autopar.auto_shard(lambda x, y: x, shape(4), "text", mesh=FLAT)

    def test_options_that_make_no_sense(self):
        with pytest.raises(ConfigError, match="zero=4"):
            autopar.IntraOpOptions(zero=4)
        options = autopar.IntraOpOptions(batch_axis=2)
        with pytest.raises(ConfigError, match="batch_axis=2"):
            autopar.auto_shard(jnp.sin, shape(4), mesh=FLAT, options=options)

    def test_a_mesh_with_entries_missing(self):
        with pytest.raises(ValueError, match="one entry per axis"):
            autopar.LogicalMesh(shape=(2, 2), alpha=(1.0,), beta=(1.0, 1.0))
