"""Whose weights they are: in keys that can be given, whatever the model at hand sets besides."""

import pytest

from launcher import models
from launcher.config import GptConfig, MoeConfig, WrnConfig
from launcher.models.origin import Origin, origin_of, overrides_of, overrides_text


def build(config):
    return models.build(config)


def gpt(**fields):
    return build(GptConfig(size="tiny", dtype="fp32", **fields))


def test_a_model_in_keys():
    assert str(origin_of(gpt(layers=2))) == "model=gpt model.size=tiny model.layers=2"


@pytest.mark.parametrize(
    ("there", "here", "keys"),
    [
        ({}, {"hidden": 96}, "model=gpt model.size=tiny model.hidden=64"),
        ({"layers": 2}, {}, "model=gpt model.size=tiny model.layers=2"),
        ({"layers": 2}, {"layers": 3}, "model=gpt model.size=tiny model.layers=2"),
        ({}, {"heads": 4}, "model=gpt model.size=tiny"),  # which is the table's
        (
            {"layers": 2},
            {"tied_embeddings": False},
            "model=gpt model.size=tiny model.layers=2 model.tied_embeddings=True",
        ),
    ],
)
def test_the_fields_that_differ_are_told(there, here, keys):
    assert origin_of(gpt(**there)).keys_instead_of(gpt(**here)) == keys


def test_fields_of_experts_and_images_are_known():
    moe = build(MoeConfig(size="tiny", dtype="fp32", experts=8))
    there = Origin(name="moe", size="tiny", overrides={})
    assert there.keys_instead_of(moe) == "model=moe model.size=tiny model.experts=4"
    wrn = build(WrnConfig(size="tiny", dtype="fp32", num_classes=20))
    there = Origin(name="wrn", size="tiny", overrides={})
    assert there.keys_instead_of(wrn) == "model=wrn model.size=tiny model.num_classes=10"
    # Of another family: its own fields mean nothing.
    assert there.keys_instead_of(gpt(hidden=96)) == "model=wrn model.size=tiny"


def test_what_no_table_has_is_to_be_left_out():
    there = Origin(name="gpt", size="of another launcher", dtype="fp64", overrides={})
    assert there.keys_instead_of(gpt(hidden=96, layers=2)) == (
        "model=gpt model.size=of another launcher model.dtype=fp64, "
        "without model.hidden and model.layers"
    )


def test_overrides_survive_as_text():
    text = overrides_text(gpt(layers=2, dropout=0.5))
    assert overrides_of(text) == {"layers": "2", "dropout": "0.5"}
    assert overrides_of("") == {}
    assert overrides_of("model.args.name=two words model.args.x=a=b") == {
        "args.name": "two words",
        "args.x": "a=b",
    }
