"""The table that the inter-operator search works on: all ways to run all ranges of layers on all submeshes.

Layers are cut into pieces, between neighbouring cuts; a stage is consecutive pieces on a submesh. The DP goes
over the table in sweeps (`sweeps`). Left out: which hosts and devices a submesh is made of (`placement`).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np

from launcher.autopar.inter_op.device_axis import DeviceAxis, device_axis
from launcher.autopar.programs.schedules import AbstractSchedule
from launcher.errors import InfeasiblePlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Starts:
    """What starting the programs of a stage takes: of one submesh, each time."""

    forward_s: float
    backward_s: float
    weight_s: float
    once_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOption:
    """One way to run a range of layers on a submesh.

    Attributes:
        forward_s: Of one microbatch.
        backward_s: Of one microbatch, with what is recomputed for it.
        weight_s: What of `backward_s` only gradients of parameters need.
        once_s: Per step: synchronisation and update.
        fixed_bytes: Per device, as all that follows: parameters, optimizer state, accumulators.
        stash_bytes: Per microbatch in flight.
        weight_stash_bytes: Beside them, per microbatch between the halves of a split backward pass.
        workspace_bytes: Beside them, while a pass runs.
        gradient_bytes: Beside what is fixed, at the end of a step, when nothing is in flight.
        tag: The caller's.
        starts: Part of the seconds, for each of `neighbours`; None where it takes nothing.
        neighbours: Submeshes, itself included, whose programs one thread starts.
    """

    forward_s: float
    backward_s: float
    weight_s: float = 0.0
    once_s: float
    fixed_bytes: float
    stash_bytes: float
    weight_stash_bytes: float = 0.0
    workspace_bytes: float = 0.0
    gradient_bytes: float = 0.0
    tag: object
    starts: Starts | None = None
    neighbours: int = 0

    @property
    def seconds(self) -> float:
        """Return the time of one microbatch, forward and backward."""
        return self.forward_s + self.backward_s

    def among(self, neighbours: int) -> "StageOption":
        """Return the same where the programs of so many submeshes are started in turn."""
        more = neighbours - self.neighbours
        if self.starts is None or not more:
            return self
        return replace(
            self,
            forward_s=self.forward_s + more * self.starts.forward_s,
            backward_s=self.backward_s + more * self.starts.backward_s,
            weight_s=self.weight_s + more * self.starts.weight_s,
            once_s=self.once_s + more * self.starts.once_s,
            neighbours=neighbours,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChoice:
    """Layers [first, last) on a submesh of shape `submeshes[submesh]`, run as `option` says."""

    first: int
    last: int
    submesh: int
    option: StageOption


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """What a plan may look like. Neighbouring cuts enclose a piece; stages are made of pieces."""

    cuts: tuple[int, ...]
    axis: DeviceAxis
    num_stages: int | None
    use_all_devices: bool

    @property
    def num_pieces(self) -> int:
        return len(self.cuts) - 1

    @property
    def max_stages(self) -> int:
        return self.num_stages or min(self.num_pieces, self.axis.most_submeshes)

    @property
    def numbers_of_stages(self) -> range:
        return range(1, self.max_stages + 1)

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """The (first, last, submesh) beside which pieces and devices can be used up."""
        num_reaching, axis = self._tilings().cumsum(axis=0), self.axis
        everything = axis.all_devices
        submeshes = np.flatnonzero(axis.has_room[:, everything])
        rest = everything - axis.takes[submeshes]
        for start, end in itertools.combinations(range(self.num_pieces + 1), 2):
            behind = self.num_pieces - end
            fewest, most = (start > 0) + (behind > 0), start + behind  # other stages
            if self.num_stages is not None:
                fewest, most = max(fewest, self.num_stages - 1), min(most, self.num_stages - 1)
            if fewest > most:
                continue
            before = num_reaching[fewest - 1, rest] if fewest else 0
            for submesh in submeshes[num_reaching[most, rest] > before].tolist():
                yield self.cuts[start], self.cuts[end], submesh

    def _tilings(self) -> np.ndarray:
        """`result[n, d]`: whether n submeshes can take d devices, or leave some of them idle."""
        reach = np.zeros((self.num_pieces + 1, self.axis.width), bool)
        reach[0, : 1 if self.use_all_devices else None] = True
        for n, submesh in itertools.product(range(self.num_pieces), range(len(self.axis.takes))):
            room, rest = self.axis.moves(submesh)
            reach[n + 1, room] |= reach[n, rest]
        return reach


def make_pieces(
    *, num_layers: int, submeshes: Sequence[tuple[int, int]], num_devices: int | Sequence[int],
    cuts: Sequence[int], num_stages: int | None, use_all_devices: bool, kinds: Sequence[int] = (),
) -> Pieces:  # fmt: skip
    """Check that there are plans at all, whatever their stages cost.

    Args:
        num_devices: by kind of hosts, where there are several.
        kinds: of hosts, by submesh; all of one where it is left out.
    """
    if list(cuts) != sorted({0, *cuts, num_layers}):
        raise ValueError(f"cuts {tuple(cuts)} do not ascend from 0 to the {num_layers} layers")
    totals, kinds = np.atleast_1d(num_devices).tolist(), kinds or (0,) * len(submeshes)
    pieces = Pieces(
        cuts=tuple(cuts),
        axis=device_axis(
            [math.prod(shape) for shape in submeshes], kinds, totals, use_all=use_all_devices
        ),
        num_stages=num_stages,
        use_all_devices=use_all_devices,
    )
    if next(pieces.ranges(), None) is None:
        raise InfeasiblePlanError(
            f"{sum(totals)} devices and {pieces.num_pieces} pieces of the model cannot be shared "
            f"out to {num_stages or 'any number of'} stages on submeshes of {shapes_text(submeshes)} "
            f"(parallel.pp={num_stages or 'null'}); set another parallel.pp or "
            f"{'cluster.hosts' if len(totals) == 1 else 'cluster.groups'}"
        )
    return pieces


@dataclass(frozen=True, slots=True)
class StageTable:
    """What a search chose from: `rows` are those that fit; `rows["number"]` counts the choices."""

    pieces: Pieces
    rows: np.ndarray
    choices: Sequence[StageChoice]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What a stage adds to a schedule's step time, from the rows of `make_rows`.

    Attributes:
        steady_s: for each microbatch, where it is the slowest stage.
        path_s: once.
    """

    steady_s: Callable[[np.ndarray], np.ndarray]
    path_s: Callable[[np.ndarray], np.ndarray]


def microbatch_time_s(rows: np.ndarray) -> np.ndarray:
    """A microbatch's forward and backward, and what it takes to come and go."""
    return rows["forward_s"] + rows["backward_s"] + rows["received_s"]


_PACE = ("steady_s", "path_s")
_SECONDS = ("forward_s", "backward_s", "weight_s", "once_s")
_BYTES = ("fixed_bytes", "stash_bytes", "weight_stash_bytes", "workspace_bytes", "gradient_bytes")
_OF_OPTION = (*_SECONDS, *_BYTES)
ALPA = Pace(steady_s=microbatch_time_s, path_s=microbatch_time_s)


def make_rows(
    pieces: Pieces, choices: Sequence[StageChoice], transfer_s: Callable[[int], float], pace: Pace
) -> np.ndarray:
    """A table of the choices, ordered by start, end and submesh; starts and ends count cuts.

    Args:
        transfer_s: seconds per microbatch for what crosses a cut, both ways, which the stage behind it pays.
    """
    piece = {cut: index for index, cut in enumerate(pieces.cuts)}
    received_s = {cut: transfer_s(cut) if cut else 0.0 for cut in pieces.cuts[:-1]}
    columns = {
        "start": [piece[choice.first] for choice in choices],
        "end": [piece[choice.last] for choice in choices],
        "submesh": [choice.submesh for choice in choices],
        "received_s": [received_s[choice.first] for choice in choices],
        "number": range(len(choices)),
    }
    options = [choice.option for choice in choices]
    columns |= {name: list(map(attrgetter(name), options)) for name in _OF_OPTION}
    reals = ("_s", "_bytes")
    kinds = [(name, float if name.endswith(reals) else int) for name in (*columns, *_PACE)]
    # In "fits"[:, s - 1]: whether it can be the first of s stages.
    rows = np.zeros(len(choices), [*kinds, ("fits", bool, (pieces.max_stages,))])
    for name, values in columns.items():
        rows[name] = values
    rows["steady_s"], rows["path_s"] = pace.steady_s(rows), pace.path_s(rows)
    stages, behind = np.arange(1, pieces.max_stages + 1), pieces.num_pieces - rows["end"][:, None]
    rows["fits"] = ((behind == 0) == (stages == 1)) & (stages - 1 <= behind)
    if pieces.num_stages is not None:
        before = pieces.num_stages - stages
        rows["fits"] &= (rows["start"] == 0)[:, None] == (before == 0)
        rows["fits"] &= before <= rows["start"][:, None]
    return rows


def needed_bytes(rows: np.ndarray, held: np.ndarray, split: np.ndarray | float = 0.0) -> np.ndarray:
    """What each row needs on a device, (rows, stages), where it has `held` microbatches in flight.

    Args:
        held: by the number of stages from it to the last.
        split: likewise, how many are between the halves of their backward pass.
    """
    running = in_flight_bytes(rows, held, split) + rows["workspace_bytes"][:, None]
    return rows["fixed_bytes"][:, None] + np.maximum(running, rows["gradient_bytes"][:, None])


def unbeaten(costs: np.ndarray) -> np.ndarray:
    """The numbers of the rows that no other one beats, or equals and comes before, in every column."""
    no_worse = (costs[:, None] <= costs[None]).all(axis=2)  # (one, than another)
    equal = no_worse & no_worse.T
    before = np.arange(len(costs))[:, None] < np.arange(len(costs))[None]
    return np.flatnonzero(~(no_worse & (~equal | before)).any(axis=0))


def shared_bytes(
    options: Sequence[StageOption], held: Sequence[int], split: Sequence[int]
) -> float:
    """What stages need that share a submesh, of which one runs at a time."""
    in_flight_bytes = sum(
        flying * option.stash_bytes + halves * option.weight_stash_bytes
        for option, flying, halves in zip(options, held, split, strict=True)
    )
    running_bytes = in_flight_bytes + max(option.workspace_bytes for option in options)
    gradient_bytes = sum(option.gradient_bytes for option in options)
    return sum(option.fixed_bytes for option in options) + max(running_bytes, gradient_bytes)


def in_flight_bytes(
    rows: np.ndarray, held: np.ndarray, split: np.ndarray | float = 0.0
) -> np.ndarray:
    """What of that the microbatches in flight take."""
    stash_bytes, weight_bytes = rows["stash_bytes"], rows["weight_stash_bytes"]
    return held * stash_bytes[:, None] + split * weight_bytes[:, None]


def that_fit(
    rows: np.ndarray, need_bytes: np.ndarray, memory_bytes: float | np.ndarray
) -> np.ndarray:
    """The rows that fit into memory somewhere in the pipeline, and only there.

    Args:
        memory_bytes: of one device, by row where devices differ.
    """
    fits = rows["fits"] & (need_bytes <= np.reshape(memory_bytes, (-1, 1)))
    is_used = fits.any(axis=1)
    fitting = rows[is_used]
    fitting["fits"] = fits[is_used]
    return fitting


def that_fit_in_all(
    number: int, pieces: Pieces, rows: np.ndarray, schedule: AbstractSchedule, m: int,
    room_bytes: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """The rows that fit where there are so many stages in all, and only where they are one of so many.

    Args:
        m: microbatches.
        room_bytes: of one device, by row.
    """
    place = number - np.arange(1, pieces.max_stages + 1)  # by the number of stages from one on
    held, split = (
        np.array([peak(i, number, m) if i >= 0 else 0 for i in place.tolist()])
        for peak in (schedule.stash_peak, schedule.split_peak)
    )
    rows, starts = rows.copy(), rows["start"][:, None]
    rows["fits"] &= (place >= 0) & ((starts == 0) == (place == 0)) & (place <= starts)
    return that_fit(rows, needed_bytes(rows, held, split), room_bytes)


def shapes_text(submeshes: Sequence[tuple[int, int]]) -> str:
    """Write shapes of submeshes as hosts x devices."""
    return ", ".join(f"{hosts}x{devices}" for hosts, devices in submeshes)
