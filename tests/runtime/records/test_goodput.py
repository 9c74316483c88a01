"""The account of a run's time: over starts, stops, and steps that were made again."""

import json

import pytest

from launcher.runtime.records.goodput import GOODPUT_NAME, KINDS, Goodput


class Clock:
    def __init__(self, now_s=1000.0):
        self.now_s = now_s

    def __call__(self):
        return self.now_s


def test_all_time_is_told(tmp_path):
    clock = Clock()
    account = Goodput(tmp_path, clock=clock)
    clock.now_s += 10
    account.ready(compile_s=4)
    for kind, seconds in (("step_s", 30), ("data_s", 2), ("evaluation_s", 3), ("checkpoint_s", 1)):
        clock.now_s += seconds
        account.add(kind, seconds)
    clock.now_s += 4  # nobody says what for
    told = account.report()
    assert told == pytest.approx(
        {
            "goodput": 0.6, "goodput_step_s": 30, "goodput_start_s": 6, "goodput_compile_s": 4,
            "goodput_restart_s": 0, "goodput_data_s": 2, "goodput_evaluation_s": 3,
            "goodput_checkpoint_s": 1, "goodput_lost_s": 0, "goodput_other_s": 4,
        }
    )  # fmt: skip
    assert sum(told.values()) - told["goodput"] == pytest.approx(clock.now_s - 1000)


def test_a_run_that_was_killed_goes_on_with_its_account(tmp_path):
    clock = Clock()
    first = Goodput(tmp_path, clock=clock)
    clock.now_s += 5
    first.ready(compile_s=1)
    clock.now_s += 20
    first.add("step_s", 20)
    clock.now_s += 100  # nobody is there
    second = Goodput(tmp_path, clock=clock)
    assert second.restarted
    second.went_back(kept_step_s=15)
    clock.now_s += 10
    second.ready(compile_s=4)
    clock.now_s += 5
    second.add("step_s", 5)
    told = second.report()
    assert told["goodput_step_s"] == pytest.approx(20)
    assert told["goodput_lost_s"] == pytest.approx(5)
    assert told["goodput_restart_s"] == pytest.approx(106)
    assert told["goodput_compile_s"] == pytest.approx(5)
    assert told["goodput"] == pytest.approx(20 / 140)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"began_s": NaN}', "\0", json.dumps(dict.fromkeys(KINDS, "x"))]
)
def test_an_account_that_cannot_be_read_is_begun_anew(tmp_path, text):
    (tmp_path / GOODPUT_NAME).write_text(text)
    account = Goodput(tmp_path)
    assert not account.restarted
    assert account.report()["goodput_step_s"] == 0


def test_a_clock_that_is_set_back_takes_nothing_away(tmp_path):
    clock = Clock()
    account = Goodput(tmp_path, clock=clock)
    account.add("step_s", 10)
    clock.now_s -= 500
    account.add("data_s", -500)
    told = account.report()
    assert told["goodput"] == 1.0
    assert told["goodput_other_s"] == 0


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    account = Goodput(tmp_path / "missing")
    account.add("step_s", 1)
    assert account.step_s == 1
