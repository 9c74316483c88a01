"""A layer class on a mesh where every node has its pick already: what pricing known picks needs.

For a number of microbatches, the strategies found at another one are priced and not solved. The nodes and
edges are those of `ClassFragment`, each with one choice, and so are their costs: building them takes a
fraction of the time, as most of it goes into choices that nobody asks for.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from launcher.autopar.graphs.graph import Op, Value
from launcher.autopar.graphs.layers import LayerClass
from launcher.autopar.intra_op.class_fragment import ClassFragment, OpChoices
from launcher.autopar.intra_op.stage_problem import Key, Picks, StageSettings
from launcher.autopar.sharding.collectives import combine_cost
from launcher.autopar.sharding.ports import Port
from launcher.autopar.sharding.reshard import reshard_costs
from launcher.autopar.sharding.restrictions import ClassTags
from launcher.autopar.sharding.rules import Strategy, divides_evenly, shapes_of
from launcher.autopar.sharding.spec import Spec


class NotOfferedError(Exception):
    """A pick is none of the node's choices, or it takes all of them to say whether it is one."""


class PickedFragment(ClassFragment):
    """A fragment whose nodes have one choice each; `NotOfferedError` where a pick is none of theirs.

    Args:
        op_choices: of all fragments of the class, where the same picks for an op are often known.
    """

    def __init__(
        self, cls: LayerClass, tags: ClassTags, settings: StageSettings, picks: Picks,
        op_choices: dict[Hashable, OpChoices],
    ):  # fmt: skip
        self.picks = picks
        super().__init__(cls, tags, settings, op_choices)

    def name_of_choices(self, index: int) -> Hashable:
        """An op's pick is all it may choose."""
        return index, self.picks.get(self.key("op", index))

    def offer(self, key: Key, choices: tuple) -> None:
        """Give a node its pick."""
        pick = self.picks.get(key)
        if pick not in choices:
            raise NotOfferedError
        super().offer(key, (pick,))

    def strategies_of(self, index: int, op: Op) -> tuple[Strategy, ...]:
        """The pick of an op, if it may have it."""
        pick = self.picks.get(self.key("op", index))
        if not isinstance(pick, Strategy):
            raise NotOfferedError
        active = self.active_choices(op)
        if all(choice in of_axis for choice, of_axis in zip(pick.axes, active, strict=True)):
            is_offered = divides_evenly(pick, shapes_of(op), self.mesh.shape)
        else:  # one of those that are taken where nothing else divides evenly
            is_offered = pick in super().strategies_of(index, op)
        if not is_offered:
            raise NotOfferedError
        return (pick,)

    def costs_of(self, op: Op, found: Sequence[Strategy]) -> np.ndarray:
        """Seconds of an op; numbers are priced faster than arrays."""
        (pick,) = found
        seconds = self.settings.compute.op_s(op, pick.work_division(self.mesh.shape))
        return np.array([seconds + combine_cost(op, pick, self.mesh)])

    def matrix(self, value: Value, source: Port, specs: Sequence[Spec]) -> np.ndarray:
        """Resharding cost of a value; as a view, where it is from one spec to one."""
        if len(source.specs) > 1 or len(specs) > 1:
            return super().matrix(value, source, specs)
        aval = self.aval(value)
        costs = reshard_costs(aval.shape, aval.dtype.itemsize, self.mesh)
        row, column = costs.number[source.specs[0]], costs.number[specs[0]]
        return costs.between[row : row + 1, column : column + 1]

    def place_of(self, index: int, op: Op, operand: int) -> int:
        """The first operand that reads the same value, and reads it alike in every strategy.

        The others are readers of their own, as they are where all choices are there.
        """
        value = op.operands[operand]
        same = [place for place in range(operand) if op.operands[place] == value]
        if not same:
            return operand
        every = super().strategies_of(index, op)

        def specs(place: int) -> list[Spec]:
            return [strategy.operand_spec(place) for strategy in every]

        return next((place for place in same if specs(place) == specs(operand)), operand)
