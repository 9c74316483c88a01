"""trace.json: a planned step and traced ones in the Chrome trace event format, which Perfetto opens.

A process for the plan, and one for every traced step. In each a thread per submesh that shows its list in
order, and one for what it sent, each message until it had arrived. Messages that overtake one another get a
further thread, since slices of a thread may not overlap. Times are microseconds, kept to the nanosecond.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from launcher.autopar.programs.instructions import Instruction
from launcher.autopar.programs.launches import Launch
from launcher.autopar.programs.program import Program
from launcher.autopar.programs.timeline import Timeline
from launcher.runtime.traces.comparison import planned_seconds
from launcher.runtime.traces.recording import Recording, Span

TRACE_NAME = "trace.json"
_TIDS_PER_PROCESS = 1_000_000  # viewers are not agreed that two processes may have the same thread
_LONGEST_NAME = 3  # instructions


@dataclass(frozen=True, slots=True)
class _Slice:
    """A launch as it is drawn; `waited_s`, of a receive, is the time before its message came."""

    span: Span
    waited_s: float = 0.0

    @property
    def start_ns(self) -> int:
        return round(self.span.start_s * 1e9)

    @property
    def end_ns(self) -> int:
        return round(self.span.end_s * 1e9)


def trace_text(planned: Timeline, program: Program, recordings: Sequence[Recording]) -> str:
    """The file's text."""
    events = [*_process(1, "planned", _planned(planned, program), {})]
    seconds = planned_seconds(planned)
    for pid, recording in enumerate(recordings, start=2):
        name = f"measured, step {recording.step}"
        if recording.is_one_program:
            name += " (one program)"
        events += _process(pid, name, _measured(recording), seconds)
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False)


def _planned(planned: Timeline, program: Program) -> Iterator[_Slice]:
    """Every instruction once. Receives and frees take no time of their own in a plan: a receive stands
    where its message has arrived, at the latest where the next instruction computes."""
    spans = {event.instruction: (event.start_s, event.end_s) for event in planned.events}
    for submesh, entries in enumerate(program.lists):
        starts_s = [spans[entry][0] for entry in entries if entry.is_compute]
        to_come = iter([*starts_s, math.inf])
        done_s, next_s = 0.0, next(to_come)
        for entry in entries:
            if entry in spans:
                start_s, end_s = spans[entry]
            else:
                arrived_s = spans[entry.partner][1] if entry.is_receive else 0.0
                start_s = end_s = min(max(done_s, arrived_s), next_s)
            if entry.is_compute:
                done_s, next_s = end_s, next(to_come)
            yield _Slice(Span(Launch(submesh, (entry,)), start_s, end_s))


def _measured(recording: Recording) -> Iterator[_Slice]:
    for span in recording.spans:
        if span.launch.first.is_receive:
            landing = recording.landing(span)
            yield _Slice(landing, landing.start_s - span.start_s)
        else:
            yield _Slice(span)


def _process(
    pid: int, name: str, slices: Iterable[_Slice], seconds: Mapping[Instruction, float]
) -> Iterator[dict]:
    """`seconds` are the planned ones, for the details of measured slices."""
    yield _named("process", pid, 0, name)
    first_tid = pid * _TIDS_PER_PROCESS
    by_submesh = itertools.groupby(slices, key=lambda found: found.span.launch.submesh)
    tids = itertools.count(first_tid)
    for submesh, group in by_submesh:
        found = list(group)
        computing = [one for one in found if not one.span.launch.first.is_send]
        sending = [one for one in found if one.span.launch.first.is_send]
        lanes = [(f"submesh {submesh}", computing)]
        for index, lane in enumerate(_apart(sending)):
            lanes.append((f"submesh {submesh} sends{f' ({index + 1})' * bool(index)}", lane))
        for title, lane in lanes:
            tid = next(tids)
            yield _named("thread", pid, tid, title)
            yield _sorted_as("thread", pid, tid, tid - first_tid)
            yield from (_complete(pid, tid, one, seconds) for one in lane)


def _apart(slices: Sequence[_Slice]) -> list[list[_Slice]]:
    """Lanes in which nothing overlaps, as few as there can be: each takes the first that is free."""
    lanes: list[list[_Slice]] = []
    for one in sorted(slices, key=lambda found: found.start_ns):
        free = next((lane for lane in lanes if lane[-1].end_ns <= one.start_ns), None)
        if free is None:
            lanes.append([one])
        else:
            free.append(one)
    return lanes


def _complete(pid: int, tid: int, one: _Slice, seconds: Mapping[Instruction, float]) -> dict:
    launch = one.span.launch
    first, many = launch.first, len(launch.instructions)
    details: dict[str, object] = {"stage": first.stage}
    if first.microbatch is not None and many < _LONGEST_NAME:
        details["microbatch"] = first.microbatch
    if first.peer is not None:
        details["peer"] = first.peer
    if many > 1:
        details["instructions"] = [str(entry) for entry in launch.instructions]
    if any(entry in seconds for entry in launch.instructions):
        planned_s = sum(seconds.get(entry, 0.0) for entry in launch.instructions)
        details["planned_us"] = _us(round(planned_s * 1e9))
    if one.waited_s:
        details["waited_us"] = _us(round(one.waited_s * 1e9))
    is_named = many < _LONGEST_NAME
    return {
        "name": str(launch) if is_named else f"a whole step, {many} instructions in one program",
        "cat": "+".join(entry.op for entry in launch.instructions) if is_named else "step",
        "ph": "X",
        "ts": _us(one.start_ns),
        "dur": _us(one.end_ns - one.start_ns),
        "pid": pid,
        "tid": tid,
        "args": details,
    }


def _named(what: str, pid: int, tid: int, name: str) -> dict:
    return {"name": f"{what}_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _sorted_as(what: str, pid: int, tid: int, place: int) -> dict:
    name = f"{what}_sort_index"
    return {"name": name, "ph": "M", "pid": pid, "tid": tid, "args": {"sort_index": place}}


def _us(ns: int) -> float:
    return ns / 1000
