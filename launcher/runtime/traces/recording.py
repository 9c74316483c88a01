"""What the launches of a traced step took, and the timeline that they make up.

Times are seconds since the start of the step. A launch's span ends when its results are there, so spans of
a submesh never overlap. Like the simulator's, the timeline has no event for a receive: it waits, and what it
gathers on arrival belongs to its transfer.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from launcher.autopar.programs.instructions import Instruction
from launcher.autopar.programs.launches import Launch
from launcher.autopar.programs.program import Program
from launcher.autopar.programs.schedules import stash_peaks
from launcher.autopar.programs.simulator import KINDS
from launcher.autopar.programs.timeline import Event, EventKind, Timeline


@dataclass(frozen=True, slots=True)
class Span:
    """A launch in time.

    Attributes:
        end_s: When its results were there; of a send, when its message had arrived.
    """

    launch: Launch
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Recording:
    """A traced step.

    Attributes:
        step: How many steps were done after it.
        spans: Of one submesh after the other, in the order in which they were played.
    """

    step: int
    program: Program
    spans: tuple[Span, ...]

    @cached_property
    def step_s(self) -> float:
        return max(span.end_s for span in self.spans)

    @property
    def is_one_program(self) -> bool:
        """Whether the whole step was a single launch."""
        return len(self.spans) == 1

    @property
    def busy_s(self) -> tuple[float, ...]:
        """How long each submesh computed."""
        busy_s: dict[int, float] = defaultdict(float)
        for span in self.spans:
            if span.launch.first.is_compute:
                busy_s[span.launch.submesh] += span.seconds
        return tuple(busy_s[submesh] for submesh in range(self.program.num_submeshes))

    @property
    def bubble_fraction(self) -> float:
        return 1.0 - sum(self.busy_s) / (self.step_s * self.program.num_submeshes)

    @cached_property
    def sends(self) -> Mapping[Instruction, Span]:
        return {s.launch.first: s for s in self.spans if s.launch.first.is_send}

    def landing(self, receive: Span) -> Span:
        """The part of a receive in which its message had arrived, and was gathered."""
        arrived_s = self.sends[receive.launch.first.partner].end_s
        begin_s = min(max(receive.start_s, arrived_s), receive.end_s)
        return Span(receive.launch, begin_s, receive.end_s)

    def transfer_s(self, send: Span) -> float:
        """What a message took: its way, and what was gathered on arrival."""
        return send.seconds + self._landing_s[send.launch.first]

    @cached_property
    def _landing_s(self) -> Mapping[Instruction, float]:
        return {
            span.launch.first.partner: self.landing(span).seconds
            for span in self.spans
            if span.launch.first.is_receive
        }

    def timeline(self, planned: Mapping[Instruction, float]) -> Timeline:
        """The step as the simulator would show it.

        Args:
            planned: Seconds of each instruction. Where two are one launch, it is cut in this ratio.
        """
        events = [event for span in self.spans for event in _events(span, planned)]
        entries = [entry for entries in self.program.lists for entry in entries]
        return Timeline(
            events=tuple(sorted(events, key=lambda event: (event.start_s, event.submesh))),
            step_s=self.step_s,
            busy_s=self.busy_s,
            exposed_s=tuple(self._exposed_s()),
            stash_peak=stash_peaks(entries, self.program.num_stages),
        )

    def _exposed_s(self) -> Iterator[float]:
        """Per submesh, how long its receives waited for what was on its way already."""
        exposed_s: dict[int, float] = defaultdict(float)
        for span in self.spans:
            if span.launch.first.is_receive:
                send = self.sends[span.launch.first.partner]
                waited_s = self.landing(span).start_s - max(span.start_s, send.start_s)
                exposed_s[span.launch.submesh] += max(0.0, waited_s)
        return (exposed_s[submesh] for submesh in range(self.program.num_submeshes))


def _events(span: Span, planned: Mapping[Instruction, float]) -> Iterator[Event]:
    launch = span.launch
    if launch.first.is_receive or launch.first.is_free:
        return
    shares_s = [planned.get(entry, 0.0) for entry in launch.instructions]
    scale = span.seconds / (sum(shares_s) or 1.0)
    start_s = span.start_s
    for entry, share_s in zip(launch.instructions, shares_s, strict=True):
        is_last = entry is launch.instructions[-1]
        end_s = span.end_s if is_last else start_s + share_s * scale
        kind = EventKind.TRANSFER if entry.is_send else KINDS[entry.op]
        yield Event(
            submesh=launch.submesh, instruction=entry, kind=kind, start_s=start_s, end_s=end_s
        )
        start_s = end_s
