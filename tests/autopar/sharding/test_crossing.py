"""Planned crossings against brute force: what every device would have to hold, byte by byte."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from launcher.autopar.clusters.device import Link
from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.sharding.crossing import (
    Located,
    crossing_gather_s,
    message_s,
    plan_crossing,
    total_bytes,
)
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED, all_specs

MESHES = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1))
SHAPES = ((), (8,), (8, 4), (4, 6), (3, 5), (4, 2, 4), (1, 3, 4))
F32 = np.dtype(np.float32)
R = REPLICATED


def on_host(spec, mesh_shape, host=0, first=0):
    places = tuple((host, first + i) for i in range(math.prod(mesh_shape)))
    return Located(spec, mesh_shape, places)


def over_hosts(spec, mesh_shape, first=0):
    """A host for every row of the mesh."""
    rows, columns = mesh_shape
    return Located(
        spec, mesh_shape, tuple((first + r, c) for r in range(rows) for c in range(columns))
    )


def pairs():
    for shape, source, target in itertools.product(SHAPES, MESHES, MESHES):
        for a, b in itertools.product(all_specs(shape, source), all_specs(shape, target)):
            yield shape, source, a, target, b


def held(spec, mesh_shape, shape):
    """For every device, the elements that its shard holds, by indexing an array of their numbers."""
    for coordinates in itertools.product(*map(range, mesh_shape)):
        block = np.arange(math.prod(shape)).reshape(shape)
        for entry, size, at in zip(spec, mesh_shape, coordinates, strict=True):
            if entry >= 0:
                block = np.split(block, size, axis=entry)[at]
        yield block


def cut_out(tile, crossing):
    numbers = np.arange(math.prod(crossing.shape)).reshape(crossing.shape)
    index = tuple(slice(s, s + n) for s, n in zip(tile.start, crossing.tile_shape, strict=True))
    return set(numbers[index].ravel().tolist())


def gathered(crossing):
    """What each device of the target holds in the end, as the gathers say."""
    held_by = [set() for _ in crossing.target.places]
    for tile in crossing.tiles:
        block = cut_out(tile, crossing)
        assert not block & held_by[tile.target]  # no device is sent a byte twice
        held_by[tile.target] |= block
    grid = np.arange(len(held_by)).reshape(crossing.target.mesh_shape)
    for axis, _ in crossing.gathers:
        rows = np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis])
        merged = {int(d): set().union(*(held_by[e] for e in row)) for row in rows for d in row}
        held_by = [merged[d] for d in range(len(held_by))]
    return held_by


def test_every_pair_of_specs_gets_each_byte_from_who_has_it_to_who_wants_it():
    for shape, source, a, target, b in pairs():
        crossing = plan_crossing(shape, F32, on_host(a, source), over_hosts(b, target, first=1))
        senders = [set(block.ravel().tolist()) for block in held(a, source, shape)]
        for tile in crossing.tiles:
            assert cut_out(tile, crossing) <= senders[tile.source]
        wanted = [set(block.ravel().tolist()) for block in held(b, target, shape)]
        assert gathered(crossing) == wanted


def test_between_hosts_each_byte_crosses_once_if_the_target_can_be_fully_split():
    fully_split = 0
    for shape, source, a, target, b in pairs():
        crossing = plan_crossing(shape, F32, on_host(a, source), on_host(b, target, host=1))
        copies = Counter(e for tile in crossing.tiles for e in cut_out(tile, crossing))
        [times] = set(copies.values())
        assert len(copies) == math.prod(shape)
        assert crossing.bytes_across == crossing.bytes_between_hosts == 4 * math.prod(shape) * times
        # The most pieces that any spec of the target cuts the value into, beyond what it wants.
        assert times == math.prod(target) // most_pieces(shape, target, b)
        fully_split += times == 1 and math.prod(target) > 1
    assert fully_split > 500


def most_pieces(shape, mesh_shape, spec):
    """By brute force: put every replicated axis on any dim, or on none."""
    best = 1
    choices = [
        (entry,) if entry >= 0 else (R, *range(len(shape))) if size > 1 else (R,)
        for entry, size in zip(spec, mesh_shape, strict=True)
    ]
    for choice in itertools.product(*choices):
        counts = Counter()
        for entry, size in zip(choice, mesh_shape, strict=True):
            counts[entry] = (counts[entry] or 1) * size
        if all(d < 0 or shape[d] % n == 0 for d, n in counts.items()):
            best = max(best, math.prod(n for d, n in counts.items() if d >= 0))
    return best


def test_tiles_are_the_intersections_of_shards_and_pieces():
    for shape, source, a, target, b in pairs():
        crossing = plan_crossing(shape, F32, on_host(a, source), on_host(b, target, host=1))
        if crossing.gathers:
            continue
        shards = {frozenset(block.ravel().tolist()) for block in held(a, source, shape)}
        pieces = {frozenset(block.ravel().tolist()) for block in held(b, target, shape)}
        assert {frozenset(cut_out(t, crossing)) for t in crossing.tiles} == {
            s & p for s in shards for p in pieces if s & p
        }


def test_two_shards_to_three_are_cut_to_equal_tiles():
    crossing = plan_crossing((12,), F32, on_host((0,), (2,)), on_host((0,), (3,), host=1))
    assert crossing.tile_shape == (2,)
    assert [(t.source, t.target, t.start[0]) for t in crossing.tiles] == [
        (0, 0, 0), (0, 0, 2), (0, 1, 4), (1, 1, 6), (1, 2, 8), (1, 2, 10),
    ]  # fmt: skip


def test_replicas_share_the_sending_evenly():
    for shape, source, a, target, b in pairs():
        crossing = plan_crossing(shape, F32, on_host(a, source), on_host(b, target, host=1))
        sent = Counter(tile.source for tile in crossing.tiles)
        groups = {}
        for position, block in enumerate(held(a, source, shape)):
            groups.setdefault(block.tobytes(), []).append(sent[position])
        assert all(max(loads) - min(loads) <= 1 for loads in groups.values())


def test_a_source_on_the_targets_host_is_preferred():
    """Both submeshes have half of the devices of two hosts."""
    source = Located((R, R), (2, 2), ((0, 0), (0, 1), (1, 0), (1, 1)))
    target = Located((0, R), (2, 2), ((1, 2), (1, 3), (0, 2), (0, 3)))
    crossing = plan_crossing((8, 4), F32, source, target)
    assert crossing.bytes_between_hosts == 0
    assert crossing.bytes_across == 8 * 4 * 4


def test_megatrons_pattern_is_split_between_hosts_and_not_inside_one():
    """Activations whole along the tensor axis on both sides: scatter, send, gather."""
    far = plan_crossing((8, 16), F32, on_host((0, R), (1, 4)), on_host((0, R), (1, 4), host=1))
    assert [(t.source, t.target) for t in far.tiles] == [(i, i) for i in range(4)]
    assert far.gathers == ((1, 0),)
    assert (far.bytes_across, far.gathered_bytes) == (512, 4 * 512 * 3 // 4)
    near = plan_crossing((8, 16), F32, on_host((0, R), (1, 4)), on_host((0, R), (1, 4), first=4))
    assert near.gathers == ()
    assert near.bytes_across == 4 * 512
    fan_out = plan_crossing((8, 16), F32, on_host((R, R), (1, 1)), on_host((R, R), (1, 4), first=4))
    assert (fan_out.bytes_across, len(fan_out.gathers)) == (512, 1)


def test_what_stays_on_its_device_does_not_count():
    same = on_host((0, R), (2, 2))
    assert plan_crossing((8, 4), F32, same, same).bytes_across == 0
    # Rows to columns on four devices: each keeps a quarter of its shard.
    turned = plan_crossing((8, 4), F32, on_host((0,), (4,)), on_host((1,), (4,)))
    assert turned.bytes_across == 8 * 4 * 4 * 3 // 4


def test_partial_values_and_uneven_shards_are_refused():
    whole = on_host((R, R), (2, 2))
    with pytest.raises(ValueError, match="axis0:P: an unreduced sum does not cross"):
        plan_crossing((4,), F32, on_host((PARTIAL, R), (2, 2)), whole)
    with pytest.raises(ValueError, match=r"axis1:0 on a mesh of \(2, 2\) does not divide \(3,\)"):
        plan_crossing((3,), F32, whole, on_host((R, 0), (2, 2)))


@pytest.fixture
def links(cpu8):
    return replace(
        cpu8,
        intra_host=Link(bytes_per_s=1000.0, latency_s=1.0),
        inter_host=Link(bytes_per_s=100.0, latency_s=5.0),
    )


def test_a_message_takes_what_its_busiest_link_takes(links):
    mesh = LogicalMesh(shape=(1, 4), alpha=(0.0, 1.0), beta=(0.0, 1e-3))
    far = plan_crossing((8, 16), F32, on_host((0, R), (1, 4)), on_host((0, R), (1, 4), host=1))
    # 512 bytes leave the host over its one link; the ring gathers 3/4 of them in 3 hops.
    gather_s = 3 * 1.0 + 512 * 3 / 4 * 1e-3
    assert crossing_gather_s(far, mesh) == pytest.approx(gather_s)
    assert message_s([far], links, mesh) == pytest.approx(5.0 + 512 / 100 + gather_s)
    assert message_s([far, far], links, mesh) == pytest.approx(5 + 1024 / 100 + 2 * gather_s)
    # Inside the host four links work at the same time.
    near = plan_crossing((8, 16), F32, on_host((R, 0), (1, 4)), on_host((R, 0), (1, 4), first=4))
    assert message_s([near], links, mesh) == pytest.approx(1.0 + 128 / 1000)
    # Two hosts' links, too.
    wide = plan_crossing((8, 16), F32, over_hosts((0, R), (2, 1)), over_hosts((0, R), (2, 1), 2))
    assert message_s([wide], links, mesh) == pytest.approx(5.0 + 256 / 100)
    assert message_s([], links, mesh) == 0.0
    assert total_bytes([far, near]) == 512 + 4 * 384 + 512
