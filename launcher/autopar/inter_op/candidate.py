"""What a search finds, by number of microbatches and schedule, before it is written down as a plan."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from launcher.autopar.inter_op.arranged import Arrangement
from launcher.autopar.inter_op.by_period import Bound
from launcher.autopar.inter_op.stage_table import StageChoice
from launcher.autopar.intra_op.intra_op import IntraOpPlanner
from launcher.autopar.text.wording import count


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One planned arrangement, before it is written down."""

    num_microbatches: int
    schedule: str
    virtual_stages: int
    planner: IntraOpPlanner
    arrangement: Arrangement
    largest_gap_fraction: float

    def renumbered(self, numbers: Sequence[int]) -> "Candidate":
        """The same with other numbers for submeshes."""
        return replace(self, arrangement=self.arrangement.renumbered(numbers))

    @property
    def decisions(self) -> tuple:
        """What tells it from others: two with the same ones differ in the sharding of ops alone."""
        stages = ((c.first, c.last, *c.option.tag.decisions) for c in self.arrangement.stages)
        return self.num_microbatches, self.schedule, self.virtual_stages, *stages

    @property
    def step_s(self) -> float:
        """Of the simulator, simplified (`judge`)."""
        return self.arrangement.step_s

    @property
    def bubble_fraction(self) -> float:
        """What of the step submeshes idle, on average."""
        stages = self.arrangement.stages
        busy_s = sum(self.num_microbatches * c.option.seconds + c.option.once_s for c in stages)
        submeshes = len(stages) // self.virtual_stages
        return 1.0 - busy_s / (submeshes * self.step_s) if self.step_s else 0.0

    def describe(self) -> str:
        """It in words."""
        stages, v = self.arrangement.stages, self.virtual_stages
        shapes = ", ".join("x".join(map(str, c.option.tag.mesh.shape)) for c in stages[:4])
        more = "" if len(stages) <= 4 else ", ..."
        on = f" on {count(len(stages) // v, 'submesh')}" if v > 1 else ""
        return (
            f"{count(len(stages), 'stage')} ({shapes}{more}){on}, "
            f"{count(self.num_microbatches, 'microbatch')}, {self.schedule}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Tried:
    """What a number of microbatches led to; `has_failures`: whether some schedule had nothing that fits."""

    num_solved: int
    candidates: tuple[Candidate, ...]
    cuts: tuple[int, int]  # pieces, layers
    bounds: tuple[Bound, ...]
    num_candidates: int
    has_failures: bool = False

    @property
    def step_s(self) -> float:
        return min((candidate.step_s for candidate in self.candidates), default=math.inf)

    def with_more(self, other: "Tried") -> "Tried":
        """The candidates of both, of which the other's were found in a part of the space, cut finer or solved
        anew.

        Of two with the same decisions the faster one stays.
        """
        return Tried(
            num_solved=self.num_solved + other.num_solved,
            candidates=fastest((*other.candidates, *self.candidates)),
            cuts=self.cuts,
            bounds=self.bounds + other.bounds,
            num_candidates=self.num_candidates + other.num_candidates,
        )


def fastest(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Of candidates with the same decisions the fastest ones."""
    best: dict[tuple, Candidate] = {}
    for candidate in candidates:
        known = best.setdefault(candidate.decisions, candidate)
        if candidate.step_s < known.step_s:
            best[candidate.decisions] = candidate
    return tuple(best.values())


# By place in `_decided`.
_WORDS = ("cuts", "meshes", "recomputation", "ZeRO stages", "scattering", "overlap")


def differing(one: Candidate, other: Candidate) -> list[str]:
    """In what candidates of as many stages differ, in words."""
    pairs = zip(one.arrangement.stages, other.arrangement.stages, strict=True)
    by_stage = [
        [a != b for a, b in zip(_decided(mine), _decided(theirs), strict=True)]
        for mine, theirs in pairs
    ]
    by_word = zip(*by_stage, strict=True)
    return [word for word, differs in zip(_WORDS, by_word, strict=True) if any(differs)]


def _decided(choice: StageChoice) -> tuple:
    return (choice.last, *choice.option.tag.decisions)
