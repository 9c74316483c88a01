"""What comes of looking for stages: the best arrangement, and what none can beat."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.autopar.inter_op.by_period import Bound
from launcher.autopar.inter_op.placement import Placement
from launcher.autopar.inter_op.stage_table import StageChoice


@dataclass(frozen=True, slots=True, eq=False)
class Arrangement:
    """Stages, where each lies, and how long a step takes with them."""

    stages: tuple[StageChoice, ...]
    placement: tuple[Placement, ...]
    step_s: float

    def renumbered(self, numbers: Sequence[int]) -> "Arrangement":
        """The same with other numbers for submeshes."""
        stages = tuple(replace(c, submesh=numbers[c.submesh]) for c in self.stages)
        return replace(self, stages=stages)


@dataclass(frozen=True, slots=True, eq=False)
class Arranged:
    """The best arrangement that was found, if one is worth it, and what none can beat, part by part."""

    best: Arrangement | None
    bounds: tuple[Bound, ...]
    num_candidates: int

    @property
    def bound_s(self) -> float:
        """What no arrangement can beat."""
        return min((bound.least_s for bound in self.bounds), default=math.inf)
