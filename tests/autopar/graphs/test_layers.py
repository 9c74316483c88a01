"""Layers, run one after the other by plain evaluation, give the gradients of the whole model.

The forward and the backward ops of every layer run apart, with nothing but the residuals between them, as
the runtime runs them on microbatches.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal

from launcher import models
from launcher.autopar.graphs.clustering import Clustering, cluster, free_ops
from launcher.autopar.graphs.graph import Graph, evaluate, used_values
from launcher.autopar.graphs.layers import build_layers
from launcher.autopar.graphs.trace import Role, trace_evaluation, trace_model
from launcher.config import MoeConfig, WrnConfig

BATCH, WORDS, WIDTH, HIDDEN = 4, 5, 6, 8
KEY = np.array([7, 11], np.uint32)


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


@jax.custom_vjp
def clipped_gradient(x):
    return x


clipped_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.01, 0.01),))


def loss(params, state, batch, key_data):
    """A skip connection over several layers, a tied table, integers, and what gradients do not pass."""
    x = params["table"][batch["words"]]
    key = jax.random.wrap_key_data(key_data)
    keep = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.8, x.shape)
    first = jnp.tanh(jnp.where(keep, x, 0.0) @ params["up"] + state["shift"])
    second = clipped_gradient(jax.nn.relu(first @ params["inner"]))
    third = jax.checkpoint(lambda h: jnp.sin(h @ params["inner"].T))(second)
    out = third @ params["up"].T + x  # `up` and `inner` are read by two layers each
    logits = out @ params["table"].T
    frozen = jax.lax.stop_gradient(second)
    losses = -jax.nn.log_softmax(logits)[jnp.arange(BATCH), batch["label"]]
    found = jnp.argmax(logits, axis=1)
    total = jnp.mean(losses) + 0.1 * jnp.mean((first - frozen) ** 2)
    metrics = {"right": jnp.sum(found == batch["label"]), "first": jnp.max(first)}
    return total, ({"shift": 0.9 * state["shift"] + 0.1 * jnp.mean(first)}, metrics)


@pytest.fixture
def model(toy_model):
    shapes = {
        "table": (WORDS, WIDTH),
        "up": (WIDTH, HIDDEN),
        "inner": (HIDDEN, HIDDEN),
        "unread": (3,),
    }
    return toy_model(
        loss=loss,
        abstract_params={k: jax.ShapeDtypeStruct(v, jnp.float64) for k, v in shapes.items()},
        abstract_state={"shift": jax.ShapeDtypeStruct((), jnp.float64)},
        batch=lambda size: {
            name: jax.ShapeDtypeStruct((size,), jnp.int64) for name in ("words", "label")
        },
    )


def cut_at(traced, cuts):
    """Layers that begin at the given positions."""
    free = free_ops(traced)
    ops = [op for op in traced.graph.ops if op not in free]
    edges = [0, *cuts, len(ops)]
    layers = tuple(tuple(ops[a:b]) for a, b in itertools.pairwise(edges))
    return Clustering(layers, tuple(free))


def run_ops(ops, env):
    """Evaluate ops in place."""
    for op in ops:
        distinct = dict.fromkeys(op.values)
        piece = Graph((), tuple(distinct), (op,), op.results, {})
        results = evaluate(piece, [env[value] for value in distinct])
        env.update(zip(op.results, results, strict=True))


def read(operand, env):
    return operand.val if isinstance(operand, Literal) else env[operand]


def forward(layered, env):
    """Run all layers; return what each leaves for its backward pass."""
    run_ops(layered.random_ops, env)
    kept = []
    for layer in layered.layers:
        cls = layer.cls
        slots = cls.joint.inputs[: cls.num_slots]
        inner = dict(zip(slots, (env[value] for value in layer.inputs), strict=True))
        run_ops(cls.forward_ops, inner)
        env.update(
            (value, read(inside, inner))
            for value, inside in zip(layer.outputs, cls.outputs, strict=True)
        )
        kept.append({value: inner[value] for value in cls.residuals})
    return kept


def backward(layered, env, kept):
    """Chain the cotangents in reverse; return the gradients by path."""
    gradients, cotangents = {}, {layered.traced.loss: jnp.ones(())}
    for layer, residuals in reversed(list(zip(layered.layers, kept, strict=True))):
        cls = layer.cls
        slots = cls.joint.inputs[: cls.num_slots]
        inner = dict(zip(slots, (env[value] for value in layer.inputs), strict=True)) | residuals
        for output, value in cls.cotangents.items():
            outer = layer.outputs[output]
            inner[value] = cotangents.get(outer, jnp.zeros_like(env[outer]))
        run_ops(cls.backward_ops, inner)
        for slot, value in cls.gradients.items():
            outer, found = layer.inputs[slot], read(value, inner)
            if cls.slots[slot].role is Role.PARAM:
                path = layered.traced.inputs[outer].path
                gradients[path] = gradients.get(path, 0.0) + found
            else:
                assert cls.slots[slot].role is None
                cotangents[outer] = cotangents.get(outer, 0.0) + found
    return gradients


def gradients_by_layers(layered, params, state, batch):
    traced = layered.traced
    sources = {Role.PARAM: params, Role.STATE: state, Role.BATCH: batch, Role.RANDOM: {"key": KEY}}
    env = {
        value: traced.graph.constants[value]
        if source.role is Role.CONSTANT
        else sources[source.role][source.path]
        for value, source in traced.inputs.items()
    }
    kept = forward(layered, env)
    outputs = {name: env[v] for name, v in (*traced.state.items(), *traced.metrics.items())}
    return env[traced.loss], outputs, backward(layered, env, kept)


def quickly(function, *arguments):
    """Compile with little optimization, which would take the most time here."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function).lower(*arguments).compile(options)(*arguments)


def check(model, layered, draw, bound=1e-12):
    params, state, batch = (
        draw(dict(shapes), seed)
        for seed, shapes in enumerate(
            (model.abstract_params, model.abstract_state, model.example_batch(BATCH))
        )
    )
    whole = jax.value_and_grad(model.loss, has_aux=True)
    (expected, (new_state, metrics)), wanted = quickly(whole, params, state, batch, KEY)
    by_layers = functools.partial(gradients_by_layers, layered)
    found, outputs, gradients = quickly(by_layers, params, state, batch)
    np.testing.assert_allclose(found, expected, rtol=bound)
    for path, gradient in wanted.items():
        ours = np.broadcast_to(gradients.get(path, 0.0), gradient.shape)
        np.testing.assert_allclose(ours, gradient, rtol=bound, atol=bound, err_msg=path)
    for name in layered.traced.state | layered.traced.metrics:
        np.testing.assert_allclose(outputs[name], (new_state | metrics)[name], rtol=bound)


@pytest.mark.parametrize("seed", range(8))
def test_cut_anywhere_the_gradients_are_those_of_the_whole(model, draw, seed):
    traced = trace_model(model, BATCH)
    rng = np.random.default_rng(seed)
    count = len(traced.graph.ops) - len(free_ops(traced))
    cuts = sorted(rng.choice(np.arange(1, count), seed, replace=False).tolist())
    check(model, build_layers(traced, cut_at(traced, cuts)), draw)


def test_one_layer_for_every_op(model, draw):
    traced = trace_model(model, BATCH)
    count = len(traced.graph.ops) - len(free_ops(traced))
    check(model, build_layers(traced, cut_at(traced, range(1, count))), draw)


def test_a_gpt_with_dropout_and_tied_embeddings(tiny_gpt, draw):
    model = tiny_gpt(layers=3, dropout=0.1, dtype="fp64", hidden=16, heads=2, seq_len=8)
    traced = trace_model(model, BATCH)
    layered = build_layers(traced, cluster(traced, 3))
    assert len(layered.layers) == 3
    check(model, layered, draw, bound=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [MoeConfig(size="tiny", dtype="fp64"), WrnConfig(size="tiny", dtype="fp64")]
)
def test_the_other_families(config, draw):
    model = models.build(config)
    traced = trace_model(model, BATCH)
    check(model, build_layers(traced, cluster(traced)), draw, bound=1e-8)


def classes_of(layered):
    return [layer.cls.name for layer in layered.layers]


def test_layers_that_are_alike_share_a_class_and_keys_do_not_tell_them_apart(tiny_gpt):
    traced = trace_model(tiny_gpt(layers=4, dropout=0.1), 2)
    first, *middle, last = classes_of(build_layers(traced, cluster(traced)))
    assert len(set(middle)) == 1
    assert len({first, last, *middle}) == 3


def squares_with(slopes):
    """A chain of layers that differ in the derivative of their rounding only."""

    def straight_through(slope):
        rounded = jax.custom_jvp(lambda x: jnp.round(x))
        rounded.defjvp(lambda primals, tangents: (rounded(*primals), slope * tangents[0]))
        return rounded

    def loss(params, state, batch, key_data):
        x = batch["x"] @ params["first"]
        for k, slope in enumerate(slopes):
            x = straight_through(slope)(3.0 * x @ params[f"w{k}"])
        return jnp.sum(x), (state, {})

    return loss


@pytest.mark.parametrize(("slopes", "num_classes"), [((2.0, 2.0, 2.0), 3), ((1.0, 2.0, 3.0), 5)])
def test_layers_with_other_custom_derivatives_are_not_alike(toy_model, draw, slopes, num_classes):
    names = ("first", *(f"w{k}" for k in range(len(slopes))))
    model = toy_model(
        loss=squares_with(slopes),
        abstract_params={name: jax.ShapeDtypeStruct((4, 4), jnp.float64) for name in names},
        batch=lambda size: {"x": jax.ShapeDtypeStruct((size, 4), jnp.float64)},
    )
    traced = trace_model(model, BATCH)
    layered = build_layers(traced, cut_at(traced, (1, 4, 7, 10)))
    assert len(layered.classes) == num_classes
    check(model, layered, draw)


@pytest.mark.parametrize("num_layers", [1, 3, 6])
def test_residuals_are_what_the_backward_ops_read_of_the_forward_ops_and_no_slots(
    tiny_gpt, num_layers
):
    traced = trace_model(tiny_gpt(layers=6, dropout=0.1), 2)
    for cls in build_layers(traced, cluster(traced, num_layers)).classes:
        assert not set(cls.residuals) & set(cls.joint.inputs)
        forward_results = {value for op in cls.forward_ops for value in op.results}
        backward_results = {value for op in cls.backward_ops for value in op.results}
        assert set(cls.residuals) <= forward_results
        direct = {v for v in cls.gradients.values() if not isinstance(v, Literal)}
        wanted = (used_values(cls.backward_ops) | direct) - backward_results
        assert wanted == {*cls.residuals, *(wanted & set(cls.joint.inputs))}


def test_gradients_flow_where_a_parameter_and_the_loss_are_connected_by_floats(model):
    traced = trace_model(model, BATCH)
    layered = build_layers(traced, cut_at(traced, ()))
    (cls,) = layered.classes
    by_path = {
        layered.traced.inputs[value].path: slot.differentiable
        for value, slot in zip(layered.layers[0].inputs, cls.slots, strict=True)
        if slot.role is not Role.RANDOM
    }
    assert by_path == {
        "inner": True,
        "table": True,
        "up": True,
        "label": False,
        "words": False,
        "shift": False,
    }
    (loss_index,) = cls.cotangent_outputs
    assert layered.layers[0].outputs[loss_index] == traced.loss


def test_evaluation_has_no_random_inputs_and_no_new_state(tiny_gpt):
    traced = trace_evaluation(tiny_gpt(layers=2, dropout=0.5), 2)
    assert {source.role for source in traced.inputs.values()} <= {
        Role.PARAM,
        Role.BATCH,
        Role.CONSTANT,
    }
    assert not traced.state
