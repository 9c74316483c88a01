"""The overhead benchmark's command line, and that a step is dispatched without waiting for a device."""

import pytest

from launcher.bench import waiting
from launcher.bench.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["overhead", "part=one"], "overhead has no key 'part': it has parts, steps"),
        (["overhead", "parts=two"], "parts='two': choose from one, data, waiting, host"),
        (
            ["overhead", "steps=0"],
            "steps='0' is no positive whole number: write for example steps=15",
        ),
    ],
)
def test_what_the_command_line_does_not_take(arguments, message, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(message)


def test_a_step_is_dispatched_long_before_it_is_done():
    pipeline = waiting.WaitingPipeline("1f1b", 1)
    # 8 microbatches of 60 ms and 3 of them to fill and drain; a step that waited would take as long.
    assert pipeline.timeline_s == pytest.approx(11 * 0.06)
    dispatched_s = min(pipeline.dispatch_s() for _ in range(3))
    assert dispatched_s < 0.5 * pipeline.timeline_s
    assert pipeline.step_s() >= 0.99 * pipeline.timeline_s
