"""The audit of a plan: every stage's programs compiled, their collectives beside the priced ones.

What is written while a program is traced (`StageEmitter.ledger`) is what the planner priced; XLA's HLO says
what became of it. Stages that are alike are compiled once.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np

from launcher.autopar.audit import Audit, audit
from launcher.autopar.collectives import Collective, hlo_dtype
from launcher.autopar.hlo import read_collectives
from launcher.autopar.realize import RealizedPlan
from launcher.autopar.sharded_graph import collectives
from launcher.autopar.shards import Ledger
from launcher.models.model import Model
from launcher.models.optimizer import Optimizer
from launcher.runtime.build_programs import build_programs
from launcher.runtime.stage_programs import StagePrograms


@dataclass(frozen=True, slots=True)
class ProgramAudit:
    """One program of a stage: `stages` are all that it stands for, and it runs `times` per step."""

    stages: tuple[int, ...]
    program: str
    times: int
    audit: Audit

    def __str__(self) -> str:
        first, *others = self.stages
        where = f"stage {first}" + (f" (and {', '.join(map(str, others))})" if others else "")
        return f"{where}, {self.program}, {self.times} times a step:\n{self.audit}"


def audit_plan(
    realized: RealizedPlan,
    model: Model,
    optimizer: Optimizer,
    grid: np.ndarray,
    progress: Callable[[str], None],
) -> list[ProgramAudit]:
    """Compile the stages that differ, and compare the collectives of each program."""
    alike: dict[Hashable, list[int]] = {}
    for index in range(len(realized.stages)):
        alike.setdefault(_likeness(realized, index), []).append(index)
    programs = build_programs(realized, model, optimizer, grid)
    found = []
    for number, stages in enumerate(alike.values()):
        progress(f"auditing {number + 1} of {len(alike)} kinds of stages")
        for name, times, result in _audit_stage(realized, programs[stages[0]]):
            found.append(ProgramAudit(tuple(stages), name, times, result))
    return found


def _likeness(realized: RealizedPlan, index: int) -> Hashable:
    """Equal for stages whose programs are the same but for the devices and the names of parameters."""
    stage = realized.stages[index]
    first, last = stage.layout.first, stage.layout.last
    classes = tuple(layer.cls.name for layer in realized.planner.model.layers[first:last])
    picks = tuple(sorted(map(str, stage.sharding.picks.items())))
    shared = any(realized.owner[path] != index for path in stage.layout.params)
    return classes, picks, stage.settings.mesh, stage.settings.zero, stage.layout.recompute, shared


def _audit_stage(realized: RealizedPlan, programs: StagePrograms):
    per_microbatch = (
        ("forward", "backward_input", "backward_weight")
        if programs.microbatch.is_split
        else ("forward", "backward")
    )
    names = (*per_microbatch, "synchronize", "update")
    for name, compile_ in programs.compilations(names).items():
        if name not in names:
            continue
        times = realized.plan.num_microbatches if name in per_microbatch else 1
        programs.emitter.ledger = Ledger()
        text = compile_().as_text()
        priced = programs.emitter.ledger.collectives
        if name == "synchronize":
            priced += _norm(programs)
        if name == "update":
            priced += collectives(programs.sharded_update[1])
        yield name, times, audit(priced, read_collectives(text), programs.logical)


def _norm(programs: StagePrograms) -> list[Collective]:
    """The sum of the squared gradients over all devices of the stage: one all-reduce of a scalar."""
    mesh = programs.logical
    active = [name for name, n in zip(mesh.axis_names, mesh.shape, strict=True) if n > 1]
    if not active:
        return []
    axis = active[0] if len(active) == 1 else "several"
    dtype = programs.norm_dtype
    return [Collective("all-reduce", dtype.itemsize, axis, hlo_dtype(dtype), "norm", 1.0, 0.0)]


def report(audits: list[ProgramAudit]) -> str:
    """All comparisons, and a last line that says whether they agree."""
    differing = [a for a in audits if not a.audit.agrees]
    total = sum(priced for a in audits for _, priced, _ in a.audit.rows)
    end = (
        f"audit: {total} collectives priced in {len(audits)} programs, and the same compiled"
        if not differing
        else f"audit: {len(differing)} of {len(audits)} programs differ from what was priced"
    )
    return "\n\n".join([*map(str, audits), end])
