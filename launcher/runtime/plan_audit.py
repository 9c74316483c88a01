"""The audit of a plan: every stage's programs compiled, their collectives beside the priced ones.

What is written while a program is traced (`StageEmitter.ledger`) is what the planner priced; XLA's HLO says
what became of it. Stages that are alike are compiled once.
"""

from collections.abc import Callable, Hashable, Set
from dataclasses import dataclass

import jax
import numpy as np

from launcher.autopar.programs.needed_programs import needed_programs
from launcher.autopar.realized.realize import RealizedPlan
from launcher.autopar.sharding.audit import Audit, audit
from launcher.autopar.sharding.collectives import Collective, hlo_dtype
from launcher.autopar.sharding.hlo import read_collectives
from launcher.autopar.sharding.shards import Ledger
from launcher.autopar.text.wording import count
from launcher.autopar.whole_graph.sharded_graph import collectives
from launcher.models.model import Model
from launcher.models.optimizer import Optimizer
from launcher.runtime.compiled.build_programs import build_programs
from launcher.runtime.compiled.stage_programs import StagePrograms
from launcher.runtime.steps.loose_metrics import LooseMetrics
from launcher.runtime.steps.whole_step import hollow_loop, is_one_loop


@dataclass(frozen=True, slots=True)
class ProgramAudit:
    """One program of a stage: `stages` are all that it stands for, and it runs `times` per step.

    What a program repeats in a loop counts once, as priced and as compiled.
    """

    stages: tuple[int, ...]
    program: str
    times: int
    audit: Audit

    def __str__(self) -> str:
        first, *others = self.stages
        where = f"stage {first}" + (f" (and {', '.join(map(str, others))})" if others else "")
        often = "once a step" if self.times == 1 else f"{self.times} times a step"
        return f"{where}, {self.program}, {often}:\n{self.audit}"


def audit_plan(
    realized: RealizedPlan,
    model: Model,
    optimizer: Optimizer,
    grid: np.ndarray,
    progress: Callable[[str], None],
) -> list[ProgramAudit]:
    """Compile the programs that the plan runs, of the stages that differ, and compare the collectives."""
    programs = build_programs(realized, model, optimizer, grid)
    loose = LooseMetrics(realized.planner.model)
    if is_one_loop(realized.program, loose):
        progress("auditing the step")
        return [_audit_loop(realized, programs[0], loose)]
    needed = needed_programs(realized.program, realized.wiring)
    alike: dict[Hashable, list[int]] = {}
    for index, times in enumerate(needed):
        alike.setdefault((tuple(times), _likeness(realized, index)), []).append(index)
    found = []
    for number, stages in enumerate(alike.values()):
        progress(f"auditing {number + 1} of {len(alike)} kinds of stages")
        stage = programs[stages[0]]
        for name, compile_ in stage.compilations(needed[stages[0]]).items():
            times = needed[stages[0]].get(name, 1)  # `reduce_tied` once a step
            does = {"synchronize"} if name.endswith("synchronize") else {name}
            result = _audit(stage, compile_, does=does)
            found.append(ProgramAudit(tuple(stages), name, times, result))
    return found


def _audit_loop(
    realized: RealizedPlan, programs: StagePrograms, loose: LooseMetrics
) -> ProgramAudit:
    """The step as one program, with its loop over microbatches."""
    loop = hollow_loop(realized, programs, loose)
    result = _audit(programs, loop.compile, does={"synchronize", "update"})
    num_microbatches, name = realized.plan.num_microbatches, "step"
    if num_microbatches > 1:
        name += f" (a loop over {num_microbatches} microbatches, whose collectives stand here once"
        name += ", and those of the last one, behind it, again)" if loop.overlaps else ")"
    return ProgramAudit((0,), name, 1, result)


def _likeness(realized: RealizedPlan, index: int) -> Hashable:
    """Equal for stages whose programs are the same but for the devices and the names of parameters."""
    stage = realized.stages[index]
    first, last = stage.layout.first, stage.layout.last
    classes = tuple(layer.cls.name for layer in realized.planner.model.layers[first:last])
    picks = tuple(sorted(map(str, stage.sharding.picks.items())))
    shared = any(realized.owner[path] != index for path in stage.layout.params)
    return classes, picks, stage.settings.mesh, stage.settings.zero, stage.layout.recompute, shared


def _audit(
    programs: StagePrograms, compile_: Callable[[], jax.stages.Compiled], *, does: Set[str]
) -> Audit:
    """Compile a program, and compare.

    Args:
        does: of which programs it does the work. Not all of that is written down as it is traced.
    """
    programs.emitter.ledger = Ledger()
    compiled = read_collectives(compile_().as_text())
    priced = list(programs.emitter.ledger.collectives)
    if "synchronize" in does:
        priced += _norm(programs)
    if "update" in does:
        priced += collectives(programs.sharded_update[1])
    return audit(priced, compiled, programs.logical)


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
        f"audit: {total} collectives priced in {count(len(audits), 'program')}, and the same compiled"
        if not differing
        else f"audit: {len(differing)} of {len(audits)} programs differ from what was priced"
    )
    return "\n\n".join([*map(str, audits), end])
