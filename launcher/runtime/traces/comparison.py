"""How long each kind of instruction took in traced steps, beside what the plan had said."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.autopar.programs.instructions import Instruction, Op
from launcher.autopar.programs.launches import Launch
from launcher.autopar.programs.timeline import Timeline
from launcher.runtime.traces.recording import Recording, Span

EVERYWHERE = "all"
WHOLE_STEP = "step"
_MOST_PLACES = 8  # that are worth a row of their own

# In the order in which a step comes to them; messages after all else.
_ORDER = tuple(Op)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Medians of one kind of launch.

    Attributes:
        kind: Its operations, such as `F`, `F+B` or `SEND_F`; `step` for a step of one program.
        where: `stage 2`, `2 > 3`, or `all` of them.
        count: How many a step has.
    """

    kind: str
    where: str
    count: int
    planned_s: float
    measured_s: float

    @property
    def ratio(self) -> float | None:
        """Measured over planned; None where the plan counts no time."""
        return self.measured_s / self.planned_s if self.planned_s > 0 else None


def planned_seconds(planned: Timeline) -> Mapping[Instruction, float]:
    """What the plan says that each instruction takes; receives and frees take nothing."""
    return {event.instruction: event.end_s - event.start_s for event in planned.events}


def compare(planned: Timeline, recordings: Sequence[Recording]) -> list[Compared]:
    """Sum up traced steps of one plan: for each kind all places together, then one by one."""
    if recordings[0].is_one_program:
        measured_s = statistics.median(recording.step_s for recording in recordings)
        return [Compared(
            kind=WHOLE_STEP, where=EVERYWHERE, count=1, planned_s=planned.step_s,
            measured_s=measured_s,
        )]  # fmt: skip
    seconds = planned_seconds(planned)
    samples: dict[tuple[Op, ...], dict[str, list[tuple[float, float]]]] = {}
    for recording in recordings:
        for span in filter(_counts, recording.spans):
            launch = span.launch
            kind = tuple(entry.op for entry in launch.instructions)
            planned_s = sum(seconds.get(entry, 0.0) for entry in launch.instructions)
            measured_s = recording.transfer_s(span) if launch.first.is_send else span.seconds
            places = samples.setdefault(kind, defaultdict(list))
            places[place(launch)].append((planned_s, measured_s))
    found = []
    for kind in sorted(samples, key=lambda ops: [_ORDER.index(op) for op in ops]):
        found += _of_kind("+".join(kind), samples[kind], len(recordings))
    return found


def place(launch: Launch) -> str:
    """The stage of a launch, or from which to which stage a message goes."""
    first = launch.first
    return f"{first.stage} > {first.peer}" if first.is_send else f"stage {first.stage}"


def _counts(span: Span) -> bool:
    first = span.launch.first
    return first.is_send or (first.is_compute and first.op is not Op.NORM)


def _of_kind(
    kind: str, places: Mapping[str, list[tuple[float, float]]], num_steps: int
) -> list[Compared]:
    together = [pair for pairs in places.values() for pair in pairs]
    if 1 < len(places) <= _MOST_PLACES:
        rows = {EVERYWHERE: together} | dict(sorted(places.items()))
    else:
        rows = places if len(places) == 1 else {EVERYWHERE: together}
    return [
        Compared(
            kind=kind,
            where=where,
            count=len(pairs) // num_steps,
            planned_s=statistics.median(planned_s for planned_s, _ in pairs),
            measured_s=statistics.median(measured_s for _, measured_s in pairs),
        )
        for where, pairs in rows.items()
    ]
