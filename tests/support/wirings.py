"""Wirings that schedules are tested on, beside plain chains."""

from launcher.autopar.programs.program import Wiring

SKIPPING = Wiring(
    edges=((0, 1), (1, 2), (0, 2), (2, 3)),
    differentiable=((0, 1), (1, 2), (2, 3)),
    tied=((0, 3), (3, 1)),
    with_norm=True,
)
VIRTUAL = Wiring(
    edges=((0, 1), (1, 2), (2, 3), (0, 2), (1, 3)),
    differentiable=((0, 1), (1, 2), (2, 3), (1, 3)),
    tied=((0, 3), (2, 0)),
    with_norm=True,
    submesh_of=(0, 1, 0, 1),
)
ALONE = Wiring.chain(2, tied=((0, 1),), with_norm=True, virtual_stages=2)
