"""Messages wait for their receivers, receivers for their messages, and nobody for ever."""

import threading

import pytest

from launcher.runtime.steps.mailbox import Mailbox

TICKET = "activation", 3


def test_a_message_is_taken_once():
    box = Mailbox()
    box.post(TICKET, "value")
    assert len(box) == 1
    assert box.take(TICKET) == "value"
    assert len(box) == 0


def test_a_receiver_waits_for_its_message_and_for_no_other():
    box, taken = Mailbox(), []
    receiver = threading.Thread(target=lambda: taken.append(box.take(TICKET)))
    receiver.start()
    box.post(("activation", 2), "another")
    receiver.join(0.05)
    assert receiver.is_alive()
    box.post(TICKET, "value")
    receiver.join(5)
    assert taken == ["value"]


def test_giving_up_wakes_those_who_wait():
    box, errors = Mailbox(), []

    def receive():
        with pytest.raises(KeyError):
            box.take(TICKET)
        errors.append("woken")

    receiver = threading.Thread(target=receive)
    receiver.start()
    box.give_up()
    receiver.join(5)
    assert errors == ["woken"]
