"""The checkpoint benchmark: what it makes of rows, and one real run."""

import pytest

from launcher.bench import checkpoint
from launcher.bench.__main__ import main


def rows(waited_s: float, first_s: float, second_s: float) -> list[dict]:
    """Of four windows of four steps, each after the first with a checkpoint before it."""
    steps = [{"step_s": step_s} for step_s in (first_s, first_s, second_s, second_s)]
    after = [{"checkpoint_s": waited_s, **steps[0]}, *steps[1:]]
    return [*steps, *after, *after, *after]


@pytest.mark.parametrize(
    ("given", "share", "status"),
    [
        ((0.04, 1.0, 0.98), "2.00%", 0),  # 0.04 waited and 0.04 slowed of 4 s
        ((0.2, 1.0, 0.9), "10.00%", 1),
        ((0.0, 0.5, 1.0), "0.00%", 0),  # the others only waited less
    ],
)
def test_the_share_of_the_time_between_two(capsys, monkeypatch, given, share, status):
    asked = []
    monkeypatch.setattr(checkpoint, "_rows", lambda *args: asked.append(args) or rows(*given))
    command = ["checkpoint", "every=4", "checkpoints=2", "overrides=model=moe seed=1"]
    assert main(command) == status
    assert asked == [(4, 16, ["model=moe", "seed=1"])]
    head, *table, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["between", "s", "waited", "s", "slowed", "s", "share"]
    assert len(table) == 2
    assert last.split() == ["median", share, "(bar", "5%)"]


@pytest.mark.parametrize(
    ("setting", "says"),
    [("color=red", "checkpoint has no key 'color'"), ("every=0", "every='0'")],
)
def test_settings_that_are_refused(capsys, setting, says):
    assert main(["checkpoint", setting]) == 2
    assert says in capsys.readouterr().err


def test_a_run_that_fails(capsys):
    assert main(["checkpoint", "every=1", "checkpoints=1", "overrides=model=none"]) == 5
    assert "the run that was to be measured failed: launcher: " in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_command_is_measured(capsys):
    given = "overrides=parallel=single model.layers=1"
    assert main(["checkpoint", "every=2", "checkpoints=1", given]) in (0, 1)
    assert len(capsys.readouterr().out.splitlines()) == 3
