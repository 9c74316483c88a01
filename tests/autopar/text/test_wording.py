"""Numbers as people read them."""

import pytest

from launcher.autopar.text import wording


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"), (8.5e-5, "85 us"), (0.00099996, "1 ms"), (0.0123, "12.3 ms"), (0.9996, "1 s"),
        (3.214, "3.21 s"), (142.4, "142 s"), (12345.0, "12345 s"),
    ],
)  # fmt: skip
def test_seconds(value, text):
    assert wording.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (13.2 * 2**30, "13.2 GiB"), (2**42, "4 TiB")],
)
def test_size(value, text):
    assert wording.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(12, "12"), (221_000, "221 thousand"), (39_078_502_400, "39.1 billion"), (1e12, "1 trillion")],
)
def test_large(value, text):
    assert wording.large(value) == text


@pytest.mark.parametrize(
    ("indices", "text"), [((), ""), ((3,), "3"), ((0, 1, 2, 3), "0-3"), ((7, 0, 2, 1), "0-2,7")]
)
def test_ranges(indices, text):
    assert wording.ranges(indices) == text


def test_the_rest():
    assert (wording.count(1, "host"), wording.count(2, "host")) == ("1 host", "2 hosts")
    assert wording.count(8, "microbatch") == "8 microbatches"
    assert wording.count(2, "submesh") == "2 submeshes"
    assert (wording.count(1, "entry"), wording.count(0, "entry")) == ("1 entry", "0 entries")
    assert wording.either(["1"]) == "1"
    assert wording.either(["1", "2", "4"]) == "1, 2 or 4"
    assert wording.percent(0.1584) == "15.8 %"
    assert wording.shortened("blocks/*/mlp/up", 15) == "blocks/*/mlp/up"
    assert wording.shortened("blocks/*/mlp/up/kernel", 15) == "blocks.._kernel".replace("_", "/")


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ({0, 1, 2, 7}, "0-2,7"), ({0, 15, *range(31, 48)}, "0,15,.."), (range(100, 4000), "100-3999"),
        ({0, *range(1000, 2000, 2)}, "0,1000,.."), ({100_000_000, 200_000_000}, "100000000,.."),
    ],
)  # fmt: skip
def test_some_ranges(indices, text):
    assert wording.some_ranges(indices, 9) == text
