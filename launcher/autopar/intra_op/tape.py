"""A pass of a layer written down line by line, on local shards and with its resharding steps, as the emitter
writes it, and with the copies that matrix products read.

What of it gets a buffer, and in which order the lines run, is `workspace`'s part.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from jax.extend.core import primitives as prim

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.graph import Op, Value
from launcher.autopar.graphs.work import aval_bytes
from launcher.autopar.sharding.copies import Copies
from launcher.autopar.sharding.reshard import Kind
from launcher.autopar.sharding.rules import Strategy
from launcher.autopar.sharding.spec import Spec, num_shards

Order = tuple[int, ...] | None
Buffer = tuple[Value, Spec, Order]
"""A value under a spec, its dims as they are (None), reordered, or () for as many as a product takes."""

CHEAP = frozenset(
    [
        "abs",
        "add",
        "add_any",
        "and",
        "bitcast_convert_type",
        "broadcast_in_dim",
        "ceil",
        "clamp",
        "convert_element_type",
        "copy",
        "dynamic_slice",
        "eq",
        "expand_dims",
        "floor",
        "ge",
        "gt",
        "imag",
        "iota",
        "is_finite",
        "le",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "not",
        "or",
        "real",
        "reshape",
        "rev",
        "round",
        "select_n",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "slice",
        "square",
        "squeeze",
        "stop_gradient",
        "sub",
        "transpose",
        "xor",
    ]
)
DEAR = frozenset(
    [
        "acos",
        "asin",
        "atan",
        "atan2",
        "cbrt",
        "concatenate",
        "cos",
        "cosh",
        "div",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "gather",
        "integer_pow",
        "log",
        "log1p",
        "logistic",
        "pad",
        "pow",
        "rem",
        "rsqrt",
        "sin",
        "sinh",
        "sqrt",
        "tan",
        "tanh",
    ]
)
VIEWS = frozenset(["expand_dims", "reshape", "squeeze", "stop_gradient"])


@dataclass(frozen=True, slots=True)
class Line:
    """One op, resharding step or copy."""

    name: str
    reads: tuple[Buffer, ...]
    makes: tuple[Buffer, ...]

    @property
    def computes_operands(self) -> bool:
        """Whether it can compute what it reads on the way."""
        return self.name in CHEAP or self.name in DEAR


class Tape:
    """The lines of a pass, in the order of writing.

    `via` says to which spec a value is brought before its readers are served.
    """

    def __init__(self, avals: Sequence, mesh: LogicalMesh):
        self.avals, self.mesh = avals, mesh
        self.via: Mapping[Value, Spec] = {}
        self.lines: list[Line] = []
        self._copies = Copies(avals, mesh)
        self._made: set[Buffer] = set()
        self._flat: set[Value] = set()  # made as matrices, whatever their dims
        self._viewed: dict[Buffer, Buffer] = {}  # what a view is of, which is no view itself

    def put(self, value: Value, spec: Spec) -> None:
        """A value that is there before the first line."""
        self._copies.put(value, spec)

    def get(self, value: Value, spec: Spec) -> Buffer:
        """Bring a value to a spec."""
        for step in self._copies.steps(value, spec, self.via.get(value)):
            source, target = (value, step.source, None), (value, step.target, None)
            if step.kind is Kind.ALL_GATHER and step.source[step.axis] > 0:
                stacked = (value, step.target, self._stacked(value, step.source[step.axis]))
                self._write(step.kind.value, [source], [stacked])
                self._write("transpose", [stacked], [target])
            else:
                self._write(step.kind.value, [source], [target])
        return value, spec, None

    def _stacked(self, value: Value, dim: int) -> tuple[int, ...]:
        """How shards lie that are gathered one after the other, along a dim that is not the first."""
        dims = range(len(self.avals[value].shape))
        return (dim, *(d for d in dims if d != dim))

    def run(self, ops: Iterable[tuple[Op, Strategy]]) -> None:
        """Write ops with their strategies."""
        for op, strategy in ops:
            form = _form(op)
            reads = [
                self._as_needed(order, self.get(op.operands[i], strategy.operand_spec(i)))
                for i, order in form.reads
            ]
            if form.is_swapped:
                reads = [self._unreversed(buffer) for buffer in reads]
            makes = [(value, strategy.result_spec(i), None) for i, value in enumerate(op.results)]
            self._write(form.name, reads, makes)
            if form.makes_matrix:
                self._flat.update(op.results)
            for value, spec, _ in makes:
                self._copies.put(value, spec)

    def accumulate(self, buffer: Buffer) -> None:
        """Add a value to one that has a buffer elsewhere, in place.

        XLA scatters into that buffer what would be scattered into zeros first.
        """
        maker = self._maker(buffer, "scatter-add")
        before = self.lines
        if maker is not None:
            self._drop(maker)
            zeros = self._maker(maker.reads[0], "broadcast_in_dim")
            if zeros is not None and not zeros.reads:
                self._drop(zeros)
                self._write("scatter-add", maker.reads[1:], [])
                return
        self.lines = before
        self._write("add", [buffer], [])

    def _unreversed(self, buffer: Buffer) -> Buffer:
        """What a kernel is the reverse of, if it is one: what reads it reads it backwards."""
        maker = self._maker(buffer, "rev")
        if maker is None:
            return buffer
        self._drop(maker)
        return maker.reads[0]

    def _maker(self, buffer: Buffer, name: str) -> Line | None:
        """The line of some name that makes a buffer nobody has read yet."""
        if any(buffer in line.reads for line in self.lines):
            return None
        return next((x for x in self.lines if x.name == name and buffer in x.makes), None)

    def _drop(self, *lines: Line) -> None:
        self.lines = [line for line in self.lines if all(line is not other for other in lines)]

    def bytes(self, buffer: Buffer) -> float:
        value, spec, _ = buffer
        return aval_bytes(self.avals[value]) / num_shards(spec, self.mesh.shape)

    def shape(self, buffer: Buffer) -> tuple[int, ...]:
        """As the buffer has it, before it is sharded: matrix products work on two dims."""
        value, _, order = buffer
        dims = self.avals[value].shape
        if order:
            return tuple(dims[d] for d in order)
        return dims if order is None and value not in self._flat else ()

    def _write(self, name: str, reads: Sequence[Buffer], makes: Sequence[Buffer]) -> None:
        if makes and self._made.issuperset(makes):
            return  # a cheap op that the backward pass repeats: XLA merges the two
        self._made.update(makes)
        if name in VIEWS and reads:
            source = self._viewed.get(reads[0], reads[0])
            self._viewed |= dict.fromkeys(makes, source)
        self.lines.append(Line(name, tuple(dict.fromkeys(reads)), tuple(makes)))

    def _as_needed(self, order: Order, buffer: Buffer) -> Buffer:
        """What a matrix product reads: a copy of its operand where the dims do not lie as it needs."""
        if order is None:
            return buffer
        value, spec, _ = buffer
        copy = (value, spec, order)
        if copy not in self._made:  # a copy of a view is another view
            source = self._viewed.get(buffer, buffer)
            if order:  # the copy itself turns round what is reversed
                source = self._unreversed(source)
            self._write("transpose" if order else "reshape", [source], [copy])
        return copy


@dataclass(frozen=True, slots=True)
class _Form:
    """What is the same of an op on every tape.

    Attributes:
        reads: the operands that are values, and how their dims must lie.
    """

    name: str
    reads: tuple[tuple[int, Order], ...]
    is_swapped: bool
    makes_matrix: bool


@lru_cache(maxsize=2**16)
def _form(op: Op) -> _Form:
    places = [i for i, operand in enumerate(op.operands) if isinstance(operand, Value)]
    return _Form(
        name=str(op.primitive),
        reads=tuple((i, _needed_order(op, i)) for i in places),
        is_swapped=_is_swapped(op),
        makes_matrix=_makes_matrix(op),
    )


def _is_swapped(op: Op) -> bool:
    """Whether a convolution's kernel is larger than its input: XLA lets them change places."""
    if op.primitive is not prim.conv_general_dilated_p:
        return False
    numbers = op.eqn.params["dimension_numbers"]
    sizes = (
        math.prod(atom.aval.shape[dim] for dim in spec[2:])
        for atom, spec in zip(op.eqn.invars, (numbers.lhs_spec, numbers.rhs_spec), strict=True)
    )
    input_size, kernel_size = sizes
    return kernel_size > input_size


def _makes_matrix(op: Op) -> bool:
    """Whether a matrix product without batch dims has a result of more than two dims."""
    if op.primitive is not prim.dot_general_p or op.eqn.outvars[0].aval.ndim <= 2:
        return False
    _, (batch, _) = op.eqn.params["dimension_numbers"]
    return not batch


def _needed_order(op: Op, index: int) -> Order:
    """How the dims of an operand must lie; None where they do, () where they become two.

    A convolution has channels last (`rules/convolution.py`). With batch dims each operand of a product
    becomes (batch, free, contracted). Without them a product takes operands as they are, unless both are
    contracted over their first dims, as for the gradient of a weight: then one of them is transposed.
    """
    if op.primitive is prim.conv_general_dilated_p:
        return _channels_last(op) if index == 1 else None
    if op.primitive is not prim.dot_general_p or index > 1:
        return None
    contracted, batch = (tuple(map(tuple, dims)) for dims in op.eqn.params["dimension_numbers"])
    rank = op.eqn.invars[index].aval.ndim
    free = tuple(d for d in range(rank) if d not in (*contracted[index], *batch[index]))
    if batch[index]:
        in_front = batch[index] == tuple(range(len(batch[index])))
        return None if in_front else (*batch[index], *free, *contracted[index])
    ranks = [atom.aval.ndim for atom in op.eqn.invars[:2]]
    leading = all(n - 1 not in dims for n, dims in zip(ranks, contracted, strict=True))
    if leading and index == 0:
        return (*free, *contracted[index])
    return () if rank > 2 else None


def _channels_last(op: Op) -> Order:
    """The dims of a convolution's second operand, if they do not lie so; the first is made as it must be."""
    out, into, *window = op.eqn.params["dimension_numbers"].rhs_spec
    order = (*window, into, out)
    return None if order == tuple(range(len(order))) else order
