"""Reading and writing by index: a split vocabulary, indices out of bounds, every kind of scatter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

P, R = -2, -1
TOKENS = np.array([[0, 7, 3], [5, 5, 1], [2, 6, 4], [7, 0, 0]])
STRAYS = np.array([[0, 8, 3], [-9, 5, 100], [2, 6, 4], [7, -1, 0]])  # some out of bounds


def f64(*shape):
    return jax.ShapeDtypeStruct(shape, np.float64)


def embed(table, ids):
    return table[ids]


def embedding_gradient(table, ids):
    _, pull = jax.vjp(lambda t: embed(t, ids), table)
    return pull(np.cos(np.arange(ids.size * table.shape[1])).reshape(*ids.shape, -1))


def take(mode, fill=None):
    return lambda t, i: jnp.take(t, i, axis=0, mode=mode, fill_value=fill)


def along(x, i):
    return jnp.take_along_axis(x, i, axis=1)


def labels_gradient(x, i):
    return jax.grad(lambda x: jnp.sin(along(x, i)).sum())(x)


def several_dims(x, i, j):
    return x[i, :, j]


def columns(x, i):
    return lax.dynamic_slice_in_dim(x, i, 2, axis=1)


def patches(x, i):
    """A window of two rows and a whole dim at each of several places."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0,)
    )
    return lax.gather(x, i[:, None], numbers, slice_sizes=(2, x.shape[1]))


def update_columns(x, y, i):
    return lax.dynamic_update_slice_in_dim(x, y, i, axis=1)


def rolled(x, i):
    return jnp.roll(x, i, axis=1)


GATHERS = {
    "embedding": (embed, f64(8, 4), TOKENS),
    "embedding of strays": (embed, f64(8, 2), STRAYS),
    "clipped": (take("clip"), f64(8, 4), STRAYS),
    "filled with a number": (take("fill", 7.0), f64(8, 4), STRAYS),
    "filled with zero": (take("fill", 0.0), f64(8, 4), STRAYS),
    "wrapped": (take("wrap"), f64(8, 4), STRAYS),
    "of integers": (take("fill"), np.arange(32).reshape(8, 4), STRAYS),
    "of unsigned integers": (take("fill"), np.arange(32, dtype=np.uint32).reshape(8, 4), STRAYS),
    "of truth values": (take("clip"), np.eye(8, 4) > 0, STRAYS),
    "by bytes": (take("clip"), f64(256, 4), np.array([0, 100, 127, 3], np.int8)),
    "by unsigned bytes": (take("fill"), f64(128, 4), np.array([0, 100, 200, 3], np.uint8)),
    "along": (along, f64(4, 8), np.array([[0, 5], [7, 7], [1, 2], [3, 4]])),
    "labels": (along, f64(4, 8), np.array([[5], [7], [8], [-9]])),
    "over several dims": (several_dims, f64(4, 8, 4), np.array([0, 3]), np.array([1, 2])),
    "windows": (patches, f64(8, 4), np.array([0, 6, 3, 2])),
    "dynamic slice": (columns, f64(4, 8), np.array(3)),
    "dynamic slice, out of bounds": (columns, f64(4, 8), np.array(7)),
    "dynamic update": (update_columns, f64(4, 8), f64(4, 2), np.array(5)),
    "rolled": (rolled, f64(4, 8), np.array(3)),
}


@pytest.mark.parametrize("name", GATHERS)
def test_reading(name, check):
    function, *arguments = GATHERS[name]
    check(function, *arguments)


def write(kind, *, mode="fill", unique=False):
    def run(x, rows, updates):
        at = x.at[rows]
        writers = {"set": at.set, "add": at.add, "subtract": at.subtract, "multiply": at.multiply,
                   "min": at.min, "max": at.max}  # fmt: skip
        return writers[kind](updates, mode=mode, unique_indices=unique)

    return run


def batched(kind):
    """A scatter in every row of a batch: a batching dim."""
    return jax.vmap(write(kind))


ROWS = np.array([7, 0, 3, 3])
STRAY_ROWS = np.array([7, 0, 100, 3])
KINDS = ("set", "add", "subtract", "multiply", "min", "max")
SCATTERS = {
    "embedding's gradient": (embedding_gradient, f64(8, 4), TOKENS),
    "labels' gradient": (labels_gradient, f64(4, 8), np.array([[5], [7], [1], [0]])),
    **{f"rows, {kind}": (write(kind), f64(8, 4), ROWS, f64(4, 4)) for kind in KINDS},
    **{
        f"batched, {kind}": (batched(kind), f64(4, 8), np.tile(ROWS, (4, 1)), f64(4, 4))
        for kind in KINDS
    },
    "strays": (write("add"), f64(8, 2), STRAY_ROWS, f64(4, 2)),
    "strays, clipped": (write("add", mode="clip"), f64(8, 2), STRAY_ROWS, f64(4, 2)),
    "each row once": (write("set", unique=True), f64(8, 4), np.array([7, 0, 3, 1]), f64(4, 4)),
    "one row": (lambda x, y: x.at[3].set(y), f64(8, 4), f64(4)),
    "columns": (lambda x, y: x.at[:, 2:4].add(y), f64(8, 4), f64(8, 2)),
}


@pytest.mark.parametrize("name", SCATTERS)
def test_writing(name, check):
    function, *arguments = SCATTERS[name]
    check(function, *arguments)


def test_an_embedding_may_split_tokens_features_or_the_vocabulary(last_op, choices):
    op = last_op(embed, f64(8, 4), TOKENS, name="gather")
    assert choices(op) == {
        ((R, 0), (0,)),
        ((R, 1), (1,)),
        ((1, R), (2,)),
        ((0, R), (P,)),
        ((P, R), (P,)),
    }


def test_its_gradient_may_too(last_op, choices):
    op = last_op(embedding_gradient, f64(8, 4), TOKENS, name="scatter-add")
    assert choices(op) == {
        ((P, 0, 0), (P,)),  # tokens: every device sums its own
        ((P, 1, 1), (P,)),
        ((1, R, 2), (1,)),
        ((0, R, R), (0,)),
        ((P, R, P), (P,)),
    }


@pytest.mark.parametrize(("kind", "operand", "updates", "expected"), [
    ("add", P, P, True),
    ("subtract", P, P, True),
    ("multiply", P, R, True),
    ("multiply", P, P, False),
    ("set", P, P, False),
    ("min", P, P, False),
    ("max", P, R, False),
])  # fmt: skip
def test_which_writes_are_linear(kind, operand, updates, expected, last_op, choices):
    op = last_op(write(kind), f64(8, 4), ROWS, f64(4, 4))
    assert (((operand, R, updates), (P,)) in choices(op)) == expected


def test_a_filled_in_number_is_no_sum(last_op, choices):
    linear = ((P, R), (P,))
    shapes = f64(8, 4), STRAYS
    assert linear in choices(last_op(take("fill", 0.0), *shapes, name="gather"))
    assert linear in choices(last_op(take("fill"), *shapes, name="gather"))  # not-a-number
    assert linear not in choices(last_op(take("fill", 7.0), *shapes, name="gather"))


def test_a_dynamic_place_keeps_its_dim_whole(last_op, choices):
    op = last_op(columns, f64(4, 8), np.array(3))
    assert choices(op) == {((0, R, R), (0,)), ((P, R, R), (P,))}
    op = last_op(update_columns, f64(4, 8), f64(4, 2), np.array(3))
    assert choices(op) == {((0, 0, R, R), (0,)), ((P, P, R, R), (P,))}
