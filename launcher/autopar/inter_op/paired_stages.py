"""Two virtual stages on each submesh: a bound that knows which layers share devices and memory.

With p submeshes, submesh j runs stages j and p + j. With t = F + B of a stage, c of the cut before it, both
ways, and m microbatches, a step takes at least, for each j (a longest path through the simulator's graph),

    sum of t + c before j,  then c_j + m (t_j + t_p+j)                                      its work
    the same                     + the way of the first microbatch from F_j to B_p+j, less
                                   the forwards that the submesh runs until then            and the first wait
    the same                     + the way of the last one from F_p+j to B_j, less
                                   the backwards that the submesh runs until then           or the last one

The boundaries of j and of p + j are chosen together, from the last j to the first, by a DP whose states are
where both stages begin; the options of the two are those that fit into a device together:

    G(j, a, c) = least over ends b, d of  max(line of j,  t_j + c_j + G(j + 1, b, d))

for every layer at which stage p may begin. Left out: more than two virtual stages; that the ways between
stages, and t_j where it goes before others, take options of their own; spaces with too many pieces.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from launcher.autopar.inter_op.pace import busy_s
from launcher.autopar.inter_op.stage_table import Pieces, microbatch_time_s, unbeaten
from launcher.autopar.programs.schedules import Interleaved

_MOST_ENTRIES = 4e7  # of all tables: a second or so


def paired_stages_s(
    pieces: Pieces, rows: np.ndarray, schedule: Interleaved, num_microbatches: int, memory_bytes: float
) -> float:  # fmt: skip
    """The bound of the module's head; 0 where the space is too large for it, and on one submesh, whose stages
    send nothing.

    Args:
        rows: those that fit into memory, as `stage_table.that_fit` returns them.
    """
    is_one = pieces.num_stages == schedule.virtual_stages
    if schedule.virtual_stages != 2 or is_one or not len(rows):
        return 0.0
    pairing = _Pairing(pieces, rows, schedule, num_microbatches, memory_bytes)
    return pairing.least_s() if pairing.is_small else 0.0


@dataclass(frozen=True, slots=True)
class _Pairing:
    pieces: Pieces
    rows: np.ndarray
    schedule: Interleaved
    num_microbatches: int
    memory_bytes: float

    @property
    def submeshes(self) -> int:
        return self.pieces.num_stages // 2

    @property
    def is_small(self) -> bool:
        splits = self.pieces.num_pieces - 2 * self.submeshes + 1
        entries = (self.pieces.num_pieces + 1) ** 4 * self.submeshes * (splits + 1)
        return entries <= _MOST_ENTRIES

    def least_s(self) -> float:
        """The least over the layers at which stage p may begin."""
        p, end = self.submeshes, self.pieces.num_pieces
        lines, ways = [self._line(j) for j in range(p)], _Ways.of(self.rows, end, p)
        return min(self._split_at(split, lines, ways) for split in range(p, end - p + 1))

    def _split_at(self, split: int, lines: list["_Line"], ways: "_Ways") -> float:
        p, end = self.submeshes, self.pieces.num_pieces
        behind_s = np.full((end + 1, end + 1), np.inf)
        behind_s[split, end] = 0.0
        for j in reversed(range(p)):
            behind_it_s = ways.there_and_back_s[p - 1 - j][:, end]
            first_s, last_s = (
                through_s[p - 1 - j][:, split, None, None]  # from the end of stage j to stage p
                + through_s[j][split, :, None]  # from there to stage p + j
                + behind_it_s
                for through_s in (ways.forth_s, ways.back_s)
            )
            line_s = lines[j].longest_s(first_s, last_s)
            before_s = ways.there_and_back_s[1][:, :, None, None] + behind_s[:, None, :]
            behind_s = np.maximum(line_s, before_s).min(axis=(1, 3))
        return float(behind_s[0, split])

    def _line(self, j: int) -> "_Line":
        """The lines of submesh j, by the pieces (a, b, c, d) of its stages, without the ways."""
        ahead = self._ahead(j)
        first, second = self._own(j, ahead[0]), self._own(self.submeshes + j, ahead[1])
        one, two = (n.ravel() for n in np.indices((len(first), len(second))))
        fits = first["end"][one] <= second["start"][two]
        one, two = first[one[fits]], second[two[fits]]
        fits = self._fit_together(j, one, two)
        one, two = one[fits], two[fits]
        work_s = one["received_s"] + self.num_microbatches * (busy_s(one) + busy_s(two))
        first_s, last_s = (
            two["received_s"] / 2 + (1 - ahead[0]) * one[way] + (1 - ahead[1]) * two[way]
            for way in ("forward_s", "backward_s")
        )
        waits_s = [0.0, first_s, last_s]
        if sum(ahead) < 2 * self.num_microbatches:
            waits_s.append(first_s + last_s)  # the first backward comes before the last forward
        place = (one["start"], one["end"], two["start"], two["end"])
        return _Line(*(self._least(place, work_s + wait_s) for wait_s in waits_s))

    def _own(self, stage: int, ahead: int) -> np.ndarray:
        """What a stage may be, without options that another one of the same pieces beats."""
        rows = self.rows[self.rows["fits"][:, self.pieces.num_stages - 1 - stage]]
        places = np.flatnonzero(np.diff(rows["start"]) | np.diff(rows["end"])) + 1
        forward_s, backward_s = rows["forward_s"], rows["backward_s"]
        costs = np.stack(
            (
                busy_s(rows),
                *(
                    self.num_microbatches * busy_s(rows) + (1 - ahead) * waited_s
                    for waited_s in (forward_s, backward_s, forward_s + backward_s)
                ),
                rows["fixed_bytes"] + self._held(stage) * rows["stash_bytes"],
                rows["workspace_bytes"],
                rows["fixed_bytes"] + rows["gradient_bytes"],
            ),
            axis=1,
        )
        groups = np.split(np.arange(len(rows)), places)
        return rows[np.concatenate([group[unbeaten(costs[group])] for group in groups])]

    def _held(self, stage: int) -> int:
        return self.schedule.stash_peak(stage, self.pieces.num_stages, self.num_microbatches)

    def _fit_together(self, j: int, one: np.ndarray, two: np.ndarray) -> np.ndarray:
        fixed_bytes = one["fixed_bytes"] + two["fixed_bytes"]
        running_bytes = np.maximum(one["workspace_bytes"], two["workspace_bytes"])  # one at a time
        for stage, rows in ((j, one), (self.submeshes + j, two)):
            running_bytes = running_bytes + self._held(stage) * rows["stash_bytes"]
        ending_bytes = one["gradient_bytes"] + two["gradient_bytes"]
        return fixed_bytes + np.maximum(running_bytes, ending_bytes) <= self.memory_bytes

    def _ahead(self, j: int) -> tuple[int, int]:
        """How many forwards each stage of submesh j has run when its first backward may begin.

        As many of the one's backwards are left when the last forward has ended.
        """
        p, total = self.submeshes, 2 * self.num_microbatches
        ahead = min(2 * (p - 1 - j) + p + 1, total)
        groups, rest = divmod(ahead, 2 * p)
        return groups * p + min(rest, p), groups * p + max(rest - p, 0)

    def _least(self, place: tuple[np.ndarray, ...], values: np.ndarray) -> np.ndarray:
        least = np.full((self.pieces.num_pieces + 1,) * 4, np.inf)
        np.minimum.at(least, place, values)
        return least


@dataclass(frozen=True, slots=True)
class _Line:
    """What the work of a submesh takes, alone and with what it waits for, but for the ways; infinite where
    nothing fits.
    """

    work_s: np.ndarray
    first_s: np.ndarray
    last_s: np.ndarray
    both_s: np.ndarray | None = None

    def longest_s(self, first_s: np.ndarray, last_s: np.ndarray) -> np.ndarray:
        """With the ways of the first microbatch and of the last one."""
        lines_s = [self.work_s, self.first_s + first_s, self.last_s + last_s]
        if self.both_s is not None:
            lines_s.append(self.both_s + first_s + last_s)
        return np.max(np.broadcast_arrays(*lines_s), axis=0)


@dataclass(frozen=True, slots=True)
class _Ways:
    """What a microbatch takes at least through k stages from one cut to another: [k][from, to]."""

    forth_s: list[np.ndarray]
    back_s: list[np.ndarray]
    there_and_back_s: list[np.ndarray]

    @classmethod
    def of(cls, rows: np.ndarray, num_pieces: int, most: int) -> "_Ways":
        forth_s = rows["forward_s"] + rows["received_s"] / 2
        back_s = rows["backward_s"] + rows["received_s"] / 2
        ways_s = (forth_s, back_s, microbatch_time_s(rows))
        return cls(*(list(_through(rows, values, num_pieces, most)) for values in ways_s))


def _through(
    rows: np.ndarray, values: np.ndarray, num_pieces: int, most: int
) -> Iterator[np.ndarray]:
    """The least sums over 0, 1, ... `most` stages."""
    alone = np.full((num_pieces + 1, num_pieces + 1), np.inf)
    np.minimum.at(alone, (rows["start"], rows["end"]), values)
    sums = np.full_like(alone, np.inf)
    np.fill_diagonal(sums, 0.0)
    for _ in range(most + 1):
        yield sums
        sums = (sums[:, :, None] + alone[None]).min(axis=1)
