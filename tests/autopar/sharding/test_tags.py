"""A tagged dim is the batch indeed: swapping the halves of a batch swaps the halves of what is tagged.

And of nothing else: values without a tag are sums over the batch, or do not depend on it, so that they stay
as they are.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launcher import models
from launcher.autopar.graphs.clustering import cluster
from launcher.autopar.graphs.graph import CALLS, CUSTOM_CALLS, evaluate_op, from_jaxpr
from launcher.autopar.graphs.layers import build_layers
from launcher.autopar.graphs.trace import Role, trace_model
from launcher.autopar.sharding.restrictions import ClassTags, Experts, Restrictions, tag_classes
from launcher.autopar.sharding.rules import axis_choices
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED
from launcher.autopar.sharding.tags import expert_dims, propagate
from launcher.config import GptConfig, MoeConfig, WrnConfig

BATCH = 4


def graph_of(function, *shapes):
    avals = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return from_jaxpr(jax.make_jaxpr(function)(*avals), inline=CALLS | CUSTOM_CALLS)


def tag_of_result(function, *shapes, seeds):
    graph = graph_of(function, *shapes)
    return propagate(graph.ops, seeds).get(graph.outputs[0])


CASES = {
    "matmul's rows": (lambda x, w: jnp.tanh(x @ w), ((4, 6), (6, 8)), {0: 0}, 0),
    "contracted": (lambda x, w: x @ w, ((6, 4), (4, 8)), {0: 1, 1: 0}, None),
    "transposed": (lambda x: x.transpose(2, 0, 1), ((4, 6, 8),), {0: 0}, 1),
    "merged as the major dim": (lambda x: x.reshape(24, 8), ((4, 6, 8),), {0: 0}, 0),
    "split off": (lambda x: x.reshape(4, 6, 8), ((24, 8),), {0: 0}, 0),
    "merged as the minor dim": (lambda x: x.reshape(24, 8), ((4, 6, 8),), {0: 1}, None),
    "reduced": (lambda x: x.sum(0), ((4, 6),), {0: 0}, None),
    "beside a reduced dim": (lambda x: x.sum(0), ((6, 4),), {0: 1}, 0),
    "attention": (lambda q, k: jnp.einsum("bsnd,btnd->bnst", q, k), ((4, 6, 2, 8),) * 2, {0: 0, 1: 0}, 0),
    "a new dim in front": (lambda x: jnp.broadcast_to(x[None], (3, 4, 6)), ((4, 6),), {0: 0}, 1),
    "two tags that agree": (jnp.add, ((4, 6), (4, 6)), {0: 0, 1: 0}, 0),
    "two tags that contradict": (jnp.add, ((4, 4), (4, 4)), {0: 0, 1: 1}, None),
    "nothing tagged": (jnp.add, ((4, 4), (4, 4)), {}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_where_a_dim_goes(name):
    function, shapes, seeds, expected = CASES[name]
    assert tag_of_result(function, *shapes, seeds=seeds) == expected


def swapped(array, dim):
    """The halves of a dim in the other order."""
    return np.roll(array, array.shape[dim] // 2, axis=dim)


def evaluator(cls):
    """A function from the inputs of a joint graph to all its values."""

    def run(arguments):
        env = dict(zip(cls.joint.inputs, arguments, strict=True))
        for op in cls.joint.ops:
            operands = [env[o] if isinstance(o, int) else o.val for o in op.operands]
            env.update(zip(op.results, evaluate_op(op, operands), strict=True))
        is_key = jax.dtypes.prng_key
        return {v: a for v, a in env.items() if not jax.dtypes.issubdtype(a.dtype, is_key)}

    quickly = {"xla_backend_optimization_level": 0}
    shapes = [cls.joint.avals[value] for value in cls.joint.inputs]
    compiled = jax.jit(run).lower(shapes).compile(compiler_options=quickly)
    return lambda arguments: jax.tree.map(np.asarray, compiled(arguments))


def build(config):
    model = models.build(config)
    traced = trace_model(model, BATCH)
    return build_layers(traced, cluster(traced))


def check_class(cls, batch, draw):
    avals = [cls.joint.avals[value] for value in cls.joint.inputs]
    arguments = draw([jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals])
    others = [
        swapped(array, batch[value]) if value in batch else array
        for value, array in zip(cls.joint.inputs, arguments, strict=True)
    ]
    evaluate = evaluator(cls)
    first, second = evaluate(arguments), evaluate(others)
    for value, array in first.items():
        expected = swapped(array, batch[value]) if value in batch else array
        scale = max(1.0, np.abs(expected).max(initial=0.0))
        np.testing.assert_allclose(
            second[value] / scale, expected / scale, atol=1e-9, err_msg=f"{cls.name}: value {value}"
        )
    return sum(value in batch for value in first), len(first)


FAMILIES = {
    "gpt": GptConfig(size="tiny", dtype="fp64", layers=3, hidden=16, heads=2, seq_len=8),
    "moe": MoeConfig(
        size="tiny", dtype="fp64", hidden=16, heads=2, seq_len=16, layers=2, expert_group_size=16
    ),
    "wrn": WrnConfig(size="tiny", dtype="fp64"),
}


@pytest.mark.parametrize("family", [*FAMILIES][:2])
def test_tags_of_a_model_follow_its_batch(family, draw):
    check_family(family, draw)


@pytest.mark.slow
def test_tags_of_a_wide_resnet_follow_its_batch(draw):
    check_family("wrn", draw)


def check_family(family, draw):
    with jax.enable_x64(True):
        layered = build(FAMILIES[family])
        tags = tag_classes(layered)
        counts = [check_class(cls, tags[cls.name].batch, draw) for cls in layered.classes]
    tagged, total = np.sum(counts, axis=0)
    assert tagged > total / 3, "most activations have a batch dim"


def test_experts_are_found_and_weights_of_others_are_not():
    with jax.enable_x64(True):
        layered = build(FAMILIES["moe"])
    tags = tag_classes(layered)
    found = {}
    for layer in layered.layers:
        for slot, value in enumerate(layer.inputs):
            source = layered.traced.inputs.get(value)
            if source is not None and source.role is Role.PARAM:
                inner = layer.cls.joint.inputs[slot]
                found[source.path] = tags[layer.cls.name].experts.get(inner)
    with_experts = {path for path, dim in found.items() if dim is not None}
    assert with_experts == {"blocks/1/experts/up", "blocks/1/experts/down"}
    assert {found[path] for path in with_experts} == {0}


def test_the_experts_of_a_cast_weight_are_those_of_the_weight():
    graph = graph_of(
        lambda x, w: jnp.einsum("egh,ehm->egm", x, w.astype(jnp.bfloat16)), (4, 2, 6), (4, 6, 8)
    )
    assert expert_dims(graph.ops, {1}) == {1: 0}


def class_tags(batch, experts=()):
    return ClassTags(dict(batch), dict(experts))


def test_a_held_axis_may_only_split_the_batch():
    graph = graph_of(lambda x, w: x @ w, (4, 6), (6, 8))
    (op,) = graph.ops
    tags = class_tags({0: 0, op.results[0]: 0})
    held, free = Restrictions(frozenset({0})).op_choices(op, tags, 2)
    assert [choice.results for choice in held] == [(0,)]
    assert len(free) == len(axis_choices(op))


def test_a_gradient_of_a_weight_is_whole_or_partial_on_a_held_axis():
    graph = graph_of(lambda x, g: x.T @ g, (4, 6), (4, 8))
    op = graph.ops[-1]
    tags = class_tags(propagate(graph.ops, {0: 0, 1: 0}))
    (held,) = Restrictions(frozenset({0})).op_choices(op, tags, 1)
    assert {choice.results[0] for choice in held} <= {PARTIAL, REPLICATED}
    assert PARTIAL in {choice.results[0] for choice in held}


@pytest.mark.parametrize(
    ("experts", "allowed"),
    [(Experts.FREE, {0, 1}), (Experts.NEVER, {0}), (Experts.FORCED, {1})],
)
def test_experts_take_the_place_of_the_batch_if_they_may(experts, allowed):
    restrictions = Restrictions(frozenset({0}), experts)
    assert restrictions.entries(class_tags({7: 0}, {7: 1}), 7) == allowed
