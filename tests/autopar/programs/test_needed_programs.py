"""Which programs each stage runs, under every schedule."""

import pytest

from launcher.autopar.programs.communication import add_communication
from launcher.autopar.programs.needed_programs import needed_programs
from launcher.autopar.programs.program import Wiring
from launcher.autopar.programs.schedules import schedule_by_name

ONCE = ("synchronize", "update")
WHOLE = ("forward", "backward", *ONCE)
SPLIT = ("forward", "backward_input", "backward_weight", *ONCE)
FUSED = ("forward_backward", *ONCE)


@pytest.mark.parametrize(
    ("name", "virtual_stages", "num_microbatches", "needed"),
    [
        ("gpipe", 1, 4, (WHOLE, WHOLE, WHOLE, WHOLE)),
        ("gpipe", 1, 1, (WHOLE, WHOLE, WHOLE, FUSED)),
        ("1f1b", 1, 4, (WHOLE, WHOLE, WHOLE, FUSED)),
        ("interleaved", 2, 4, (WHOLE, WHOLE, WHOLE, FUSED)),
        ("zb_h1", 1, 4, (SPLIT, SPLIT, SPLIT, SPLIT)),
    ],
)
def test_a_stage_needs_what_its_instructions_are_launched_as(
    name, virtual_stages, num_microbatches, needed
):
    tied = ((0, 3),)  # what is lent and given back is no program of an instruction's own
    wiring = Wiring.chain(4, tied=tied, with_norm=True, virtual_stages=virtual_stages)
    lists = schedule_by_name(name, virtual_stages).build(4, num_microbatches)
    found = needed_programs(add_communication(lists, wiring), wiring)
    assert tuple(map(tuple, found)) == needed
    for times in found:
        assert {n: times[n] for n in times if n not in ONCE} == dict.fromkeys(
            [n for n in times if n not in ONCE], num_microbatches
        )
        assert all(times[name] == 1 for name in ONCE)
