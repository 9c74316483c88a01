"""All hosts stop after the same step, whatever each is at when it is asked."""

import threading

import pytest

from launcher.runtime.hosts.agreement import Agreement


def drive(agreement: Agreement, first: int, steps: int, done: list) -> None:
    """As the training loop asks."""
    for step in range(first, steps):
        done.append(step + 1)
        if agreement.stops_after(step + 1):
            return


def test_without_a_request_all_steps_are_done():
    agreement, done = Agreement(2, 5), []
    drive(agreement, 2, 5, done)
    assert done == [3, 4, 5]
    assert (agreement.requested, agreement.status) == (False, "done")


def test_a_host_that_is_held_begins_no_further_step():
    agreement, done = Agreement(0, 1000), []
    assert agreement.hold() == 1
    loop = threading.Thread(target=drive, args=(agreement, 0, 1000, done))
    loop.start()
    loop.join(0.05)
    assert loop.is_alive()
    assert done == [1]
    assert agreement.hold() == 1
    agreement.stop_after(3)
    loop.join(10)
    assert done == [1, 2, 3]
    assert (agreement.requested, agreement.status, agreement.cuts_short) == (True, "stopped", False)


@pytest.mark.parametrize("attempt", range(20))
def test_hosts_that_run_freely_stop_together(attempt):
    hosts, done = [Agreement(0, 10**6) for _ in range(3)], [[] for _ in range(3)]
    loops = [
        threading.Thread(target=drive, args=(host, 0, 10**6, own))
        for host, own in zip(hosts, done, strict=True)
    ]
    for loop in loops:
        loop.start()
    last = max(host.hold() for host in hosts)
    for host in hosts:
        host.stop_after(last)
    for loop in loops:
        loop.join(30)
    assert [own[-1] for own in done] == [last] * 3


def test_the_last_step_waits_for_nobody():
    agreement, done = Agreement(0, 1), []
    assert agreement.hold() == 1
    drive(agreement, 0, 1, done)
    assert (done, agreement.requested) == ([1], False)
    agreement.stop_after(1)
    assert agreement.hold() == 1
