"""Events of hosts wait until every host has done the step that they are of."""

from launcher.runtime.hosts.host_contract import HostBeat, HostEvent
from launcher.runtime.hosts.host_events import HostEvents


def row(step: int) -> HostEvent:
    return HostEvent(kind="row", step=step, row={"step": step})


def beat(host: int, done: int, *events: HostEvent) -> HostBeat:
    return HostBeat(host=host, phase="training", steps_done=done, events=events)


def steps(events) -> list[int]:
    return [event.step for event in events]


def test_a_row_counts_when_the_last_host_has_done_its_step():
    events = HostEvents(3, first_step=0)
    assert steps(events.heard(beat(0, 2, row(1), row(2)))) == []
    assert steps(events.heard(beat(1, 1))) == []
    assert steps(events.heard(beat(2, 4))) == [1]
    assert steps(events.heard(beat(1, 2))) == [2]
    assert events.steps_done == 2


def test_events_of_a_host_keep_their_order():
    events = HostEvents(2, first_step=10)
    told = HostEvent(kind="log", step=10, text="evaluating")
    assert steps(events.heard(beat(0, 12, row(11), told, row(12)))) == []
    found = list(events.heard(beat(1, 11)))
    assert [event.kind for event in found] == ["row", "log"]


def test_going_back_waits_for_nobody_but_what_stands_before_it():
    events = HostEvents(2, first_step=0)
    back = HostEvent(kind="rewind", step=4)
    assert steps(events.heard(beat(0, 4, row(5), back, row(5)))) == []
    assert steps(events.heard(beat(1, 5))) == []
    assert steps(events.heard(beat(0, 5))) == [5, 4, 5]


def test_what_is_left_over():
    events = HostEvents(2, first_step=0)
    list(events.heard(beat(0, 2, row(1), row(2))))
    assert steps(events.left_over()) == [1, 2]
    assert events.left_over() == ()
