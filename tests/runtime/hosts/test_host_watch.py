"""Who is taken for lost: with a clock that the test sets, no host at all, and nobody waiting."""

import pytest

from launcher.runtime.hosts.host_contract import HostBeat
from launcher.runtime.hosts.host_watch import HostWatch


class Scene:
    """A watch over two hosts, and the seconds of its clock."""

    def __init__(self, *, heartbeat_s: float = 1.0, trains: bool = True) -> None:
        self.now_s = 100.0
        self.watch = HostWatch(2, heartbeat_s, lambda: self.now_s, trains=trains)
        self.said = [{"phase": "training"}, {"phase": "training"}]

    def passes(self, seconds: float, *, silent: tuple[int, ...] = (), unfinished=(0, 1)):
        """So much time, with a beat of every host four times a second, until somebody is suspected."""
        for _ in range(round(4 * seconds)):
            self.now_s += 0.25
            for host in {0, 1} - set(silent):
                self.watch.heard(HostBeat(host=host, **self.said[host]))
            found = self.watch.suspicion(unfinished)
            if found is not None:
                return found
        return None

    def says(self, host: int, **what) -> None:
        self.said[host] |= what

    def trains(self, steps: int, step_s: float) -> None:
        """So many steps of both hosts, on top of those done."""
        done = self.said[0].get("steps_done", 0)
        for step in range(done, done + steps):
            for host in (0, 1):
                self.says(host, steps_begun=step + 1, doing=f"{host}F0", steps_done=step)
            assert self.passes(step_s) is None
            for host in (0, 1):
                self.says(host, steps_done=step + 1)
        assert self.passes(0.25) is None


def test_silence():
    scene = Scene()
    scene.trains(3, 0.5)
    began_s = scene.now_s
    found = scene.passes(30, silent=(1,))
    assert found.host == 1
    assert "no sign of life for 10 s (the limit is 10 s, from runtime.heartbeat_s=1)" in found.why
    assert 10 < scene.now_s - began_s < 11


def test_silence_is_longer_while_hosts_prepare():
    scene = Scene(trains=False)
    assert scene.passes(55, silent=(1,)) is None
    assert scene.passes(10, silent=(1,)).host == 1


def test_a_step_that_hangs_is_noticed_within_15_s():
    scene = Scene()
    scene.trains(5, 0.5)
    scene.says(0, steps_begun=6, doing="0F0", waiting_for="0B0 from stage 1 of host 1")
    scene.says(1, steps_begun=6, doing="1F0")
    began_s = scene.now_s
    found = scene.passes(60)
    assert found.host == 1
    assert "it answers, and has not moved for 10 s (the limit is 10 s, from" in found.why
    assert scene.now_s - began_s < 15


def test_of_hosts_that_wait_for_each_other_the_one_behind_is_named():
    scene = Scene()
    scene.trains(5, 0.5)
    scene.says(0, steps_begun=6, steps_done=5, waiting_for="1F0 of host 1")
    scene.says(1, steps_begun=5, steps_done=4, waiting_for="0B0 of host 0")
    assert scene.passes(60).host == 1


def test_a_host_that_has_fallen_silent_is_named_before_those_that_wait_for_it():
    scene = Scene()
    scene.trains(5, 0.5)
    scene.says(0, steps_begun=6, waiting_for="1F0 of host 1")
    scene.says(1, steps_begun=6, waiting_for="0B0 of host 0")
    assert scene.passes(5) is None
    assert scene.passes(60, silent=(1,)).host == 1


def test_long_steps_hang_for_no_one():
    """Each takes longer than the ten heartbeats, and the first much longer than the others."""
    scene = Scene()
    scene.says(0, steps_begun=1, doing="0F0")
    scene.says(1, steps_begun=1, doing="1F0")
    assert scene.passes(300) is None
    scene.trains(6, 40.0)
    assert scene.passes(350) is None
    assert scene.passes(1200).why.endswith("steps of 40 s)")


def test_one_long_rest_allows_for_the_next():
    scene = Scene()
    scene.trains(50, 0.25)
    assert scene.passes(9) is None
    scene.trains(5, 0.25)
    assert scene.passes(25) is None
    assert scene.passes(5) is not None


@pytest.mark.parametrize("doing", ["evaluating", "saving"])
def test_what_steps_say_nothing_of_has_ten_minutes(doing):
    scene = Scene()
    scene.trains(20, 0.25)
    scene.says(1, doing=doing)
    assert scene.passes(590) is None
    assert scene.passes(30) is not None


def test_who_is_done_is_not_watched():
    scene = Scene()
    scene.trains(5, 0.25)
    assert scene.passes(8, silent=(1,), unfinished=(0,)) is None
    assert scene.passes(60, silent=(1,), unfinished=()) is None


def test_a_supervisor_that_did_not_run_suspects_nobody():
    scene = Scene()
    scene.trains(5, 0.25)
    scene.now_s += 3600
    assert scene.watch.suspicion((0, 1)) is None
    assert scene.passes(5) is None


def test_compiling_may_take_half_an_hour():
    scene = Scene(trains=False)
    assert scene.passes(1790) is None
    found = scene.passes(60)
    assert "it answers, and has not moved for 1800 s (the limit is 1800 s)" in found.why
