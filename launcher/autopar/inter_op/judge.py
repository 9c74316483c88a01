"""How long a plan takes, before it is written down: the simulator on the stages that the search has chosen.

The same simulator as for a finished plan, on the schedule's own program, with two simplifications: what
crosses a cut goes to the next stage, wherever it is read, and only as many microbatches are played as it
takes until all others add the same time. So hundreds of candidates can be judged where a finished plan takes
seconds.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

from launcher.autopar.inter_op.stage_table import StageChoice
from launcher.autopar.programs.communication import add_communication
from launcher.autopar.programs.crowded import Crowd, simulate_crowded
from launcher.autopar.programs.program import Program, Wiring
from launcher.autopar.programs.schedules import AbstractSchedule
from launcher.autopar.programs.simulator import Durations
from launcher.autopar.programs.step_clock import StepClock

# Microbatches per submesh: until time grows evenly, and then. Of random stages a few in a hundred take longer
# for that, and are judged too fast or slow: by a thousandth or two, the worst of a thousand by 0.7 %.
_WARM_UP, _SPAN = 6, 4
MOST_MISJUDGED = 0.01  # of a step
_MANY, _WARM_UP_OF_MANY, _SPAN_OF_MANY = 48, 4, 1  # submeshes whose program is long in the making


def judged_s(
    stages: Sequence[StageChoice], schedule: AbstractSchedule, num_microbatches: int,
    transfer_s: Callable[[int], float], *, warm_up: int | None = None, crowd: Crowd | None = None,
) -> float:  # fmt: skip
    """The step time of some stages.

    Args:
        transfer_s: seconds per microbatch for what crosses a cut, both ways.
        crowd: who slows whom down, if anybody does.
        warm_up: microbatches per submesh until the others all add the same time, if it is known.
    """
    durations = _durations(stages, transfer_s)

    def play(count: int) -> float:
        if crowd is not None:
            return simulate_crowded(_program(schedule, len(stages), count), durations, crowd).step_s
        return _clock(schedule, len(stages), count).step_s(durations)

    few, more = _played(schedule, len(stages), warm_up)
    if num_microbatches <= more:
        return play(num_microbatches)
    few_s, more_s = play(few), play(more)
    return more_s + (num_microbatches - more) * (more_s - few_s) / (more - few)


def num_passes(schedule: AbstractSchedule, num_stages: int, num_microbatches: int) -> int:
    """How many times a microbatch passes a stage while so many stages are judged."""
    few, more = _played(schedule, num_stages)
    return num_stages * (num_microbatches if num_microbatches <= more else few + more)


def _played(
    schedule: AbstractSchedule, num_stages: int, warm_up: int | None = None
) -> tuple[int, int]:
    """Of many microbatches, how many are played first, and how many then."""
    submeshes = num_stages // schedule.virtual_stages
    is_long = submeshes >= _MANY and schedule.virtual_stages == 1
    usual, span = (_WARM_UP_OF_MANY, _SPAN_OF_MANY) if is_long else (_WARM_UP, _SPAN)
    few = (warm_up or usual) * submeshes
    return few, few + span * submeshes


@lru_cache(maxsize=256)
def _clock(schedule: AbstractSchedule, num_stages: int, num_microbatches: int) -> StepClock:
    return StepClock.of(_program(schedule, num_stages, num_microbatches))


@lru_cache(maxsize=16)
def _program(schedule: AbstractSchedule, num_stages: int, num_microbatches: int) -> Program:
    """The schedule's program on a chain of stages."""
    wiring = Wiring.chain(num_stages, with_norm=True, virtual_stages=schedule.virtual_stages)
    return add_communication(schedule.build(num_stages, num_microbatches), wiring)


def _durations(stages: Sequence[StageChoice], transfer_s: Callable[[int], float]) -> Durations:
    options = [choice.option for choice in stages]
    one_way_s = {(i - 1, i): transfer_s(stages[i].first) / 2 for i in range(1, len(stages))}
    return Durations(
        forward_s=tuple(option.forward_s for option in options),
        backward_s=tuple(option.backward_s for option in options),
        backward_input_s=tuple(option.backward_s - option.weight_s for option in options),
        backward_weight_s=tuple(option.weight_s for option in options),
        synchronize_s=tuple(option.once_s for option in options),
        update_s=(0.0,) * len(options),
        activation_s=one_way_s,
        cotangent_s={(target, source): s for (source, target), s in one_way_s.items()},
    )
