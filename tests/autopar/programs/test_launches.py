"""Which instructions are dispatched together: by hand for small programs, by order for all."""

from types import SimpleNamespace

import pytest

from launcher.autopar.programs.communication import add_communication
from launcher.autopar.programs.instructions import Op
from launcher.autopar.programs.launches import fused_stages, launches
from launcher.autopar.programs.program import Wiring
from launcher.autopar.programs.schedules import schedule_by_name
from launcher.runtime.steps.whole_step import is_one_loop


def program_of(name: str, num_stages: int, num_microbatches: int, virtual_stages: int = 1):
    wiring = Wiring.chain(num_stages, with_norm=True, virtual_stages=virtual_stages)
    lists = schedule_by_name(name, virtual_stages).build(num_stages, num_microbatches)
    return add_communication(lists, wiring), wiring


@pytest.mark.parametrize(
    ("name", "num_microbatches", "fused"),
    [("1f1b", 4, {2}), ("gpipe", 4, set()), ("gpipe", 1, {2}), ("zb_h1", 4, set())],
)
def test_only_a_last_stage_that_goes_back_at_once_is_fused(name, num_microbatches, fused):
    assert fused_stages(*program_of(name, 3, num_microbatches)) == fused


def test_a_microbatch_of_a_fused_stage_is_one_launch():
    order = [str(launch) for launch in launches(*program_of("1f1b", 2, 2)) if launch.is_fused]
    assert order == ["1F0+1B0", "1F1+1B1"]


@pytest.mark.parametrize(
    ("name", "num_stages", "virtual_stages"),
    [("1f1b", 3, 1), ("gpipe", 3, 1), ("zb_h1", 3, 1), ("interleaved", 4, 2), ("1f1b", 1, 1)],
)
def test_every_instruction_is_launched_once_and_in_the_order_of_its_list(
    name, num_stages, virtual_stages
):
    program, wiring = program_of(name, num_stages, 4, virtual_stages)
    order = launches(program, wiring)
    for submesh, entries in enumerate(program.lists):
        played = [e for launch in order if launch.submesh == submesh for e in launch.instructions]
        assert played == list(entries)


@pytest.mark.parametrize(
    ("name", "num_stages", "num_microbatches", "loops"),
    [("1f1b", 1, 4, True), ("gpipe", 1, 1, True), ("gpipe", 1, 4, False), ("1f1b", 2, 4, False)],
)
def test_what_can_be_one_program(name, num_stages, num_microbatches, loops):
    program, _ = program_of(name, num_stages, num_microbatches)
    assert is_one_loop(program, SimpleNamespace(inputs={})) == loops
    assert not is_one_loop(program, SimpleNamespace(inputs={"scale": "a parameter"}))
    assert sum(e.op is Op.FORWARD for e in program.lists[0]) == num_microbatches
