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

from launcher.autopar.intra_op.tape import CHEAP, DEAR, VIEWS, Buffer, Line, Tape
from launcher.autopar.sharding.reshard import Kind

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
_IN_PLACE = (CHEAP | DEAR | {Kind.ALL_REDUCE.value, Kind.MASK.value}) - _MOVES - VIEWS


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
        if len(readers) == 1:  # as most have
            (reader,) = readers
            places, is_taken = self._places[reader], self._takes[reader]
        else:
            places = frozenset().union(*(self._places[reader] for reader in readers))
            is_taken = all(self._takes[reader] for reader in readers)
        fits = (self._has_none(line, buffer, is_taken, len(places)) for buffer in line.makes)
        if line.makes and all(fits):
            self.inside.add(at)
            self._places[at] = places
            self._takes[at] = is_taken if line.name in VIEWS else line.computes_operands
        else:
            self._places[at] = frozenset([at])
            self._takes[at] = line.computes_operands

    def _has_none(self, line: Line, buffer: Buffer, is_taken: bool, num_places: int) -> bool:
        """Whether what a line makes is computed where it is read."""
        if buffer in self.results:
            return False
        if line.name in VIEWS:
            # XLA computes a cheap value once for each shape in which it is read.
            return is_taken or not self._is_cheap(line)
        if not is_taken:
            return False
        if line.name == "broadcast_in_dim" and _is_reduced(line, self.makers):
            # What is computed together with a matrix product computes no broadcasts of reductions.
            readers = (self.lines[reader] for reader in self.readers[buffer])
            return not any(_joins_product(reader, self.makers) for reader in readers)
        return line.name in CHEAP or (line.name in DEAR and num_places == 1)

    def _is_cheap(self, view: Line) -> bool:
        """Whether a view is of what a cheap op makes."""
        maker = self.makers.get(view.reads[0])
        while maker is not None and maker.name in VIEWS:
            maker = self.makers.get(maker.reads[0])
        return maker is not None and maker.name in CHEAP


def _is_reduced(line: Line, makers: Mapping[Buffer, Line]) -> bool:
    """Whether a line reads a reduction, or a view of one."""
    sources = [makers[b] for b in line.reads if b in makers]
    return any(
        source.name.startswith("reduce_")
        or (source.name in VIEWS | {"broadcast_in_dim"} and _is_reduced(source, makers))
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
