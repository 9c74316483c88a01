"""What the keeper of Ray decides by itself; what it does with Ray is in `test_ray_pool.py`."""

import pytest

from launcher.runtime.hosts.ray_keeper import FAILED, _attempt, neighbours, reason

SMALL, LARGE = {"CPU": 1.0, "GPU": 4.0}, {"CPU": 1.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("bundles", "addresses", "order"),
    [
        ([SMALL] * 3, ["10.0.0.10", "10.0.0.9", "10.0.0.1"], [2, 1, 0]),
        ([SMALL] * 3, ["10.0.0.1"] * 3, [0, 1, 2]),
        (
            [SMALL, SMALL, LARGE, LARGE],
            ["10.0.0.4", "10.0.0.3", "10.0.0.2", "10.0.0.1"],
            [1, 0, 3, 2],
        ),
        ([SMALL] * 2, ["fe80::b", "fe80::a"], [1, 0]),
        ([], [], []),
    ],
)
def test_hosts_in_a_row_are_machines_in_a_row(bundles, addresses, order):
    assert neighbours(bundles, addresses) == order


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "The actor died unexpectedly before finishing this task.\n\tclass_name: Held\nThe actor is "
            "dead because its worker process has died. Worker exit type: SYSTEM_ERROR",
            "its process ended",
        ),
        (
            "The actor is dead because its node has died. Node Id: 1f",
            "its machine left the Ray cluster",
        ),
        (
            "Task was killed due to the node running low on memory.\nMemory on the node",
            "Ray ended its process, because its machine ran low on memory",
        ),
        (
            "The actor died because of an error raised in its creation task, ray::Held.__init__()\n"
            "  File x\nOSError: [Errno 28] No space left on device",
            "its process did not start: OSError: [Errno 28] No space left on device",
        ),
    ],
)
def test_what_ray_says_of_a_dead_actor_in_few_words(text, says):
    assert reason(text) == says


def test_what_fails_is_told_with_the_words_of_its_innermost_cause():
    def fails():
        cause = RuntimeError("Last error: Traceback:\n  File\nAuthenticationError: no token\n")
        raise ConnectionError("cannot connect to a:1\nmore") from cause

    def fails_alone():
        raise ValueError("bad")

    assert _attempt(fails, []) == (
        FAILED, "ConnectionError: cannot connect to a:1; AuthenticationError: no token",
    )  # fmt: skip
    assert _attempt(fails_alone, []) == (FAILED, "ValueError: bad")
