"""The test that every rule passes: each strategy of each op, on the shards of a 2 x 2 mesh, against the op.

In double precision, because sums over shards add up in another order. A partial operand is cut into
summands that have nothing to do with it: an op that only seems linear, because one summand is everything
and the others are zero, is found out. Literals are handed over as the emitter does, as they are. Of two
strategies that are mirror images on the square mesh, one is run: compiling them is what takes the time.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal
from jax.sharding import Mesh, PartitionSpec

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.graph import CALLS, CUSTOM_CALLS, Graph, Op, evaluate_op, from_jaxpr
from launcher.autopar.graphs.structure import op_signature
from launcher.autopar.sharding.rules import Strategy, axis_choices, run_local, shapes_of, strategies
from launcher.autopar.sharding.shards import reshard_local
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED, Spec, partial_axes, replicated

MESH = LogicalMesh(shape=(2, 2), alpha=(1.0, 1.0), beta=(1.0, 1.0))
WHOLE = replicated(MESH.num_axes)
TOLERANCE = 1e-11
_QUICKLY = {"xla_backend_optimization_level": 0}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def traced(function: Callable, *arguments) -> Graph:
    return from_jaxpr(jax.make_jaxpr(function)(*arguments), inline=CALLS | CUSTOM_CALLS)


def strategies_of(op: Op, mesh_shape=MESH.shape) -> tuple[Strategy, ...]:
    choices = axis_choices(op)
    return strategies(op, shapes_of(op), mesh_shape, [choices] * len(mesh_shape))


def without_mirror_images(op: Op) -> list[Strategy]:
    """Of two strategies that exchange the axes of the square mesh, now the one and now the other."""
    number = {choice: i for i, choice in enumerate(axis_choices(op))}
    places = {s: (number[s.axes[0]], number[s.axes[1]]) for s in strategies_of(op)}
    return [s for s, (i, j) in places.items() if i == j or (i < j) == ((i + j) % 2 == 0)]


def drawn(aval, rng: np.random.Generator) -> jax.Array:
    """Random numbers; integers are 0 or 1, so that they are indices of anything."""
    dtype = aval.dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.asarray(rng.normal(size=aval.shape) + 1j * rng.normal(size=aval.shape), dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.asarray(rng.normal(size=aval.shape), dtype)
    return jnp.asarray(rng.integers(0, 2, aval.shape), dtype)


def shard_of(value: jax.Array, aval, spec: Spec, rng: np.random.Generator) -> jax.Array:
    """This device's shard; along a partial axis, one of two arbitrary summands."""
    split = tuple(REPLICATED if entry == PARTIAL else entry for entry in spec)
    shard = reshard_local(value, aval, WHOLE, split, MESH)
    for axis in partial_axes(spec):
        noise = drawn(jax.ShapeDtypeStruct(shard.shape, shard.dtype), rng)
        is_first = jax.lax.axis_index(MESH.axis_names[axis]) == 0
        shard = jnp.where(is_first, shard - noise, noise)
    return shard


def computed_on_shards(op: Op, values: Sequence, found: Sequence[Strategy]):
    """The whole results of an op, computed by each strategy on shards."""
    rng = np.random.default_rng(1)

    def on_device(*arguments):
        outcomes = []
        for strategy in found:
            given = enumerate(zip(op.operands, op.eqn.invars, arguments, strict=True))
            shards = [
                operand.val
                if isinstance(operand, Literal)
                else shard_of(value, var.aval, strategy.operand_spec(i), rng)
                for i, (operand, var, value) in given
            ]
            results = enumerate(
                zip(op.eqn.outvars, run_local(op, strategy, MESH, shards), strict=True)
            )
            outcomes.append([
                reshard_local(result, var.aval, strategy.result_spec(i), WHOLE, MESH)
                for i, (var, result) in results
            ])  # fmt: skip
        return outcomes

    devices = Mesh(np.array(jax.devices()[: MESH.num_devices]).reshape(MESH.shape), MESH.axis_names)
    spec = PartitionSpec()
    mapped = jax.shard_map(on_device, mesh=devices, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(mapped).lower(*values).compile(compiler_options=_QUICKLY)(*values)


def has_keys(op: Op) -> bool:
    atoms = (*op.eqn.invars, *op.eqn.outvars)
    return any(jax.dtypes.issubdtype(atom.aval.dtype, jax.dtypes.prng_key) for atom in atoms)


def all_values(graph: Graph, arguments: Sequence[jax.Array]) -> dict:
    """Every value of a graph, computed op by op on one device."""

    def run(arguments):
        env = dict(zip(graph.inputs, arguments, strict=True))
        for op in graph.ops:
            operands = [o.val if isinstance(o, Literal) else env[o] for o in op.operands]
            env |= dict(zip(op.results, evaluate_op(op, operands), strict=True))
        return env

    return jax.jit(run).lower(arguments).compile(compiler_options=_QUICKLY)(arguments)


_checked: set = set()


def check_op(op: Op, values: Sequence, expected: Sequence) -> None:
    """Run every strategy of an op on shards; ops alike are run once."""
    found = without_mirror_images(op)
    if has_keys(op):
        assert len(axis_choices(op)) == 1, "keys stay whole"
        return
    signature = op_signature(op)
    if len(found) == 1 or signature in _checked:
        return
    for strategy, results in zip(found, computed_on_shards(op, values, found), strict=True):
        for result, wanted in zip(results, expected, strict=True):
            np.testing.assert_allclose(
                np.asarray(result), np.asarray(wanted), rtol=TOLERANCE, atol=TOLERANCE,
                err_msg=f"{op.primitive} {strategy}",
            )  # fmt: skip
    _checked.add(signature)


@pytest.fixture(scope="session")
def check_one() -> Callable[[Op, Sequence, Sequence], None]:
    """Run every strategy of one op on shards, given whole operands and the results they should have."""
    return check_op


@pytest.fixture(scope="session")
def check() -> Callable[..., Graph]:
    """Trace a function and run every strategy of every op of it on shards.

    Arguments are drawn for shapes, and taken as they are if they are arrays.
    """

    def checked(function: Callable, *arguments) -> Graph:
        graph = traced(function, *arguments)
        rng = np.random.default_rng(0)
        given = [a if isinstance(a, np.ndarray) else drawn(a, rng) for a in arguments]
        env = all_values(graph, [*map(jnp.asarray, given), *graph.constants.values()])
        for op in graph.ops:
            values = [o.val if isinstance(o, Literal) else env[o] for o in op.operands]
            check_op(op, values, [env[value] for value in op.results])
        return graph

    return checked


@pytest.fixture(scope="session")
def last_op() -> Callable[..., Op]:
    """The last op of a function with a given primitive's name, or simply the last."""

    def found(function: Callable, *arguments, name: str | None = None) -> Op:
        ops = traced(function, *arguments).ops
        return [op for op in ops if name in (None, str(op.primitive))][-1]

    return found


@pytest.fixture(scope="session")
def choices() -> Callable[[Op], set]:
    """The choices of an op but "replicated", as pairs (operands, results)."""

    def pairs(op: Op) -> set:
        return {(choice.operands, choice.results) for choice in axis_choices(op)[1:]}

    return pairs
