"""The programs of every stage of a realized plan, on the devices that the plan gives it."""

import jax.numpy as jnp
import numpy as np

from launcher.autopar.needed_programs import needed_programs
from launcher.autopar.realize import RealizedPlan
from launcher.models.model import Model
from launcher.models.optimizer import Optimizer
from launcher.runtime.stage_programs import StagePrograms


def build_programs(
    realized: RealizedPlan, model: Model, optimizer: Optimizer, grid: np.ndarray
) -> list[StagePrograms]:
    """Build the programs of all stages, not compiled yet; `grid` are hosts by devices per host."""
    return [
        _programs(realized, index, model, optimizer, grid, split="backward_weight" in needed)
        for index, needed in enumerate(needed_programs(realized.program, realized.wiring))
    ]


def _programs(
    realized: RealizedPlan, index: int, model: Model, optimizer: Optimizer, grid: np.ndarray, *,
    split: bool,
) -> StagePrograms:  # fmt: skip
    stage = realized.stages[index]
    # A parameter that no gradient reaches is updated too, as by an optimizer that sees zeros.
    owned = {
        path
        for path in stage.layout.params
        if realized.owner[path] == index
        and jnp.issubdtype(model.abstract_params[path].dtype, jnp.floating)
    }
    tied = {
        path: len(stages)
        for path, stages in realized.contributors.items()
        if path in owned and stages
    }
    return StagePrograms(
        stage.emitter,
        grid[np.ix_(stage.stage.hosts, stage.stage.devices)].flatten(),
        optimizer,
        owned=frozenset(owned),
        tied=tied,
        num_norms=len(realized.stages),
        settings=stage.settings,
        split=split,
    )
