"""What the picks of a stage cost, by when it falls due."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from launcher.autopar.intra_op.stage_problem import (
    EdgeCost,
    Group,
    Key,
    NodeCost,
    Picks,
    StageProblem,
)


@dataclass(frozen=True, slots=True)
class Seconds:
    """Forward and backward per microbatch, the others per step.

    Attributes:
        again: of `forward`, what the backward pass needs once more where layers are recomputed.
        shared_input, shared_weight: of the halves of the backward pass, resharding that is there already
            where the forward pass has just been run again, such as gathered weights.
    """

    forward: float = 0.0
    again: float = 0.0
    shared_input: float = 0.0
    shared_weight: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0
    synchronize: float = 0.0
    update: float = 0.0

    @property
    def backward(self) -> float:
        """Both halves."""
        return self.backward_input + self.backward_weight

    def halves(self, recompute: str) -> tuple[float, float]:
        """Both halves of the backward pass under a stage's `recompute`, which the first one does.

        With "full" that is the whole forward pass, of which only the end of the last layer is not needed.
        """
        if recompute == "none":
            return self.backward_input, self.backward_weight
        again = {"layer": self.again, "full": self.forward}[recompute]
        return (
            self.backward_input + again - self.shared_input,
            self.backward_weight - self.shared_weight,
        )

    def recomputed(self, recompute: str) -> float:
        """What the backward pass takes longer under a stage's `recompute`."""
        first, second = self.halves(recompute)
        return first + second - self.backward

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(
            self.forward + other.forward,
            self.again + other.again,
            self.shared_input + other.shared_input,
            self.shared_weight + other.shared_weight,
            self.backward_input + other.backward_input,
            self.backward_weight + other.backward_weight,
            self.synchronize + other.synchronize,
            self.update + other.update,
        )

    def __mul__(self, times: float) -> "Seconds":
        return Seconds(
            self.forward * times,
            self.again * times,
            self.shared_input * times,
            self.shared_weight * times,
            self.backward_input * times,
            self.backward_weight * times,
            self.synchronize * times,
            self.update * times,
        )


def seconds_of(problem: StageProblem, picks: Picks) -> dict[Group, Seconds]:
    """What picks cost each time a group occurs."""
    at = {key: choices.index(picks[key]) for key, choices in problem.choices.items()}
    at_hand = _made_again(problem.edges, at)
    totals: dict[Group, list[float]] = {}  # in the order of the fields of `Seconds`

    def book(item: NodeCost | EdgeCost, cost: float, *, is_update: bool, is_shared: bool) -> None:
        row, part = totals.setdefault(item.group, [0.0] * 8), item.part
        row[0] += cost * part.forward
        row[1] += cost * part.again
        row[2] += cost * (is_shared and part.backward_input)
        row[3] += cost * (is_shared and part.backward_weight)
        row[4] += cost * part.backward_input
        row[5] += cost * part.backward_weight
        row[7 if is_update else 6] += cost * part.once

    for node in problem.nodes:
        book(node, float(node.costs[at[node.key]]), is_update=True, is_shared=False)
    for edge in problem.edges:
        cost = float(edge.costs[at[edge.source], at[edge.target]])
        is_shared = edge.part.backward and _what(edge, at) in at_hand
        book(edge, cost, is_update=False, is_shared=is_shared)
    return {group: Seconds(*row) for group, row in totals.items()}


def _made_again(edges: Iterable[EdgeCost], at: Mapping[Key, int]) -> set[tuple]:
    """In which specs running the forward pass again leaves what the backward pass reads as well."""
    return {_what(edge, at) for edge in edges if edge.value is not None and edge.part.again}


def _what(edge: EdgeCost, at: Mapping[Key, int]) -> tuple:
    """Of which class and value, and in which spec, an edge makes a shard."""
    return (edge.group, edge.value, edge.specs[at[edge.target]]) if edge.specs else ()
