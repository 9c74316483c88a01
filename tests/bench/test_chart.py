"""Bars: their heights, the marks beside them, and what has no value."""

import xml.etree.ElementTree as ElementTree

import pytest

from launcher.bench.chart import Bars, bar_chart

SVG = "{http://www.w3.org/2000/svg}"
COLOURS = {"one": "forward", "two": "backward"}


def drawn(*groups):
    return ElementTree.fromstring(bar_chart("a title", "seconds", COLOURS, groups, "layers"))


def bars(picture):
    """What the bars tell, and how high they are."""
    return {
        bar.find(f"{SVG}title").text: float(bar.get("height"))
        for bar in picture.iter(f"{SVG}rect")
        if bar.find(f"{SVG}title") is not None
    }


def test_heights_are_as_the_values():
    found = bars(
        drawn(
            Bars(label="8", values={"two": 2.0, "one": 1.0}), Bars(label="16", values={"one": 4.0})
        )
    )
    assert list(found) == ["8, one: 1", "8, two: 2", "16, one: 4"]
    assert found["16, one: 4"] == pytest.approx(4 * found["8, one: 1"], abs=0.3)
    assert found["8, two: 2"] == pytest.approx(2 * found["8, one: 1"], abs=0.3)


def test_the_axis_goes_in_round_steps_to_above_the_highest():
    texts = [
        text.text
        for text in drawn(Bars(label="8", values={"one": 0.7}, marks={"one": 61.6})).iter(
            f"{SVG}text"
        )
    ]
    assert {"a title", "seconds", "layers", "8", "one", "0", "15", "30", "45", "60", "75"} == set(
        texts
    )


@pytest.mark.parametrize(
    ("values", "marks", "crosses"), [(0.0, 1.0, 1), (1.0, 0.0, 1), (0.0, 0.0, 2)]
)
def test_what_has_no_value_is_a_cross(values, marks, crosses):
    def lines(*pair):
        group = Bars(label="8", values={"one": pair[0]}, marks={"one": pair[1]})
        return len(list(drawn(group).iter(f"{SVG}line")))

    # A mark that has a value is a line, a cross is two.
    assert lines(values, marks) - lines(1.0, 1.0) == crosses * 2 - (1 if marks == 0 else 0)
