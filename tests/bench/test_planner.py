"""The planner benchmark: commands timed from outside, their bars, and the pictures over a number."""

from dataclasses import replace

import pytest

from launcher.bench import planner, planner_commands
from launcher.bench.__main__ import main
from launcher.bench.planner_commands import COMMANDS, SERIES, Command, report_series, time_command
from launcher.errors import LauncherError

WORDS = ("model=gpt", "model.size=tiny", "model.layers=2", "cluster=1xp3")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("case=gpt", "planner has no key 'case': it has cases, layers, hosts, out"),
        ("cases=gpt-40b", "cases='gpt-40b': choose from layer, gpt, thousand, gpt-39b"),
        ("hosts=1,0", "hosts='0' is no positive whole number: write for example hosts=1"),
        ("layers=few", "layers='few' is no positive whole number: write for example layers=8"),
    ],
)
def test_a_wrong_setting_is_status_2_in_one_line(setting, says, capsys):
    assert main(["planner", setting]) == 2
    assert capsys.readouterr().err.startswith(says)


def test_the_commands_are_a_users_and_have_the_bars_of_the_readme():
    assert COMMANDS["gpt-39b"].words == ("model=gpt", "model.size=39b", "cluster=8xp3")
    assert {name: command.bar_s for name, command in COMMANDS.items()} == {
        "gpt-39b": 30.0, "moe-70b": 60.0, "wrn-13b": 60.0, "gpt-1t": 120.0,
    }  # fmt: skip


def test_a_command_that_fails_is_said_with_its_last_line():
    with pytest.raises(
        LauncherError, match=r"cluster=nowhere .*ended with status 2, not 0: .*nowhere"
    ):
        time_command(("cluster=nowhere",))


@pytest.mark.slow
def test_a_command_is_timed_and_held_to_its_bar(monkeypatch, capsys):
    commands = {"late": Command("late", WORDS, 0.1), "early": Command("early", WORDS, 500.0)}
    monkeypatch.setattr(planner, "COMMANDS", commands)
    assert main(["planner", "cases=early"]) == 0
    shown = capsys.readouterr().out
    assert f"python -m launcher {' '.join(WORDS)}: plan.json after" in shown
    assert "(bar 500 s)" in shown
    assert main(["planner", "cases=late"]) == 1


@pytest.mark.slow
def test_a_series_is_a_picture_over_a_number(monkeypatch, tmp_path, capsys):
    small = replace(SERIES["layers"], words=WORDS[:2] + WORDS[3:])
    monkeypatch.setattr(planner, "SERIES", {**SERIES, "layers": small})
    assert main(["planner", "cases=layers", "layers=1,2", f"out={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert ", 2 layers: plan.json after" in shown
    assert "2, wall: " in (tmp_path / "images" / "planner-layers.svg").read_text()


def test_a_series_counts_what_its_number_stands_for(monkeypatch):
    asked = []

    def timed(words):
        asked.append(words[-1])
        return planner_commands.Timed(None, 2.0, 3.0)

    monkeypatch.setattr(planner_commands, "time_command", timed)
    picture = report_series(SERIES["hosts"], [1, 4])
    assert asked == ["cluster.hosts=1", "cluster.hosts=4"]
    assert "32, CPU: 3" in picture
