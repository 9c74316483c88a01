"""The programs of every stage of a realized plan, on the devices that the plan gives it."""

from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from launcher.autopar.realized.realize import RealizedPlan
from launcher.models.model import Model
from launcher.models.optimizer import Optimizer
from launcher.runtime.compiled.stage_programs import StagePrograms


def build_programs(
    realized: RealizedPlan, model: Model, optimizer: Optimizer, grid: np.ndarray,
    stages: Collection[int] | None = None,
) -> dict[int, StagePrograms]:  # fmt: skip
    """Build the programs of some stages (None: all), not compiled yet, by stage.

    `grid` are hosts by devices per host.
    """
    return {
        index: _programs(realized, index, model, optimizer, grid)
        for index in range(len(realized.stages))
        if stages is None or index in stages
    }


def _programs(
    realized: RealizedPlan, index: int, model: Model, optimizer: Optimizer, grid: np.ndarray
) -> StagePrograms:
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
        split=realized.program.splits_backward,
    )
