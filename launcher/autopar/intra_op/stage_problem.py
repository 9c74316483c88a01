"""A stage as a pairwise problem: every op, input, output and gradient of its layers picks a sharding.

Layers of one class stand for each other: the class appears once, its costs times the number of layers it
stands for, and all of them get the same strategies. Nodes and what they choose:

    slot         spec of a layer's input; for parameters and state, of where they lie at home
    op           strategy of one op of the joint graph
    cotangent    spec of the gradient that a layer's output receives
    export       spec of a value that leaves the stage, forward
    return       spec of a gradient that leaves the stage, backward
    accumulator  spec of a parameter's gradient while it is summed over microbatches; may be partial
    ..._copy     spec that a value with several readers in the forward or the backward program is brought to
                 before they are served, so that they share what that costs

An edge prices the resharding between what one node yields and the next one reads. All costs are seconds
per microbatch; what happens once a step (synchronising gradients, the update) counts a
`num_microbatches`-th.

Left out: memory, which the caller checks for the solution; and that what is resharded for running the forward
pass again may serve the backward pass too, which prices of solutions count (`stage_seconds`).
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np

from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.graph import Value
from launcher.autopar.graphs.optimizer_state import ADAMW, OptimizerFootprint
from launcher.autopar.sharding.restrictions import Restrictions
from launcher.autopar.sharding.rules import Strategy
from launcher.autopar.sharding.spec import Spec
from launcher.autopar.solver import PairwiseProblem

Key = tuple  # ("op", class, index), ("slot", class, slot), ... as listed above
Picks = Mapping[Key, Spec | Strategy]


@dataclass(frozen=True, slots=True)
class Part:
    """When a cost falls due: in the forward pass, a half of the backward pass, or once per step.

    Attributes:
        again: of the forward pass, and once more where layers are recomputed: their backward pass needs it.
    """

    forward: bool = False
    again: bool = False
    backward_input: bool = False
    backward_weight: bool = False
    once: bool = False

    @property
    def backward(self) -> bool:
        return self.backward_input or self.backward_weight

    def weight(self, settings: "StageSettings") -> float:
        again = {"none": False, "layer": self.again, "full": self.forward}[settings.recompute]
        return self.forward + self.backward + again + self.once / settings.num_microbatches


FORWARD, BACKWARD_INPUT = Part(forward=True), Part(backward_input=True)
BACKWARD_WEIGHT, ONCE = Part(backward_weight=True), Part(once=True)


@dataclass(frozen=True, slots=True)
class StageSettings:
    """What a stage is priced for.

    Attributes:
        zero, scatter, recompute: as in a plan's stage.
        memory_s_per_byte: what the solver is charged for a byte of parameters, optimizer state and
            accumulators per device, where memory is short; no part of any reported cost.
    """

    mesh: LogicalMesh
    compute: ComputeModel
    restrictions: Restrictions
    num_microbatches: int
    zero: int = 0
    scatter: bool = False
    recompute: str = "none"
    memory_s_per_byte: float = 0.0
    optimizer: OptimizerFootprint = ADAMW


FORWARD_COPY, BACKWARD_COPY = "forward_copy", "backward_copy"
Group = Hashable  # what occurs together: a class of layers, a connection of two, the parameters of a slot
ONCE_IN_STAGE: Group = "stage"


def owned_group(place: tuple[str, int]) -> Group:
    """What each parameter costs that lies at a (class, slot) and that the stage updates."""
    return ("owned", *place)


def borrowed_group(place: tuple[str, int]) -> Group:
    """What each parameter costs that lies at a (class, slot) and that another stage updates."""
    return ("borrowed", *place)


@dataclass(frozen=True, slots=True)
class NodeCost:
    """Costs of a node's choices, each time its group occurs."""

    key: Key
    costs: np.ndarray
    part: Part
    group: Group


@dataclass(frozen=True, slots=True)
class EdgeCost:
    """Costs of the choices of two nodes, each time the group occurs.

    Attributes:
        value: which both passes of the layer read, so that running the forward pass again may bring it to
            where the backward pass reads it; None for others.
        specs: in which `target` reads it, by choice.
    """

    source: Key
    target: Key
    costs: np.ndarray
    part: Part
    group: Group
    value: Value | None = None
    specs: tuple[Spec, ...] = ()


@dataclass(slots=True)
class StageProblem:
    """Nodes with their choices (specs or strategies), and the costs between them.

    `counts` says how often each group occurs in the stage.
    """

    settings: StageSettings
    counts: Mapping[Group, int]
    choices: dict[Key, tuple] = field(default_factory=dict)
    nodes: list[NodeCost] = field(default_factory=list)
    edges: list[EdgeCost] = field(default_factory=list)
    penalties: list[NodeCost] = field(default_factory=list)  # steer the solver, and are no costs

    def pairwise(self) -> tuple[PairwiseProblem, tuple[Key, ...]]:
        """The problem for the solver, and which node is which."""
        keys = tuple(self.choices)
        number = {key: i for i, key in enumerate(keys)}
        costs = [np.zeros(len(self.choices[key])) for key in keys]
        for node in (*self.nodes, *self.penalties):
            costs[number[node.key]] += self._weight(node) * node.costs
        matrices: dict[tuple[int, int], np.ndarray] = {}
        for edge in self.edges:
            i, j, matrix = number[edge.source], number[edge.target], self._weight(edge) * edge.costs
            if i == j:
                costs[i] += np.diagonal(matrix)
                continue
            pair, matrix = ((i, j), matrix) if i < j else ((j, i), matrix.T)
            matrices[pair] = matrices.get(pair, 0.0) + matrix
        return PairwiseProblem(tuple(costs), matrices), keys

    def penalty(self, picks: Picks) -> float:
        """What the penalties of picks add to the objective."""
        at = {node.key: self.choices[node.key].index(picks[node.key]) for node in self.penalties}
        return sum(self._weight(node) * float(node.costs[at[node.key]]) for node in self.penalties)

    def least_penalty(self) -> float:
        """What no picks' penalties are less than."""
        return sum(self._weight(node) * float(node.costs.min()) for node in self.penalties)

    def _weight(self, cost: NodeCost | EdgeCost) -> float:
        return self.counts.get(cost.group, 0) * cost.part.weight(self.settings)
