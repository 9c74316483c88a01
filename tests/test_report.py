"""The one line that a run ends in: readable, whatever the message holds."""

import pytest

from launcher.cli.report import one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb \t c", "a b c"),
        ("size=\u202ex\x1b[3m", "size=\\u202ex\\x1b[3m"),
        ("caf\u00e9 \U0001f600", "caf\u00e9 \U0001f600"),
    ],
)
def test_a_message_is_one_printable_line(text, line):
    assert one_line(text) == line


def test_a_long_value_shows_its_begin_and_its_end():
    line = one_line(f"key={'x' * 5000}! is too long: shorten it")
    assert line.startswith("key=xxx")
    assert "xx...(4805 more characters)...xx" in line
    assert line.endswith("x! is too long: shorten it")
    assert len(line) < 300


def test_a_long_message_shows_its_begin_and_its_end():
    line = one_line(f"key: {'word ' * 1000}: cure")
    assert line.startswith("key: word word")
    assert line.endswith("word : cure")
    assert len(line) < 1000
