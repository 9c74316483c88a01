"""The text form of instructions, both ways."""

import pytest

from launcher.autopar.programs.instructions import (
    COMPUTES,
    FREES,
    PER_MICROBATCH,
    RECEIVE_OF_READER,
    RECEIVE_OF_SEND,
    RECEIVES,
    SENDS,
    Instruction,
    Op,
)
from launcher.errors import ScheduleError

TEXTS = {
    "2F0": Instruction(op=Op.FORWARD, stage=2, microbatch=0),
    "12B345": Instruction(op=Op.BACKWARD, stage=12, microbatch=345),
    "3I4": Instruction(op=Op.BACKWARD_INPUT, stage=3, microbatch=4),
    "3W0": Instruction(op=Op.BACKWARD_WEIGHT, stage=3, microbatch=0),
    "2FREE_F0": Instruction(op=Op.FREE_ACTIVATION, stage=2, microbatch=0),
    "10FREE_B11": Instruction(op=Op.FREE_COTANGENT, stage=10, microbatch=11),
    "0FREE_K5": Instruction(op=Op.FREE_STASH, stage=0, microbatch=5),
    "0S": Instruction(op=Op.SYNCHRONIZE, stage=0),
    "1N": Instruction(op=Op.NORM, stage=1),
    "1U": Instruction(op=Op.UPDATE, stage=1),
    "2SEND_F0>3": Instruction(op=Op.SEND_ACTIVATION, stage=2, microbatch=0, peer=3),
    "3RECV_F0<2": Instruction(op=Op.RECEIVE_ACTIVATION, stage=3, microbatch=0, peer=2),
    "3SEND_B7>2": Instruction(op=Op.SEND_COTANGENT, stage=3, microbatch=7, peer=2),
    "2RECV_B7<3": Instruction(op=Op.RECEIVE_COTANGENT, stage=2, microbatch=7, peer=3),
    "3SEND_G>0": Instruction(op=Op.SEND_TIED_GRADIENT, stage=3, peer=0),
    "0RECV_G<3": Instruction(op=Op.RECEIVE_TIED_GRADIENT, stage=0, peer=3),
    "0SEND_N>11": Instruction(op=Op.SEND_NORM, stage=0, peer=11),
    "11RECV_N<0": Instruction(op=Op.RECEIVE_NORM, stage=11, peer=0),
    "0SEND_P>3": Instruction(op=Op.SEND_TIED_PARAMETER, stage=0, peer=3),
    "3RECV_P<0": Instruction(op=Op.RECEIVE_TIED_PARAMETER, stage=3, peer=0),
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_goes_both_ways(text):
    assert str(TEXTS[text]) == text
    assert Instruction.parse(text) == TEXTS[text]
    assert Instruction.parse(f" {text} ") == TEXTS[text]


def test_every_operation_has_a_text_above():
    assert {instruction.op for instruction in TEXTS.values()} == set(Op)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("2X0", "not of the form"),
        ("F0", "not of the form"),
        ("", "not of the form"),
        ("2F-1", "not of the form"),
        ("2SEND_U0>1", "not of the form"),
        ("2FREE_G0", "not of the form"),
        ("2W", "W needs a microbatch"),
        ("2FREE_K", "FREE_K needs a microbatch"),
        ("2FREE_F0>3", "FREE_F takes no peer"),
        ("2F", "F needs a microbatch"),
        ("2S0", "S takes no microbatch"),
        ("2SEND_G0>1", "SEND_G takes no microbatch"),
        ("2SEND_F>1", "SEND_F needs a microbatch"),
        ("2F0>1", "F takes no peer"),
        ("2SEND_F0", "SEND_F needs its peer as >3"),
        ("2SEND_F0<3", "SEND_F needs its peer as >3"),
        ("2RECV_N>3", "RECV_N needs its peer as <3"),
    ],
)
def test_unreadable_text_says_why(text, why):
    with pytest.raises(ScheduleError, match=why):
        Instruction.parse(text)


def test_the_sets_of_operations_fit_together():
    assert len(SENDS) == len(RECEIVES) == 5
    assert SENDS.isdisjoint(RECEIVES)
    assert set(RECEIVE_OF_READER.values()) == RECEIVES - {Op.RECEIVE_TIED_PARAMETER}
    assert set(RECEIVE_OF_READER) <= COMPUTES
    assert set("FBIWSNU") == COMPUTES
    assert {op.value for op in FREES} == {"FREE_F", "FREE_B", "FREE_K"}
    for send, receive in RECEIVE_OF_SEND.items():
        assert (send in PER_MICROBATCH) == (receive in PER_MICROBATCH)
        assert send.value.removeprefix("SEND_") == receive.value.removeprefix("RECV_")


def test_partner_is_the_other_end_of_a_message():
    send, receive = TEXTS["2SEND_F0>3"], TEXTS["3RECV_F0<2"]
    assert (send.partner, receive.partner) == (receive, send)
    for entry in TEXTS.values():
        assert entry.is_partner_of(send) == (entry == receive)
        assert entry.is_partner_of(receive) == (entry == send)
    kinds = [
        (entry.is_send, entry.is_receive, entry.is_compute, entry.is_free)
        for entry in TEXTS.values()
    ]
    assert all(sum(kind) == 1 for kind in kinds)
    assert TEXTS["2F0"].is_compute
    assert send.is_send
    assert receive.is_receive
