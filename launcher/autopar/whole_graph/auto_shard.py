"""Any traceable function, sharded at the least communication: the intra-operator pass by itself.

    sharded = auto_shard(step, *abstract_args, mesh=LogicalMesh(...), options=IntraOpOptions(...))

traces `step`, poses its sharding as a pairwise problem, solves it, and writes the answer out. It needs no
device; `sharded.compile(devices)` does.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from jax.sharding import Mesh

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.graph import Graph, flat_graph
from launcher.autopar.sharding.audit import Audit, audit
from launcher.autopar.sharding.collectives import Collective
from launcher.autopar.sharding.hlo import read_collectives
from launcher.autopar.sharding.spec import Spec, to_partition_spec
from launcher.autopar.whole_graph.explain import Explanation, explain_step
from launcher.autopar.whole_graph.intra_op_options import IntraOpOptions
from launcher.autopar.whole_graph.live_bytes import peak_bytes
from launcher.autopar.whole_graph.run_sharded import run
from launcher.autopar.whole_graph.sharded_graph import collectives
from launcher.autopar.whole_graph.solve_step import SolvedStep, solve_step
from launcher.autopar.whole_graph.step_problem import StepProblem, pose
from launcher.autopar.whole_graph.step_roles import find_roles
from launcher.errors import ClusterError, ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardedFunction:
    """A function with a sharding for everything in it.

    Attributes:
        problem, solved: what was posed, and its answer.
        arguments, result: the abstract arguments, and the abstract result, as pytrees.
        argument_names: for people and for `explain`.
    """

    problem: StepProblem
    solved: SolvedStep
    options: IntraOpOptions
    arguments: tuple
    result: object
    argument_names: tuple[str, ...]

    @property
    def mesh(self) -> LogicalMesh:
        return self.problem.mesh

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """Every collective that was priced, in the order in which it runs."""
        return tuple(collectives(self.solved.sharded))

    @property
    def objective(self) -> float:
        """The cost of all collectives of one call, in the mesh's unit."""
        return math.fsum(c.times * c.cost for c in self.collectives)

    @property
    def gap_fraction(self) -> float:
        """How far from the optimum the objective may be; 0 where it is proven."""
        return self.solved.gap_fraction

    @property
    def peak_bytes_per_device(self) -> int:
        """The most that a device holds at any time."""
        return peak_bytes(self.solved.sharded)

    @cached_property
    def in_specs(self):
        """The arguments' PartitionSpecs, as a tuple of pytrees like the arguments."""
        graph, given = self.problem.region.graph, self.solved.sharded.input_specs
        leaves, structure = jax.tree.flatten(self.arguments)
        values = graph.inputs[: len(leaves)]
        specs = [self._partition_spec(given[v], x) for v, x in zip(values, leaves, strict=True)]
        return jax.tree.unflatten(structure, specs)

    @cached_property
    def out_specs(self):
        """The result's PartitionSpecs, as a pytree like the result."""
        leaves, structure = jax.tree.flatten(self.result)
        pairs = zip(self.solved.sharded.output_specs, leaves, strict=True)
        return jax.tree.unflatten(structure, [self._partition_spec(s, x) for s, x in pairs])

    def _partition_spec(self, spec: Spec, leaf):
        return to_partition_spec(spec, len(leaf.shape), self.mesh.axis_names)

    def compile(self, devices: Sequence[jax.Device]) -> jax.stages.Compiled:
        """Compile for these devices, in row-major order of the mesh.

        The result is called like the function, with arrays laid out as `in_specs` says (or with NumPy
        arrays). `as_text()` is its HLO.

        Raises:
            ClusterError: the devices are not as many as the mesh has.
        """
        return self.lower(devices).compile()

    def lower(self, devices: Sequence[jax.Device]) -> jax.stages.Lowered:
        """Lower for these devices, without compiling."""
        if len(devices) != self.mesh.num_devices:
            raise ClusterError(
                f"mesh {self.mesh.shape} has {self.mesh.num_devices} devices, but {len(devices)} were "
                f"given; pass as many devices, or plan for another mesh"
            )
        grid = np.array(devices, dtype=object).reshape(self.mesh.shape)
        structure = jax.tree.structure(self.result)

        def local(*arguments):
            return jax.tree.unflatten(
                structure, run(self.solved.sharded, jax.tree.leaves(arguments))
            )

        mapped = jax.shard_map(
            local, mesh=Mesh(grid, self.mesh.axis_names), in_specs=self.in_specs,
            out_specs=self.out_specs, check_vma=False,
        )  # fmt: skip
        return jax.jit(mapped).lower(*self.arguments)

    def audit(self, compiled: jax.stages.Compiled) -> Audit:
        """Compare what was priced with what was compiled."""
        return audit(self.collectives, read_collectives(compiled.as_text()), self.mesh)

    def explain(self, name: str) -> Explanation:
        """What an argument or op could have chosen, and what each choice would cost in all.

        Args:
            name: an argument's path (`params/w`), or an op: a primitive's name, with its number among
                its like where it is not the first (`dot_general`, `dot_general:2`).
        """
        return explain_step(self.problem, self.options, self.solved, self.argument_names, name)


def auto_shard(
    step: Callable,
    *abstract_args,
    mesh: LogicalMesh,
    options: IntraOpOptions | None = None,
) -> ShardedFunction:
    """Find the sharding of every op of `step` that communicates the least.

    Args:
        step: any function that JAX can trace: a training step with its update, a loss, a forward pass.
        abstract_args: its arguments: pytrees of arrays or `jax.ShapeDtypeStruct`.
        mesh: the devices, and what communication costs among them.

    Raises:
        ConfigError: the function cannot be traced, or an argument has no shape.
        UnsupportedPrimitiveError: an op has no sharding rule.
        InfeasiblePlanError: no sharding keeps to the options.
    """
    options = options or IntraOpOptions()
    if options.batch_axis is not None and not 0 <= options.batch_axis < mesh.num_axes:
        raise ConfigError(f"batch_axis={options.batch_axis}: the mesh has {mesh.num_axes} axes")
    arguments = _abstract(abstract_args)
    graph, result, num_inputs = _trace(step, arguments)
    roles = find_roles(
        graph, arguments, result, carry=options.carry, batch_argnums=options.batch_argnums
    )
    problem = pose(graph, num_inputs, roles, mesh, options)
    solved = solve_step(problem, options)
    if solved.gap_fraction > 0:
        log.warning(
            "the sharding may be %.2f %% from optimal: the solver ran out of time_limit_s=%g, or the "
            "memory limit binds",
            100 * solved.gap_fraction, options.time_limit_s,
        )  # fmt: skip
    return ShardedFunction(problem, solved, options, arguments, result, _names(step, arguments))


def _abstract(arguments: tuple) -> tuple:
    """Shapes and dtypes of the arguments."""

    def shape_of(path, leaf):
        try:
            return jax.eval_shape(lambda: leaf) if np.isscalar(leaf) else _struct(leaf)
        except (AttributeError, TypeError) as error:
            name = jax.tree_util.keystr(path)
            raise ConfigError(
                f"argument {name} is a {type(leaf).__name__}, which has no shape and dtype; pass arrays or "
                f"jax.ShapeDtypeStruct"
            ) from error

    return jax.tree_util.tree_map_with_path(shape_of, arguments)


def _struct(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _trace(step: Callable, arguments: tuple) -> tuple[Graph, object, int]:
    """The flat graph, the abstract result, and how many of the graph's inputs are arguments."""
    try:
        closed, result = jax.make_jaxpr(step, return_shape=True)(*arguments)
    except Exception as error:
        first_line = str(error).strip().splitlines()[:1]  # a bare `assert` says nothing
        reason = ": ".join((type(error).__name__, *first_line))
        raise ConfigError(f"the function cannot be traced: {reason}") from error
    return flat_graph(closed), result, len(jax.tree.leaves(arguments))


def _names(step: Callable, arguments: tuple) -> tuple[str, ...]:
    """The arguments' leaves by name: `params/w`, by the function's own parameter names."""
    code = step.__code__ if isinstance(step, type(_names)) else None
    own = code.co_varnames[: code.co_argcount] if code else ()
    names = []
    for number, argument in enumerate(arguments):
        head = own[number] if number < len(own) else f"arg{number}"
        for path, _ in jax.tree_util.tree_leaves_with_path(argument):
            tail = jax.tree_util.keystr(path, simple=True, separator="/")
            names.append(f"{head}/{tail}" if tail else head)
    return tuple(names)
