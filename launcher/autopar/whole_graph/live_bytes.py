"""How much memory a device holds while it runs a `ShardedGraph`: shards, from making to last use.

Inputs are held throughout and results from when they are made, as a compiled function that donates
nothing holds them. A loop adds the most that its body holds. Left out: what XLA's fusion never
materialises (so this is an upper estimate for elementwise chains), and the buffers of collectives.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from jax.extend.core import Literal

from launcher.autopar.graphs.graph import Value
from launcher.autopar.sharding.spec import Spec, local_shape
from launcher.autopar.whole_graph.sharded_graph import Apply, Loop, Move, Read, Shard, ShardedGraph


def live_bytes(sharded: ShardedGraph) -> list[int]:
    """Bytes per device while each instruction runs."""
    end = len(sharded.instructions)
    last = _last_uses(sharded) | dict.fromkeys(sharded.input_specs.items(), end)
    change: dict[int, int] = defaultdict(int)
    for shard, made in _made(sharded).items():
        num_bytes = shard_bytes(sharded, *shard)
        change[made] += num_bytes
        change[last.get(shard, made) + 1] -= num_bytes
    held = itertools.accumulate(change[at] for at in range(end))
    pairs = zip(held, sharded.instructions, strict=True)
    return [now + _inside(instruction) for now, instruction in pairs]


def _made(sharded: ShardedGraph) -> dict[Shard, int]:
    """Every shard with the instruction that makes it; inputs are there from the start."""
    found: dict[Shard, int] = dict.fromkeys(sharded.input_specs.items(), 0)
    for at, instruction in enumerate(sharded.instructions):
        for shard in instruction.makes():
            found.setdefault(shard, at)
    return found


def _inside(instruction: Move | Apply | Loop) -> int:
    """The most that the body of a loop holds."""
    return max(map(peak_bytes, instruction.bodies)) if isinstance(instruction, Loop) else 0


def peak_bytes(sharded: ShardedGraph) -> int:
    """The most that a device holds at any time."""
    inputs = sum(shard_bytes(sharded, v, spec) for v, spec in sharded.input_specs.items())
    return max(live_bytes(sharded), default=inputs)


def shard_bytes(sharded: ShardedGraph, value: Value, spec: Spec) -> int:
    """Bytes of one device's shard of a value."""
    aval = sharded.graph.avals[value]
    return aval.dtype.itemsize * math.prod(local_shape(spec, aval.shape, sharded.mesh.shape))


def _last_uses(sharded: ShardedGraph) -> dict[Shard, int]:
    found: dict[Shard, int] = {}
    for at, instruction in enumerate(sharded.instructions):
        found |= dict.fromkeys(_values_of(instruction.reads()), at)
    outputs = zip(sharded.graph.outputs, sharded.output_specs, strict=True)
    return found | dict.fromkeys(_values_of(outputs), len(sharded.instructions))


def _values_of(reads: Iterable[Read]) -> list[Shard]:
    """Literals take no memory."""
    return [(operand, spec) for operand, spec in reads if not isinstance(operand, Literal)]


def live_ranges(sharded: ShardedGraph) -> Mapping[Value, tuple[int, int]]:
    """Value -> the first and last instruction at which some shard of it is held."""
    end = len(sharded.instructions)
    first: dict[Value, int] = dict.fromkeys(sharded.input_specs, 0)
    for at, instruction in enumerate(sharded.instructions):
        if not isinstance(instruction, Move):
            for value in instruction.op.results:
                first[value] = at
    final: dict[Value, int] = {}
    for (value, _), at in _last_uses(sharded).items():
        final[value] = max(at, final.get(value, 0))
    final |= dict.fromkeys(sharded.input_specs, end)
    return {value: (at, final.get(value, at)) for value, at in first.items()}
