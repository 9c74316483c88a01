"""Messages wait for their receivers, receivers for their messages, and nobody for ever."""

import threading

import pytest

from launcher.autopar.instructions import Instruction
from launcher.runtime.mailbox import Mailbox

SEND, RECEIVE = Instruction.parse("0SEND_F3>1"), Instruction.parse("1RECV_F3<0")


def test_a_message_is_taken_once():
    box = Mailbox()
    box.post(SEND, "value")
    assert len(box) == 1
    assert box.take(RECEIVE) == "value"
    assert len(box) == 0


def test_a_receiver_waits_for_its_message_and_for_no_other():
    box, taken = Mailbox(), []
    receiver = threading.Thread(target=lambda: taken.append(box.take(RECEIVE)))
    receiver.start()
    box.post(Instruction.parse("0SEND_F2>1"), "another")
    receiver.join(0.05)
    assert receiver.is_alive()
    box.post(SEND, "value")
    receiver.join(5)
    assert taken == ["value"]


def test_giving_up_wakes_those_who_wait():
    box, errors = Mailbox(), []

    def receive():
        with pytest.raises(KeyError):
            box.take(RECEIVE)
        errors.append("woken")

    receiver = threading.Thread(target=receive)
    receiver.start()
    box.give_up()
    receiver.join(5)
    assert errors == ["woken"]
