"""Strategies of the whole model on a mesh: solved, or taken over from another number of microbatches.

A search over numbers of microbatches passes on what it found at one (`Known`), to be priced anew and not
solved, unless it was found for microbatches of many times fewer samples. ZeRO-1 and -2 take the strategies
without ZeRO; 3, which gathers the weights, has its own; what scatters gradients takes those of what does not,
but for where gradients are summed.

Where the fastest strategies hold the weights in nearly as little memory as any, those that a price on memory
would lead to are not looked for. Left out, so: plans that fit by the last hundredth of the weights' memory.
"""

from dataclasses import dataclass, replace

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.intra_op.intra_op import IntraOpPlanner, Picks, StageSharding
from launcher.autopar.intra_op.stage_problem import StageSettings
from launcher.autopar.sharding.param_costs import scattered_spec

_FRESH = 6  # times fewer samples in a microbatch: for those, other strategies are the best
_LEAN = 0.01  # of the weights' memory: what others may save at most


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """What a mesh's nodes chose, and the number of microbatches that it was solved for.

    Attributes:
        is_lean: whether others need hardly less memory for the weights; None where nobody has asked.
    """

    picks: Picks
    num_microbatches: int
    is_lean: bool | None = None


Key = tuple[LogicalMesh, float, int]
Known = dict[Key, Solution]
"""Solutions by mesh, weight of the price on memory (`Choices`), and ZeRO stage: 0 or 3."""


class Strategies:
    """Finds the strategies of a model at one number of microbatches.

    Args:
        known: to price instead of solving; those that are solved are added.
    """

    def __init__(self, planner: IntraOpPlanner, num_microbatches: int, known: Known):
        self._planner, self._num_microbatches, self._known = planner, num_microbatches, known
        self._whole = (0, len(planner.model.layers))
        self._found: dict[Key, StageSharding] = {}

    def of(self, settings: StageSettings, weight: float) -> StageSharding | None:
        """The strategies for some settings, priced; None where they leave gradients nowhere to scatter from.

        Args:
            weight: of the price on memory that the settings have.
        """
        plain = replace(settings, zero=3 if settings.zero == 3 else 0, scatter=False)
        solved = self._solve(plain, weight)
        if settings == plain:
            return solved
        if settings.scatter:
            picks = self._scattered(solved)
            return self._planner.reprice_if_possible(*self._whole, settings, picks)
        return self._planner.reprice(*self._whole, settings, solved.picks)

    def is_lean(self, settings: StageSettings) -> bool:
        """Whether hardly any strategies need less memory for the weights than the fastest.

        Args:
            settings: without ZeRO, with a price on memory.
        """
        self._solve(replace(settings, memory_s_per_byte=0.0), 0.0)
        key = (settings.mesh, 0.0, settings.zero)
        own = self._known[key]
        if own.is_lean is None:
            saving = self._planner.could_save(*self._whole, settings, own.picks)
            own = self._known[key] = replace(own, is_lean=saving <= _LEAN)
        return own.is_lean

    def _solve(self, settings: StageSettings, weight: float) -> StageSharding:
        key = (settings.mesh, weight, settings.zero)
        if key not in self._found:
            found = None
            if self._is_fresh(key):
                picks = self._known[key].picks
                found = self._planner.reprice_if_possible(*self._whole, settings, picks)
            if found is None:
                found = self._planner.solve(*self._whole, settings)
                self._known[key] = Solution(found.picks, self._num_microbatches)
            self._found[key] = found
        return self._found[key]

    def _is_fresh(self, key: Key) -> bool:
        """Whether strategies are known that were not solved for much smaller microbatches."""
        known = self._known.get(key)
        return known is not None and known.num_microbatches <= _FRESH * self._num_microbatches

    def _scattered(self, sharding: StageSharding) -> Picks:
        """The same picks with gradients that are scattered behind every microbatch."""
        mesh, classes = sharding.settings.mesh, self._planner.classes
        summed = {
            (kind, name, slot): scattered_spec(
                pick, classes[name].joint.avals[classes[name].joint.inputs[slot]].shape, mesh.shape
            )
            for (kind, name, slot), pick in sharding.picks.items()
            if kind == "accumulator"
        }
        return {**sharding.picks, **summed}
