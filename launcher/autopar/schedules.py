"""Schedules: the rule by which a stage orders its forwards and backwards.

A builder emits compute instructions only (`F` and `B`), one tuple per submesh; everything else is
added by `program.add_communication`. In every stage the microbatches pass in ascending order in
both directions: state that one microbatch hands to the next (the statistics of BatchNorm) and the
sum of the gradients are then those of a loop over microbatches on one device.

GPipe: Huang et al. 2019. 1F1B: Narayanan et al. 2019 (PipeDream), in the flushing form of Fan et
al. 2021 (DAPPLE). Not here yet: interleaved 1F1B (several stages per submesh) and ZB-H1 (split
backward).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from launcher.autopar.instructions import Instruction, Op
from launcher.errors import ConfigError

ComputeLists = tuple[tuple[Instruction, ...], ...]
"""One tuple of compute instructions per submesh."""

SCHEDULE_NAMES = ("gpipe", "1f1b")


class AbstractSchedule(ABC):
    """A rule that turns numbers of stages and microbatches into compute instructions."""

    @abstractmethod
    def build(self, num_stages: int, num_microbatches: int) -> ComputeLists:
        """Return each submesh's compute instructions in order."""

    @abstractmethod
    def stash_peak(self, stage: int, num_stages: int, num_microbatches: int) -> int:
        """Return how many microbatches the stage keeps at most between forward and backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GPipe(AbstractSchedule):
    """All forwards, then all backwards."""

    def build(self, num_stages: int, num_microbatches: int) -> ComputeLists:
        _require_positive(num_stages, num_microbatches)
        return tuple(
            _interleave(stage, num_microbatches, num_ahead=num_microbatches)
            for stage in range(num_stages)
        )

    def stash_peak(self, stage: int, num_stages: int, num_microbatches: int) -> int:
        del stage, num_stages
        return num_microbatches


@dataclass(frozen=True, slots=True, kw_only=True)
class OneForwardOneBackward(AbstractSchedule):
    """As few forwards ahead as keep all stages busy, then one forward and one backward in turn.

    It takes as long as GPipe and keeps fewer microbatches: the first backward reaches stage i when
    the stages after it have each done theirs, so it needs `num_stages - i` microbatches under way.
    """

    def build(self, num_stages: int, num_microbatches: int) -> ComputeLists:
        _require_positive(num_stages, num_microbatches)
        return tuple(
            _interleave(
                stage,
                num_microbatches,
                num_ahead=self.stash_peak(stage, num_stages, num_microbatches),
            )
            for stage in range(num_stages)
        )

    def stash_peak(self, stage: int, num_stages: int, num_microbatches: int) -> int:
        return min(num_microbatches, num_stages - stage)


def schedule_by_name(name: str) -> AbstractSchedule:
    """Return the schedule that `parallel.schedule` names."""
    match name:
        case "gpipe":
            return GPipe()
        case "1f1b":
            return OneForwardOneBackward()
        case _:
            raise ConfigError(
                f"unknown schedule {name!r}, the launcher has {len(SCHEDULE_NAMES)}: "
                f"parallel.schedule={name}: choose one of {', '.join(SCHEDULE_NAMES)}"
            )


def _interleave(stage: int, num_microbatches: int, *, num_ahead: int) -> tuple[Instruction, ...]:
    """Run `num_ahead` forwards, then a backward and a forward in turn, then the backwards left."""
    forwards, backwards = (
        [Instruction(op=op, stage=stage, microbatch=k) for k in range(num_microbatches)]
        for op in (Op.FORWARD, Op.BACKWARD)
    )
    instructions = forwards[:num_ahead]
    for backward, forward in zip(backwards, forwards[num_ahead:], strict=False):
        instructions += (backward, forward)
    return (*instructions, *backwards[num_microbatches - num_ahead :])


def _require_positive(num_stages: int, num_microbatches: int) -> None:
    if num_stages < 1:
        raise ConfigError(
            f"a pipeline of {num_stages} stages, at least 1 is needed: parallel.pp={num_stages}: "
            "set it to 1 or more"
        )
    if num_microbatches < 1:
        raise ConfigError(
            f"a step of {num_microbatches} microbatches, at least 1 is needed: "
            f"parallel.num_microbatches={num_microbatches}: set it to 1 or more"
        )
