"""The temporary buffers of a layer's passes: what lives beside inputs and results at the worst moment.

A pass is written down line by line, on local shards and with its resharding steps, as the emitter writes
it; then it is decided which values get a buffer, and in which order the lines run, as XLA's CPU backend does
it, which emulated devices are measured on:

    fusion      an elementwise op whose readers are all elementwise is computed inside them, if it has one
                reader or is cheap enough to be computed several times; reshapes are views
    layout      a matrix product reads copies of operands whose dims it cannot take as they lie
    order       first come, first served
    reuse       an elementwise op takes the place of an operand of its size that nothing reads afterwards

GPUs copy less for matrix products and order for less memory: there this is an upper estimate. Left out:
scratch of matrix products and convolutions, alignment, and fusion with reductions.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from jax.extend.core import primitives as prim

from launcher.autopar.copies import Copies
from launcher.autopar.graph import Op, Value
from launcher.autopar.mesh import LogicalMesh
from launcher.autopar.reshard import Kind
from launcher.autopar.rules import Strategy
from launcher.autopar.spec import Spec, num_shards
from launcher.autopar.work import aval_bytes

Order = tuple[int, ...] | None
Buffer = tuple[Value, Spec, Order]
"""A value under a spec, its dims as they are (None), reordered, or () for as many as a product takes."""

_CHEAP = frozenset(
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
_DEAR = frozenset(
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
_VIEWS = frozenset(["expand_dims", "reshape", "squeeze", "stop_gradient"])
_MOVES = frozenset(
    [
        "broadcast_in_dim",
        "concatenate",
        "dynamic_slice",
        "gather",
        "iota",
        "pad",
        "rev",
        "slice",
        "transpose",
    ]
)
_GATHERS = frozenset((Kind.ALL_GATHER.value, Kind.SLICE.value))
_IN_PLACE = (_CHEAP | _DEAR | {Kind.ALL_REDUCE.value, Kind.MASK.value}) - _MOVES - _VIEWS


@dataclass(frozen=True, slots=True)
class Line:
    """One op, resharding step or copy."""

    name: str
    reads: tuple[Buffer, ...]
    makes: tuple[Buffer, ...]

    @property
    def computes_operands(self) -> bool:
        """Whether it can compute what it reads on the way."""
        return self.name in _CHEAP or self.name in _DEAR


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
            reads = [
                self._as_needed(op, i, self.get(operand, strategy.operand_spec(i)))
                for i, operand in enumerate(op.operands)
                if isinstance(operand, Value)
            ]
            makes = [(value, strategy.result_spec(i), None) for i, value in enumerate(op.results)]
            self._write(str(op.primitive), reads, makes)
            if _makes_matrix(op):
                self._flat.update(op.results)
            for value, spec, _ in makes:
                self._copies.put(value, spec)

    def accumulate(self, buffer: Buffer) -> None:
        """Add a value to one that has a buffer elsewhere, in place."""
        self._write("add", [buffer], [])

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
        if name in _VIEWS and reads:
            source = self._viewed.get(reads[0], reads[0])
            self._viewed |= dict.fromkeys(makes, source)
        self.lines.append(Line(name, tuple(dict.fromkeys(reads)), tuple(makes)))

    def _as_needed(self, op: Op, index: int, buffer: Buffer) -> Buffer:
        """What a matrix product reads: a copy of its operand where the dims do not lie as it needs."""
        order = _needed_order(op, index)
        if order is None:
            return buffer
        value, spec, _ = buffer
        copy = (value, spec, order)
        if copy not in self._made:  # a copy of a view is another view
            source = self._viewed.get(buffer, buffer)
            self._write("transpose" if order else "reshape", [source], [copy])
        return copy


def _makes_matrix(op: Op) -> bool:
    """Whether a matrix product without batch dims has a result of more than two dims."""
    if op.primitive is not prim.dot_general_p or op.eqn.outvars[0].aval.ndim <= 2:
        return False
    _, (batch, _) = op.eqn.params["dimension_numbers"]
    return not batch


def _needed_order(op: Op, index: int) -> Order:
    """How the dims of a product's operand must lie; None where they do, () where they become two.

    With batch dims each operand becomes (batch, free, contracted). Without them a product takes operands
    as they are, unless both are contracted over their first dims, as for the gradient of a weight: then
    one of them is transposed.
    """
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


def temporary_bytes(
    tape: Tape, made: Iterable[Buffer] = (), *, there: Iterable[Buffer] = (),
    lasting: Iterable[Buffer] = (), is_call: bool = False,
) -> float:  # fmt: skip
    """The most that the lines hold.

    Args:
        is_call: whether the lines are a call of their own in a program (`apart`).
        made: results with buffers elsewhere, which do not count.
        there: what the program holds before the first line, until it is read for the last time.
        lasting: what is made and held until the end.
    """
    elsewhere, lasting = set(made), set(lasting)
    lines = list(_first_come(_with_buffers(tape, elsewhere | lasting), is_call=is_call))
    last = {buffer: at for at, line in enumerate(lines) for buffer in line.reads}
    last |= dict.fromkeys(lasting, len(lines))
    live = {buffer: tape.bytes(buffer) for buffer in there if buffer in last}
    now = most = sum(live.values())
    for at, line in enumerate(lines):
        dying = {b for b in line.reads if b in live and last[b] == at}
        for buffer in line.makes:
            if buffer in elsewhere:
                continue
            size = live[buffer] = tape.bytes(buffer)
            now += size
            shape = tape.shape(buffer)
            reused = next((b for b in dying if live[b] == size and tape.shape(b) == shape), None)
            if reused is not None and line.name in _IN_PLACE:
                dying.remove(reused)
                now -= live.pop(reused)
        most = max(most, now)
        for buffer in (*dying, *(b for b in line.makes if b in live and b not in last)):
            now -= live.pop(buffer)
    return most


def _with_buffers(tape: Tape, results: set[Buffer]) -> list[Line]:
    """The lines that make buffers; what is computed inside a line passes what it reads on to it."""
    computed_inside = _Fusion(tape, results).inside
    inside: dict[Buffer, tuple[Buffer, ...]] = {}
    found = []
    for at, line in enumerate(tape.lines):
        reads = tuple(dict.fromkeys(b for r in line.reads for b in inside.get(r, (r,))))
        if at in computed_inside:
            inside |= dict.fromkeys(line.makes, reads)
        else:
            found.append(Line(line.name, reads, line.makes))
    return found


class _Fusion:
    """Which lines are computed where they are read, and in which lines that is; decided from the end.

    Attributes:
        inside: the lines that make no buffer.
    """

    def __init__(self, tape: Tape, results: set[Buffer]):
        self.lines, self.results = tape.lines, results
        self.makers = {buffer: line for line in tape.lines for buffer in line.makes}
        self.readers: dict[Buffer, list[int]] = defaultdict(list)
        for at, line in enumerate(tape.lines):
            for buffer in line.reads:
                self.readers[buffer].append(at)
        self.inside: set[int] = set()
        self._places: dict[int, frozenset[int]] = {}  # where a line is computed in the end
        self._takes: dict[int, bool] = {}  # whether a line can compute what it reads on the way
        for at in reversed(range(len(tape.lines))):
            self._decide(at)

    def _decide(self, at: int) -> None:
        line = self.lines[at]
        readers = {reader for buffer in line.makes for reader in self.readers[buffer]}
        places = frozenset().union(*(self._places[reader] for reader in readers))
        is_taken = all(self._takes[reader] for reader in readers)
        fits = (self._has_none(line, buffer, is_taken, len(places)) for buffer in line.makes)
        if line.makes and all(fits):
            self.inside.add(at)
            self._places[at] = places
            self._takes[at] = is_taken if line.name in _VIEWS else line.computes_operands
        else:
            self._places[at] = frozenset([at])
            self._takes[at] = line.computes_operands

    def _has_none(self, line: Line, buffer: Buffer, is_taken: bool, num_places: int) -> bool:
        """Whether what a line makes is computed where it is read."""
        if buffer in self.results:
            return False
        if line.name in _VIEWS:
            # XLA computes a cheap value once for each shape in which it is read.
            return is_taken or not self._is_cheap(line)
        if not is_taken:
            return False
        if line.name == "broadcast_in_dim" and _is_reduced(line, self.makers):
            # What is computed together with a matrix product computes no broadcasts of reductions.
            readers = (self.lines[reader] for reader in self.readers[buffer])
            return not any(_joins_product(reader, self.makers) for reader in readers)
        return line.name in _CHEAP or (line.name in _DEAR and num_places == 1)

    def _is_cheap(self, view: Line) -> bool:
        """Whether a view is of what a cheap op makes."""
        maker = self.makers.get(view.reads[0])
        while maker is not None and maker.name in _VIEWS:
            maker = self.makers.get(maker.reads[0])
        return maker is not None and maker.name in _CHEAP


def _is_reduced(line: Line, makers: Mapping[Buffer, Line]) -> bool:
    """Whether a line reads a reduction, or a view of one."""
    sources = [makers[b] for b in line.reads if b in makers]
    return any(
        source.name.startswith("reduce_")
        or (source.name in _VIEWS | {"broadcast_in_dim"} and _is_reduced(source, makers))
        for source in sources
    )


def _joins_product(line: Line, makers: Mapping[Buffer, Line]) -> bool:
    """Whether a line also reads what a matrix product makes."""
    return any(b in makers and makers[b].name == "dot_general" for b in line.reads)


def _first_come(lines: Sequence[Line], *, is_call: bool) -> Iterator[Line]:
    """A queue of lines whose operands are there.

    Inputs are gathered when they are first read; those of a call when it begins.
    """
    makers = {buffer: line for line in lines for buffer in line.makes}
    gathers = {b: line for b, line in makers.items() if line.name in _GATHERS and not is_call}
    gathers = {
        b: g for b, g in gathers.items() if all(r not in makers or r in gathers for r in g.reads)
    }
    readers: dict[Buffer, list[int]] = defaultdict(list)
    missing = {}
    for at, line in enumerate(lines):
        if not any(b in gathers for b in line.makes):
            waits = [b for b in line.reads if b in makers and b not in gathers]
            missing[at] = len(waits)
            for buffer in waits:
                readers[buffer].append(at)
    ready = deque(at for at, count in missing.items() if not count)
    while ready:
        line = lines[ready.popleft()]
        yield from _gathered(line, gathers)
        yield line
        for reader in (at for buffer in line.makes for at in readers[buffer]):
            missing[reader] -= 1
            if not missing[reader]:
                ready.append(reader)


def _gathered(line: Line, gathers: dict[Buffer, Line]) -> Iterator[Line]:
    """The gathers of inputs that a line is the first to need, taken from `gathers`."""
    for buffer in line.reads:
        gather = gathers.pop(buffer, None)
        if gather is not None:
            yield from _gathered(gather, gathers)
            yield gather
