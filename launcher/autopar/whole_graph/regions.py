"""A graph with the bodies of its loops and branches, every part folded: what is sharded as a whole.

A region is addressed by its path: () for the graph itself, and for a body the path of the region that
holds the loop, the position of the loop's op, and the number of the body.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.autopar.graphs.folding import Folding, fold, unfolded
from launcher.autopar.graphs.graph import Graph
from launcher.autopar.whole_graph.control_flow import Flow, flow_of, is_control_flow

Path = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Nest:
    """A loop or branch inside a region, with a region per body."""

    flow: Flow
    bodies: tuple["Region", ...]


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """A graph, which of its ops stand for others, and what is nested in it.

    `nests` is keyed by the position of an op that stands for its class; so is `members`, the number of ops
    in the class.
    """

    path: Path
    graph: Graph
    folding: Folding
    members: Mapping[int, int]
    nests: Mapping[int, Nest]

    def leader(self, position: int) -> int:
        """The position of the op that stands for the op at `position`."""
        return self.folding.representative[position]


def build_region(graph: Graph, *, folded: bool = True, path: Path = ()) -> Region:
    """Fold a graph and the bodies nested in it."""
    return region_of(graph, fold(graph.ops) if folded else unfolded(graph.ops), path)


def region_of(graph: Graph, folding: Folding, path: Path = ()) -> Region:
    """A region with a given folding; the bodies nested in it are folded by their repeats."""
    nests = {}
    for position, op in enumerate(graph.ops):
        if is_control_flow(op) and folding.representative[position] == position:
            flow = flow_of(op)
            bodies = tuple(
                build_region(body.graph, path=(*path, position, number))
                for number, body in enumerate(flow.bodies)
            )
            nests[position] = Nest(flow, bodies)
    return Region(path, graph, folding, Counter(folding.representative), nests)
