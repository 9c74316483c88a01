"""What a plan holds on its devices, beside what was predicted.

The plan's instructions are walked (`programs/buffers.py`) with the bytes of what lies on one device between
them, from the shardings that the programs are compiled for; and, while a program runs, with what XLA's
`memory_analysis` says of it. The most of it is the measured peak. The figures are those of the backend that
compiles: of emulated devices, the CPU backend's.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from launcher.autopar.predictions.predicted_buffers import stage_buffers
from launcher.autopar.programs.buffers import Footprint, peak
from launcher.autopar.programs.launches import submesh_launches
from launcher.autopar.programs.needed_programs import needed_programs
from launcher.autopar.realized.realize import RealizedPlan
from launcher.models.model import Model
from launcher.models.optimizer import Optimizer
from launcher.runtime.compiled.build_programs import build_programs
from launcher.runtime.compiled.stage_programs import StagePrograms
from launcher.runtime.steps.loose_metrics import LooseMetrics
from launcher.runtime.steps.whole_step import hollow_loop, is_one_loop

LOWEST, HIGHEST = 0.9, 1.05  # measured over predicted: what is promised
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class MemoryAudit:
    """The peak of one stage's devices, in bytes per device.

    Attributes:
        at: what runs when it is reached.
        parts: what it consists of.
    """

    stage: int
    predicted_bytes: float
    at: str
    parts: Mapping[str, float]

    @property
    def measured_bytes(self) -> float:
        return sum(self.parts.values())

    @property
    def ratio(self) -> float:
        return self.measured_bytes / self.predicted_bytes

    @property
    def agrees(self) -> bool:
        return LOWEST <= self.ratio <= HIGHEST


def audit_memory(
    realized: RealizedPlan, model: Model, optimizer: Optimizer, grid: np.ndarray,
    progress: Callable[[str], None],
) -> list[MemoryAudit]:  # fmt: skip
    """Compile all stages' programs, and walk the plan's instructions."""
    built = build_programs(realized, model, optimizer, grid)
    loose = LooseMetrics(realized.planner.model)
    if is_one_loop(realized.program, loose):
        progress("measuring the step")
        return [_audit_loop(realized, built[0], loose)]
    needed = needed_programs(realized.program, realized.wiring)
    found = {}
    for index, programs in built.items():
        progress(f"measuring stage {index + 1} of {len(realized.stages)}")
        compiled = _footprints(programs, needed[index])
        found[index] = measured_buffers(realized, index, programs, compiled)
    predicted = realized.plan.predicted.peak_bytes_per_device
    audits = []
    for launches in submesh_launches(realized.program, realized.wiring):
        stages = sorted({launch.first.stage for launch in launches})
        at, parts = peak(launches, {index: found[index] for index in stages})
        audits += [MemoryAudit(index, predicted[index], str(at), parts) for index in stages]
    return sorted(audits, key=lambda audit: audit.stage)


def _audit_loop(
    realized: RealizedPlan, programs: StagePrograms, loose: LooseMetrics
) -> MemoryAudit:
    """The peak of a step that is one program."""
    running = footprint(hollow_loop(realized, programs, loose).compile())
    held = measured_buffers(realized, 0, programs, {}).lasting
    parts = {**held, "results": running.result_bytes, "temporary": running.temporary_bytes}
    return MemoryAudit(0, realized.plan.predicted.peak_bytes_per_device[0], "step", parts)


def _footprints(programs: StagePrograms, names: Collection[str]) -> dict[str, Footprint]:
    return {name: footprint(make()) for name, make in programs.compilations(names).items()}


def footprint(program: jax.stages.Compiled) -> Footprint:
    """What a compiled program adds while it runs, on each of its devices."""
    sizes = program.memory_analysis()
    made = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return Footprint(made, sizes.temp_size_in_bytes)


def measured_buffers(
    realized: RealizedPlan, index: int, programs: StagePrograms, compiled: Mapping[str, Footprint]
):
    """A stage's buffers, as its programs are compiled for them."""

    def sizes(specs: Mapping, avals: Mapping) -> float:
        return sum(shard_bytes(programs.abstract(avals[n], spec)) for n, spec in specs.items())

    params = {path: programs.param_sharding(path) for path in programs.layout.params}
    lasting = {
        "parameters": sum(
            math.prod(sharding.shard_shape(aval.shape)) * aval.dtype.itemsize
            for path, sharding in params.items()
            for aval in [programs.avals.params[path]]
        ),
        "optimizer state": sum(
            map(shard_bytes, jax.tree.leaves(programs.abstract_optimizer_state()))
        ),
    }
    return stage_buffers(realized, index, sizes, lasting, lambda passing: compiled)


def shard_bytes(array: jax.ShapeDtypeStruct) -> int:
    """Bytes of one device's shard of an array."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def report(audits: list[MemoryAudit]) -> str:
    """A table, and a last line that says whether all are as predicted."""
    lines = [
        f"{'stage':>5} {'predicted':>13} {'measured':>13} {'ratio':>6}  {'at':<9}consisting of"
    ]
    for audit in audits:
        parts = sorted(audit.parts.items(), key=lambda part: -part[1])
        consists = ", ".join(f"{name} {size / _MIB:.1f}" for name, size in parts)
        lines.append(
            f"{audit.stage:>5} {audit.predicted_bytes / _MIB:>9.2f} MiB "
            f"{audit.measured_bytes / _MIB:>9.2f} MiB {audit.ratio:>6.3f}  {audit.at:<9}{consists}"
        )
    wrong = [audit for audit in audits if not audit.agrees]
    bounds = f"{LOWEST} to {HIGHEST} times the predicted"
    lines.append(
        f"memory: {len(wrong)} of {len(audits)} stages are not {bounds}"
        if wrong
        else f"memory: all stages are {bounds}"
    )
    return "\n".join(lines)
