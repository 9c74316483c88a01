"""The example of docs/rules.md runs, and its rule passes the test that it recommends."""

import pathlib
import re

import jax
import numpy as np
import pytest

from launcher.autopar.sharding.rules import registry

DOCS = pathlib.Path(__file__).parents[4] / "docs" / "rules.md"
P = -2


@pytest.fixture
def example(monkeypatch):
    """What the code blocks of the page define; its rule is forgotten afterwards."""
    monkeypatch.setattr(registry, "_CHOICES", dict(registry._CHOICES))
    monkeypatch.setattr(registry, "_LOCAL", dict(registry._LOCAL))
    defined: dict = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL):
        exec(block, defined)
    return defined


def test_the_worked_example_works(example, check, choices):
    def model(x):
        return example["repeat_rows_p"].bind(x, num_rows=16)

    graph = check(model, jax.ShapeDtypeStruct((8, 4), np.float64))
    assert choices(graph.ops[-1]) == {((0,), (0,)), ((1,), (1,)), ((P,), (P,))}


def test_without_its_local_function_the_example_fails(example, check):
    """So that the test above does test it."""
    del registry._LOCAL["repeat_rows"]

    def model(x):
        return example["repeat_rows_p"].bind(x, num_rows=32)

    with pytest.raises(Exception, match=r"Not equal|shape|incompatible"):
        check(model, jax.ShapeDtypeStruct((8, 4), np.float64))
