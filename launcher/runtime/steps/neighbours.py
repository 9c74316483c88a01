"""Which stages of a realized plan exchange something, and which of them share a submesh."""

from launcher.autopar.realized.realize import RealizedPlan


class Neighbours:
    """By stage: the stages it exchanges something with, and those of them on its own submesh.

    What stays on a submesh is no message: it is handed over where it is made.
    """

    def __init__(self, realized: RealizedPlan):
        wiring, stages = realized.wiring, range(len(realized.stages))
        submesh = realized.program.submesh_of

        def pairs(edges) -> dict[int, list[int]]:
            return {stage: [other for one, other in edges if one == stage] for stage in stages}

        def here(edges) -> dict[int, list[int]]:
            return pairs([(one, other) for one, other in edges if submesh[one] == submesh[other]])

        back = [(destination, source) for source, destination in wiring.differentiable]
        self.later, self.earlier = pairs(wiring.edges), pairs(back)
        self.fed_here, self.returned_here = here(wiring.edges), here(back)
        self.users_here = here(wiring.tied)
        self.siblings = here([(one, other) for one in stages for other in stages])
