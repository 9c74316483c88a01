"""What a run says when device memory is used up: where, how much, and which keys would help.

XLA raises RESOURCE_EXHAUSTED when a program is compiled, when values are placed, when a program is
dispatched, or, where the backend allocates later, when its result is first looked at: then nobody knows
which instruction it was.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax

from launcher.autopar.plans.plan import LARGEST_ZERO, Plan, Stage
from launcher.autopar.programs.instructions import Instruction, Op
from launcher.autopar.text.wording import count, size
from launcher.errors import TrainingError

_EXHAUSTED = "RESOURCE_EXHAUSTED"
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_AMOUNT = re.compile(r"(\d[\d,]*(?:\.\d+)?)\s*(?:bytes|([kmgt]?)i?b)\b", re.IGNORECASE)

# What these need grows with parameters and not with the samples of a microbatch.
_OF_PARAMETERS = frozenset(
    (Op.SYNCHRONIZE, Op.NORM, Op.UPDATE, Op.SEND_TIED_GRADIENT, Op.RECEIVE_TIED_GRADIENT,
     Op.SEND_TIED_PARAMETER, Op.RECEIVE_TIED_PARAMETER, Op.SEND_NORM, Op.RECEIVE_NORM)
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Doing:
    """What a stage was about.

    Attributes:
        of_parameters: the samples of a microbatch have no part in what was asked for.
    """

    stage: int
    what: str
    of_parameters: bool

    @classmethod
    def placing(cls, stage: int) -> "Doing":
        """Weights and optimizer state are brought to the devices."""
        return cls(stage, "placing its weights and optimizer state", of_parameters=True)

    @classmethod
    def compiling(cls, stage: int) -> "Doing":
        """A program is compiled, which reserves what it will need on some backends."""
        return cls(stage, "compiling its programs", of_parameters=False)

    @classmethod
    def beginning(cls, stage: int) -> "Doing":
        """Before the first instruction of a step."""
        return cls(stage, "making the accumulators of its gradients", of_parameters=True)

    @classmethod
    def whole_step(cls) -> "Doing":
        """The only stage runs a step as one program."""
        return cls(0, "in its step, which is one program", of_parameters=False)

    @classmethod
    def evaluating(cls, stage: int) -> "Doing":
        """The forward pass of an evaluation is dispatched."""
        return cls(stage, "in an evaluation", of_parameters=False)

    @classmethod
    def step(cls, instruction: Instruction) -> "Doing":
        """An instruction is dispatched."""
        of_parameters = instruction.op in _OF_PARAMETERS
        return cls(instruction.stage, f"in the instruction {instruction}", of_parameters)


def is_memory_error(error: BaseException) -> bool:
    """Whether XLA says that a device's memory is used up."""
    return isinstance(error, jax.errors.JaxRuntimeError) and _EXHAUSTED in str(error)


def memory_error(
    error: BaseException, plan: Plan, doing: Doing | None, devices: Sequence[jax.Device] = ()
) -> TrainingError:
    """Say in one line what happened where, with the numbers, and what helps.

    Args:
        doing: None where nobody knows: the error came with a result.
        devices: of the stage, or all of them.
    """
    index = None if doing is None else doing.stage
    stages = plan.stages if index is None else (plan.stages[index],)
    where = "in a step"
    if doing is not None:
        where = f"on stage {doing.stage} of {len(plan.stages)}, {doing.what}"
    numbers = [*_asked_for(error), *_had(devices), *_predicted(plan, index)]
    cures = _cures(plan, stages, parameters_only=doing is not None and doing.of_parameters)
    return TrainingError(f"out of device memory {where} ({', '.join(numbers)}): {cures}")


@contextlib.contextmanager
def explained(explain: Callable[[BaseException], TrainingError]) -> Iterator[None]:
    """Turn XLA's error into what `explain` makes of it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_memory_error(error):
            raise
        raise explain(error) from error


def memory_errors(
    plan: Plan, doing: Doing, devices: Sequence[jax.Device]
) -> contextlib.AbstractContextManager[None]:
    """Turn XLA's error into ours, where it is known what a stage is about."""
    return explained(partial(memory_error, plan=plan, doing=doing, devices=devices))


def _asked_for(error: BaseException) -> list[str]:
    asked = bytes_asked_for(str(error))
    return [] if asked is None else [f"{size(asked)} asked for at once"]


def bytes_asked_for(message: str) -> float | None:
    """The amount in XLA's message: `123 bytes`, `5.00GiB`; its first line has the one that failed."""
    found = _AMOUNT.search(message)
    if found is None:
        return None
    number, prefix = found.groups(default="")
    return float(number.replace(",", "")) * _UNITS[prefix.lower()]


def _had(devices: Sequence[jax.Device]) -> list[str]:
    """The fullest device; nothing where the backend does not count (CPU)."""
    stats = [found for device in devices if (found := device.memory_stats())]
    if not stats:
        return []
    fullest = max(stats, key=lambda found: found.get("bytes_in_use", 0))
    limit = fullest.get("bytes_limit")
    used = f"{size(fullest.get('bytes_in_use', 0))} in use"
    return [used if limit is None else f"{used} of the {size(limit)} that a device gives"]


def _predicted(plan: Plan, index: int | None) -> list[str]:
    if plan.predicted is None:
        return []
    peaks = plan.predicted.peak_bytes_per_device
    return [f"{size(max(peaks) if index is None else peaks[index])} predicted as the peak"]


def _cures(plan: Plan, stages: Sequence[Stage], *, parameters_only: bool) -> str:
    """The keys that would lower what these stages need, as they could be set."""
    found = [] if parameters_only else [*_fewer_samples(plan, stages), *_recompute(stages)]
    found += [*_zero(stages), *_more_stages(plan)]
    if not found:
        return (
            f"no parallel key would lower it on {count(_num_devices(plan), 'device')}: take a cluster "
            f"with more of them or with more memory (cluster), or a smaller model.size"
        )
    return f"try {', or '.join(found)}"


def _fewer_samples(plan: Plan, stages: Sequence[Stage]) -> Iterator[str]:
    """A microbatch can shrink until each device of the longest data axis has one sample."""
    shares = max(dict(stage.mesh).get("data", 1) for stage in plan.stages)
    samples, num = plan.microbatch_size, plan.num_microbatches
    counts = range(num + 1, plan.global_batch // shares + 1)
    divisors = (n for n in counts if plan.global_batch % n == 0 == plan.global_batch // n % shares)
    more = next(divisors, None)
    if more is not None:
        yield f"parallel.num_microbatches={more} (now {num}, of {count(samples, 'sample')})"
    if samples >= 2 * shares:
        yield f"train.global_batch={plan.global_batch // 2} (now {plan.global_batch})"


def _recompute(stages: Sequence[Stage]) -> Iterator[str]:
    used = {stage.recompute for stage in stages}
    if "none" in used:
        yield "parallel.recompute=layer (now none)"
    elif "layer" in used:
        yield "parallel.recompute=full (now layer)"


def _zero(stages: Sequence[Stage]) -> Iterator[str]:
    shared = [stage for stage in stages if dict(stage.mesh).get("data", 1) > 1]
    least = min((stage.zero for stage in shared), default=LARGEST_ZERO)
    if least < LARGEST_ZERO:
        yield f"parallel.zero={LARGEST_ZERO} (now {least})"


def _more_stages(plan: Plan) -> Iterator[str]:
    """Deeper pipelines spread the weights, while there are layers and devices that share them."""
    submeshes = len({(stage.hosts, stage.devices) for stage in plan.stages})
    last = plan.stages[-1].layers[1]
    deeper = [n for n in range(submeshes + 1, last + 1) if _num_devices(plan) % n == 0]
    shares = max(stage.num_devices for stage in plan.stages)
    if deeper and shares > 1:
        yield f"parallel.pp={deeper[0]} (now {submeshes})"


def _num_devices(plan: Plan) -> int:
    """Each once, however many stages lie on it."""
    return len({(h, d) for stage in plan.stages for h in stage.hosts for d in stage.devices})
