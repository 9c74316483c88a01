"""What holds for all rules: even splits, literals, keys, errors, and sharing the answer among alike ops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Literal

from launcher.autopar.graphs.graph import CALLS, from_jaxpr
from launcher.autopar.sharding.rules import (
    AxisStrategy,
    axis_choices,
    registry,
    shapes_of,
    strategies,
)
from launcher.autopar.sharding.rules.unsupported import REASONS
from launcher.errors import UnsupportedPrimitiveError

P, R = -2, -1


def f64(*shape):
    return jax.ShapeDtypeStruct(shape, np.float64)


def ops_of(function, *arguments):
    return from_jaxpr(jax.make_jaxpr(function)(*arguments), inline=CALLS).ops


def on_mesh(op, *mesh_shape):
    choices = axis_choices(op)
    return strategies(op, shapes_of(op), mesh_shape, [choices] * len(mesh_shape))


def test_uneven_splits_are_left_out():
    (op,) = ops_of(jnp.tanh, f64(3, 8))
    assert {strategy.operand_spec(0) for strategy in on_mesh(op, 2, 2)} == {
        (R, R), (1, R), (R, 1), (1, 1),
    }  # fmt: skip


def test_two_axes_may_split_one_dim_only_together_evenly():
    (op,) = ops_of(jnp.tanh, f64(4, 6))
    specs = {strategy.operand_spec(0) for strategy in on_mesh(op, 2, 2)}
    assert (0, 0) in specs
    assert (1, 1) not in specs
    assert {(0, 1), (1, 0)} <= specs


@pytest.mark.parametrize("mesh_shape", [(2,), (4, 2), (2, 2, 2), (3, 2)])
def test_all_combinations_that_divide_evenly_are_there(mesh_shape):
    """Against trying all of them."""
    (op,) = ops_of(jnp.matmul, f64(8, 6), f64(6, 12))
    choices = axis_choices(op)
    combinations = [()]
    for _ in mesh_shape:
        combinations = [(*c, choice) for c in combinations for choice in choices]
    expected = [axes for axes in combinations if is_even(axes, op, mesh_shape)]
    assert [strategy.axes for strategy in on_mesh(op, *mesh_shape)] == expected


def is_even(axes, op, mesh_shape):
    shapes = [atom.aval.shape for atom in (*op.eqn.invars, *op.eqn.outvars)]
    for index, shape in enumerate(shapes):
        for dim, size in enumerate(shape):
            entries = [(*axis.operands, *axis.results)[index] for axis in axes]
            parts = np.prod(
                [n for entry, n in zip(entries, mesh_shape, strict=True) if entry == dim]
            )
            if size % parts:
                return False
    return True


def test_alike_ops_share_their_strategies():
    first, second = ops_of(lambda x, y: (x @ y, (x + 1.0) @ y), f64(4, 8), f64(8, 4))[::2]
    assert first is not second
    assert on_mesh(first, 2, 2) is on_mesh(second, 2, 2)


def test_a_literal_is_whole_or_zero():
    (one,) = ops_of(lambda x: lax.add_p.bind(x, 1.0), f64(4))
    (zero,) = ops_of(lambda x: lax.add_p.bind(x, 0.0), f64(4))
    assert isinstance(one.operands[1], Literal)
    assert {choice.operands for choice in axis_choices(one)} == {(R, R), (0, R)}
    assert {choice.operands for choice in axis_choices(zero)} == {(R, R), (0, R), (P, P)}


def test_keys_are_whole_and_nothing_is_a_sum_of_them():
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
    for op in ops_of(lambda k: jnp.stack([k[0], k[1]])[::-1].reshape(2, 1), keys):
        if any(jax.dtypes.issubdtype(v.aval.dtype, jax.dtypes.extended) for v in op.eqn.outvars):
            assert len(axis_choices(op)) == 1


def test_entries_are_plain_integers():
    """Parameters of some primitives hold NumPy's."""
    (solve,) = ops_of(lambda a: jnp.linalg.solve(a, a), f64(4, 4))[-2:-1]
    ops = [solve, *ops_of(lambda x: jnp.expand_dims(x, np.int64(1)).sum(np.int64(0)), f64(4, 8))]
    for op in ops:
        for choice in axis_choices(op):
            assert {type(entry) for entry in (*choice.operands, *choice.results)} <= {int}


def unknown(x):
    return lax.mulhi(x, x)


def test_an_unknown_primitive_is_named_with_its_place_and_the_cure():
    (op,) = ops_of(unknown, jax.ShapeDtypeStruct((4,), np.int32))
    line = unknown.__code__.co_firstlineno + 1
    with pytest.raises(
        UnsupportedPrimitiveError,
        match=rf"'mulhi' \(\S*test_registry.py:{line} \(unknown\)\).*no sharding rule.*docs/rules.md",
    ):
        axis_choices(op)


def test_its_place_is_in_the_model_where_a_library_called_it():
    def model(x):
        jax.debug.print("{}", x)
        return x

    (op,) = ops_of(model, f64(4))
    with pytest.raises(
        UnsupportedPrimitiveError,
        match=r"test_registry.py:\d+ \(\S*model\)\).*no sharding rule: what it does outside",
    ):
        axis_choices(op)


def test_a_primitive_has_a_rule_or_a_reason_not_both():
    assert not set(registry._CHOICES) & set(REASONS)


def magnitude_of_summands(op):
    yield AxisStrategy((P,), (P,))


def neighbour(op):
    yield AxisStrategy((0,), (1,))


@pytest.mark.parametrize("wrong", [magnitude_of_summands, neighbour])
def test_a_wrong_rule_is_found(wrong, monkeypatch, check):
    """|x| + |0| is |x|: only arbitrary summands show that a magnitude is not linear."""
    monkeypatch.setitem(registry._CHOICES, "abs", wrong)
    with pytest.raises(AssertionError, match="abs"):
        check(jnp.abs, f64(8, 8))
