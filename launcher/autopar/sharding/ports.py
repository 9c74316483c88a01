"""Where values enter and leave the nodes of a sharding problem."""

from collections.abc import Hashable
from dataclasses import dataclass

from launcher.autopar.sharding.spec import Spec


@dataclass(frozen=True, slots=True)
class Port:
    """A place where a value leaves or enters a node: `specs` has one entry per choice of the node.

    `index` tells apart the places of one node.
    """

    key: Hashable
    specs: tuple[Spec, ...]
    index: int = 0

    @property
    def name(self) -> tuple[Hashable, int]:
        return self.key, self.index
