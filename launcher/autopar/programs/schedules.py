"""Schedules: the rule by which a stage orders its forwards and backwards.

A builder emits compute instructions only (`F` and `B`, or `F`, `I` and `W` where the backward pass is
split), one tuple per submesh; everything else is added by `program.add_communication`. In every stage
the microbatches pass in ascending order in each operation: state that one microbatch hands to the
next (the statistics of BatchNorm) and the sum of the gradients are then those of a loop over
microbatches on one device.

A submesh holds one stage, or `virtual_stages` of them: of p submeshes, number r holds the stages r,
r + p, r + 2p, ... Numbers of stages count all of them.

GPipe: Huang et al. 2019. 1F1B: Narayanan et al. 2019 (PipeDream), in the flushing form of Fan et
al. 2021 (DAPPLE). Interleaved 1F1B: Narayanan et al. 2021 (Megatron-LM, section 2.2.2). ZB-H1: Qi et
al. 2024 (zero bubble pipeline parallelism, section 2.1).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from launcher.autopar.programs.instructions import Instruction, Op
from launcher.errors import ConfigError

ComputeLists = tuple[tuple[Instruction, ...], ...]
"""One tuple of compute instructions per submesh."""

SCHEDULE_NAMES = ("gpipe", "1f1b", "interleaved", "zb_h1")
LEAST_VIRTUAL_STAGES = 2  # of the interleaved schedule; with one, it would be 1F1B


class AbstractSchedule(ABC):
    """A rule that turns numbers of stages and microbatches into compute instructions."""

    @abstractmethod
    def build(self, num_stages: int, num_microbatches: int) -> ComputeLists:
        """Return each submesh's compute instructions in order."""

    @abstractmethod
    def stash_peak(self, stage: int, num_stages: int, num_microbatches: int) -> int:
        """Return how many microbatches the stage keeps at most, from the forward of one to the end
        of its backward, both halves included."""

    def split_peak(self, stage: int, num_stages: int, num_microbatches: int) -> int:
        """Return how many microbatches the stage has at most from the `I` of one to the end of its `W`."""
        del stage, num_stages, num_microbatches
        return 0

    @property
    def virtual_stages(self) -> int:
        """How many stages a submesh holds."""
        return 1

    @property
    def splits_backward(self) -> bool:
        """Whether the stages run `I` and `W` instead of `B`."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class GPipe(AbstractSchedule):
    """All forwards, then all backwards."""

    def build(self, num_stages: int, num_microbatches: int) -> ComputeLists:
        _require_positive(num_stages, num_microbatches)
        return tuple(
            _alternate(stage, num_microbatches, num_ahead=num_microbatches)
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
            _alternate(
                stage,
                num_microbatches,
                num_ahead=self.stash_peak(stage, num_stages, num_microbatches),
            )
            for stage in range(num_stages)
        )

    def stash_peak(self, stage: int, num_stages: int, num_microbatches: int) -> int:
        return min(num_microbatches, num_stages - stage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interleaved(AbstractSchedule):
    """1F1B on submeshes that hold several stages each, which shortens the bubble as many times.

    Microbatches go in groups of p, the number of submeshes: a group passes through the first stage of
    a submesh, then through its second, and so on. Submesh r runs 2 (p - r - 1) + (v - 1) p forwards
    ahead, then one forward and one backward in turn.
    """

    virtual_stages: int

    def build(self, num_stages: int, num_microbatches: int) -> ComputeLists:
        self._require_fitting(num_stages, num_microbatches)
        p, v = num_stages // self.virtual_stages, self.virtual_stages
        ahead = [
            min(2 * (p - submesh - 1) + (v - 1) * p, num_microbatches * v) for submesh in range(p)
        ]
        return tuple(
            self._submesh(submesh, p, num_microbatches, num_ahead)
            for submesh, num_ahead in enumerate(ahead)
        )

    def stash_peak(self, stage: int, num_stages: int, num_microbatches: int) -> int:
        p = num_stages // self.virtual_stages
        # A submesh runs less than two groups ahead; then one group is as the other.
        return _stash_peaks(self, num_stages, min(num_microbatches, 4 * p))[stage]

    def _submesh(
        self, submesh: int, p: int, num_microbatches: int, num_ahead: int
    ) -> tuple[Instruction, ...]:
        turns = range(num_microbatches * self.virtual_stages)
        forwards, backwards = (
            [
                Instruction(op=op, stage=submesh + p * place, microbatch=microbatch)
                for place, microbatch in (self._turn(turn, p, op) for turn in turns)
            ]
            for op in (Op.FORWARD, Op.BACKWARD)
        )
        instructions = forwards[:num_ahead]
        for forward, backward in zip(forwards[num_ahead:], backwards, strict=False):
            instructions += (forward, backward)
        return (*instructions, *backwards[len(turns) - num_ahead :])

    def _turn(self, turn: int, p: int, op: Op) -> tuple[int, int]:
        """Return (which of the submesh's stages, microbatch) of a submesh's n-th forward or backward."""
        group, rest = divmod(turn, p * self.virtual_stages)
        place, microbatch = divmod(rest, p)
        if op is Op.BACKWARD:
            place = self.virtual_stages - 1 - place
        return place, group * p + microbatch

    def _require_fitting(self, num_stages: int, num_microbatches: int) -> None:
        _require_positive(num_stages, num_microbatches)
        v = self.virtual_stages
        if num_stages % v:
            raise ConfigError(
                f"{num_stages} stages cannot be shared out to submeshes of {v} each: "
                f"parallel.virtual_stages={v}: take a multiple of {v} stages"
            )
        require_groups(num_stages // v, num_microbatches)


@dataclass(frozen=True, slots=True, kw_only=True)
class ZbH1(AbstractSchedule):
    """1F1B whose stages fill their idle time with weight gradients, which nobody waits for.

    Stage i runs p - i forwards ahead, then in turn the input gradients of microbatch k, from k = i on
    the weight gradients of k - i, and the forward of k + p - i; weight gradients that are left come
    last. No stage has more than p microbatches between forward and weight gradients.
    """

    def build(self, num_stages: int, num_microbatches: int) -> ComputeLists:
        _require_positive(num_stages, num_microbatches)
        return tuple(_split(stage, num_stages, num_microbatches) for stage in range(num_stages))

    def stash_peak(self, stage: int, num_stages: int, num_microbatches: int) -> int:
        del stage
        return min(num_microbatches, num_stages)

    def split_peak(self, stage: int, num_stages: int, num_microbatches: int) -> int:
        del num_stages
        return min(num_microbatches, stage + 1)

    @property
    def splits_backward(self) -> bool:
        return True


def schedule_by_name(name: str, virtual_stages: int = 1) -> AbstractSchedule:
    """Return the schedule that `parallel.schedule` and `parallel.virtual_stages` name."""
    if virtual_stages != 1 and name in ("gpipe", "1f1b", "zb_h1"):
        raise ConfigError(
            f"parallel.virtual_stages={virtual_stages} is not 1, all that parallel.schedule={name} "
            "takes: leave it out, or take parallel.schedule=interleaved"
        )
    match name:
        case "gpipe":
            return GPipe()
        case "1f1b":
            return OneForwardOneBackward()
        case "interleaved" if virtual_stages < LEAST_VIRTUAL_STAGES:
            raise ConfigError(
                f"parallel.virtual_stages={virtual_stages} is less than {LEAST_VIRTUAL_STAGES}, the "
                f"least that parallel.schedule=interleaved takes: give {LEAST_VIRTUAL_STAGES} or more, "
                "or take parallel.schedule=1f1b"
            )
        case "interleaved":
            return Interleaved(virtual_stages=virtual_stages)
        case "zb_h1":
            return ZbH1()
        case _:
            raise ConfigError(
                f"unknown schedule {name!r}, the launcher has {len(SCHEDULE_NAMES)}: "
                f"parallel.schedule={name}: choose one of {', '.join(SCHEDULE_NAMES)}"
            )


def _alternate(stage: int, num_microbatches: int, *, num_ahead: int) -> tuple[Instruction, ...]:
    """Run `num_ahead` forwards, then a backward and a forward in turn, then the backwards left."""
    forwards, backwards = (
        [Instruction(op=op, stage=stage, microbatch=k) for k in range(num_microbatches)]
        for op in (Op.FORWARD, Op.BACKWARD)
    )
    instructions = forwards[:num_ahead]
    for backward, forward in zip(backwards, forwards[num_ahead:], strict=False):
        instructions += (backward, forward)
    return (*instructions, *backwards[num_microbatches - num_ahead :])


def _split(stage: int, num_stages: int, num_microbatches: int) -> tuple[Instruction, ...]:
    """ZB-H1's order of one stage."""
    forwards, inputs, weights = (
        [Instruction(op=op, stage=stage, microbatch=k) for k in range(num_microbatches)]
        for op in (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
    )
    num_ahead = num_stages - stage
    instructions = forwards[:num_ahead]
    for k, entry in enumerate(inputs):
        instructions.append(entry)
        if k >= stage:
            instructions.append(weights[k - stage])
        instructions += forwards[k + num_ahead : k + num_ahead + 1]
    return (*instructions, *weights[max(0, num_microbatches - stage) :])


@lru_cache(maxsize=256)
def _stash_peaks(
    schedule: AbstractSchedule, num_stages: int, num_microbatches: int
) -> tuple[int, ...]:
    """Count, per stage, what the lists keep."""
    lists = schedule.build(num_stages, num_microbatches)
    return stash_peaks([entry for entries in lists for entry in entries], num_stages)


def stash_peaks(instructions: Sequence[Instruction], num_stages: int) -> tuple[int, ...]:
    """Return, per stage, how many microbatches are at most between `F` and the end of `B` or `W`.

    Args:
        instructions: In the order of each submesh's list.
    """
    kept, peaks = [0] * num_stages, [0] * num_stages
    forward, last = Op.FORWARD, (Op.BACKWARD, Op.BACKWARD_WEIGHT)
    for entry in instructions:
        if entry.op is forward:
            kept[entry.stage] += 1
            peaks[entry.stage] = max(peaks[entry.stage], kept[entry.stage])
        elif entry.op in last:
            kept[entry.stage] -= 1
    return tuple(peaks)


def require_groups(num_submeshes: int, num_microbatches: int) -> None:
    """Raise `ConfigError` unless the interleaved schedule can group the microbatches."""
    if num_microbatches % num_submeshes:
        raise ConfigError(
            f"parallel.num_microbatches={num_microbatches} is no multiple of the {num_submeshes} "
            f"submeshes that parallel.schedule=interleaved groups them by: give a multiple of "
            f"{num_submeshes}, change parallel.pp, or take parallel.schedule=1f1b"
        )


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
