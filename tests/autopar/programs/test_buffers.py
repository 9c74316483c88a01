"""The walk over a submesh's instructions: what is held at each, counted by hand."""

import pytest

from launcher.autopar.programs.buffers import Footprint, StageBuffers, held, peak
from launcher.autopar.programs.instructions import Instruction, Op
from launcher.autopar.programs.launches import Launch

BUFFERS = StageBuffers(
    lasting={"parameters": 1000.0},
    passing={
        "accumulators": 500.0,
        "gradients": 400.0,
        "kept": 100.0,
        "exports": 10.0,
        "returns": 7.0,
    },
    received={(Op.RECEIVE_ACTIVATION, 0): 3.0, (Op.RECEIVE_COTANGENT, 2): 2.0},
    programs={
        "forward": Footprint(110.0, 20.0),
        "backward": Footprint(7.0, 60.0),
        "forward_backward": Footprint(17.0, 150.0),
        "synchronize": Footprint(400.0, 0.0),
    },
)


def launches(text: str) -> list[Launch]:
    return [
        Launch(0, tuple(Instruction.parse(entry) for entry in entries.split("+")))
        for entries in text.split()
    ]


def totals(text: str) -> list[float]:
    return [total for _, total in held(launches(text), {1: BUFFERS})]


def test_what_is_held_is_what_was_made_and_not_yet_freed():
    text = "1RECV_F0<0 1F0 1SEND_F0>2 1FREE_F0 1RECV_B0<2 1B0 1FREE_K0 1SEND_B0>0 1FREE_B0 1S 1N 1U"
    base = 1500.0
    assert totals(text) == [
        base + 3,
        base + 3 + 130,
        base + 3 + 110,
        base + 3 + 110,
        base + 3 + 100 + 2,
        base + 3 + 100 + 2 + 67,
        base + 3 + 100 + 7,
        base + 7,
        base + 7,
        base + 400,
        1000 + 400,
        1000 + 400,
    ]


def test_each_microbatch_in_flight_holds_its_own():
    assert totals("1F0 1FREE_F0 1F1 1FREE_F1 1B0")[-1] == 1500 + 200 + 67
    assert totals("1F0 1FREE_F0 1F1 1FREE_F1 1B0 1FREE_K0 1FREE_B0 1B1")[-1] == 1500 + 100 + 67


def test_what_one_program_keeps_for_itself_is_held_nowhere_else():
    assert totals("1F0+1B0 1FREE_K0 1F1+1B1") == [1500 + 167, 1500 + 17, 1500 + 17 + 167]


def test_the_stages_of_a_submesh_add_up():
    other = {1: BUFFERS, 3: BUFFERS}
    at, parts = peak(launches("1F0 1FREE_F0 3F0"), other)
    assert str(at) == "3F0"
    assert sum(parts.values()) == 2 * 1500 + 100 + 130


def test_a_split_backward_lets_go_of_what_its_second_half_does_not_read():
    split = StageBuffers(
        lasting={},
        passing={"accumulators": 0.0, "kept": 100.0, "kept for weights": 30.0, "let go of": 80.0},
        programs={},
    )
    moments = held(launches("1F0 1I0 1W0 1FREE_K0 1N"), {1: split})
    assert [total for _, total in moments] == [0, 100, 50, 50, 0]


@pytest.mark.parametrize("first", ["1U", "1S 1U"])
def test_the_gradients_end_with_the_update(first):
    assert totals(f"{first} 1N")[-1] in (1500, 1000)
