"""The tables of sizes against the parameter counts of the papers, and the checks of overrides."""

import pytest

from launcher import models
from launcher.config import GptConfig, MoeConfig, WrnConfig
from launcher.errors import ConfigError
from launcher.models.sizes import (
    GPT_SIZES,
    MOE_SIZES,
    WRN_SIZES,
    ExpertsSize,
    capacity,
    default_global_batch,
    gpt_size,
    moe_size,
    wrn_size,
)

BILLION = 1e9


def gpt_count(hidden: int, layers: int, vocabulary: int) -> int:
    """Alpa's own count, without position embeddings."""
    return layers * (12 * hidden**2 + 13 * hidden) + vocabulary * (hidden + 1)


# (size, billions of parameters that the paper's artifact gives)
GPT_COUNTS = [
    ("350m", 0.3547),
    ("760m", 0.7586),
    ("1.3b", 1.3134),
    ("2.6b", 2.6486),
    ("6.7b", 6.6537),
    ("15b", 15.3644),
    ("39b", 39.0785),
]
MOE_COUNTS = [
    ("380m", 0.3835),
    ("690m", 0.6857),
    ("1.3b", 1.3468),
    ("2.4b", 2.3830),
    ("10b", 10.1696),
    ("27b", 26.6481),
    ("70b", 70.4152),
]
WRN_COUNTS = [
    ("250m", 0.2541, 0.01),
    ("500m", 0.4950, 0.01),
    ("1b", 1.0057, 0.01),
    ("2b", 1.9650, 0.01),
    ("4b", 4.0009, 0.01),
    ("6.8b", 6.7277, 0.01),
    ("13b", 13.2671, 0.06),  # the published block counts do not give the published number
]
# Sizes for which no exact count is published: the name is all there is to compare with.
NAMED = [
    (GptConfig(size="125m"), 0.125, 0.01),
    (GptConfig(size="76b"), 76, 0.01),
    (GptConfig(size="145b"), 145, 0.01),
    (GptConfig(size="310b"), 310, 0.01),
    (GptConfig(size="530b"), 530, 0.01),
    (GptConfig(size="1t"), 1000, 0.01),
    (MoeConfig(size="7.1b"), 7.1, 0.01),
    (MoeConfig(size="140b"), 140, 0.01),
]


@pytest.mark.parametrize(("size", "billions"), GPT_COUNTS)
def test_gpt_has_the_papers_parameter_count(size, billions):
    assert models.num_parameters(GptConfig(size=size)) == pytest.approx(
        billions * BILLION, rel=0.01
    )


@pytest.mark.parametrize("size", [size for size in GPT_SIZES if size != "tiny"])
def test_gpt_is_the_formula_plus_positions(size):
    entry = GPT_SIZES[size]
    formula = gpt_count(entry.hidden, entry.layers, entry.vocab_size)
    # The formula counts a bias of the logits, which we leave out, and no positions and no final
    # norm.
    extra = (entry.seq_len + 2) * entry.hidden - entry.vocab_size
    assert models.num_parameters(GptConfig(size=size)) == formula + extra


@pytest.mark.parametrize(("size", "billions"), MOE_COUNTS)
def test_moe_has_the_papers_parameter_count(size, billions):
    assert models.num_parameters(MoeConfig(size=size)) == pytest.approx(
        billions * BILLION, rel=0.01
    )


@pytest.mark.parametrize(("size", "billions", "tolerance"), WRN_COUNTS)
def test_wrn_has_the_papers_parameter_count(size, billions, tolerance):
    count = models.num_parameters(WrnConfig(size=size))
    assert count == pytest.approx(billions * BILLION, rel=tolerance)


@pytest.mark.parametrize(("config", "billions", "tolerance"), NAMED, ids=str)
def test_other_sizes_are_what_their_names_say(config, billions, tolerance):
    assert models.num_parameters(config) == pytest.approx(billions * BILLION, rel=tolerance)


@pytest.mark.parametrize(
    ("sizes", "look_up", "config_type"),
    [
        (GPT_SIZES, gpt_size, GptConfig),
        (MOE_SIZES, moe_size, MoeConfig),
        (WRN_SIZES, wrn_size, WrnConfig),
    ],
    ids=["gpt", "moe", "wrn"],
)
def test_every_size_passes_its_own_checks(sizes, look_up, config_type):
    for size, entry in sizes.items():
        assert look_up(config_type(size=size)) == entry


@pytest.mark.parametrize(
    ("family", "size", "batch"),
    [
        ("gpt", "39b", 1024),
        ("moe", "70b", 1024),
        ("wrn", "4b", 1536),
        ("wrn", "13b", 1520),
        ("gpt", "530b", 2520),
        ("gpt", "1t", 3072),
        ("gpt", "tiny", 32),
        ("wrn", "tiny", 32),
    ],
)
def test_default_global_batch_is_the_papers(family, size, batch):
    assert default_global_batch(family, size) == batch


def test_fields_are_overridden_one_by_one():
    size = gpt_size(GptConfig(size="tiny", hidden=96, heads=3, dropout=0.25, tied_embeddings=False))
    assert (size.hidden, size.heads, size.dropout, size.tied_embeddings) == (96, 3, 0.25, False)
    assert size.layers == GPT_SIZES["tiny"].layers

    size = moe_size(
        MoeConfig(size="tiny", seq_len=32, experts=8, mlp_factor=2, aux_loss_weight=0.5)
    )
    assert (size.transformer.seq_len, size.transformer.mlp_factor) == (32, 2)
    assert (size.experts.experts, size.experts.aux_loss_weight) == (8, 0.5)
    assert size.experts.expert_group_size == MOE_SIZES["tiny"].experts.expert_group_size

    size = wrn_size(WrnConfig(size="tiny", image_size=32, width_factor=4))
    assert (size.image_size, size.width_factor) == (32, 4)


def test_capacity_is_twice_an_even_share():
    assert capacity(ExpertsSize(experts=16, expert_group_size=2048), 2048) == 2 * 2048 // 16


@pytest.mark.parametrize(
    ("look_up", "config", "message"),
    [
        (
            gpt_size,
            GptConfig(size="40b"),
            r"model=gpt has no size '40b' \(model.size=40b\): .*tiny.*39b.*1t",
        ),
        (moe_size, MoeConfig(size="39b"), r"model=moe has no size '39b'.*choose one of tiny, 380m"),
        (wrn_size, WrnConfig(size="50"), r"model=wrn has no size '50'.*choose one of tiny, 250m"),
        (
            gpt_size,
            GptConfig(size="tiny", heads=5),
            r"5 heads do not divide a hidden size of 64 \(model.heads=5\)",
        ),
        (gpt_size, GptConfig(size="tiny", layers=0), r"0 layers \(model.layers=0\): set 1 or more"),
        (gpt_size, GptConfig(size="tiny", dropout=1.0), r"model.dropout=1.0"),
        (gpt_size, GptConfig(size="tiny", dropout=-0.1), r"model.dropout=-0.1"),
        (moe_size, MoeConfig(size="tiny", heads=7), r"7 heads do not divide .*model.heads=7"),
        (moe_size, MoeConfig(size="tiny", experts=1), r"only 1 \(model.experts=1\): set 2 or more"),
        (moe_size, MoeConfig(size="tiny", layers=1), r"only 1 layer \(model.layers=1\)"),
        (moe_size, MoeConfig(size="tiny", expert_group_size=0), r"model.expert_group_size=0"),
        (
            moe_size,
            MoeConfig(size="tiny", experts=256),
            r"256 experts get no token of a group of 64 .*model.capacity_factor=2.0",
        ),
        (
            moe_size,
            MoeConfig(size="tiny", second_expert="never"),
            r"'never' \(model.second_expert=never\): choose always or random",
        ),
        (moe_size, MoeConfig(size="tiny", aux_loss_weight=-1.0), r"model.aux_loss_weight=-1.0"),
        (
            wrn_size,
            WrnConfig(size="tiny", depth=18),
            r"no Wide-ResNet has depth 18 \(model.depth=18\): choose one of 11",
        ),
        (
            wrn_size,
            WrnConfig(size="tiny", image_size=10),
            r"images of 10 x 10 .*by 4 \(model.image_size=10\): choose a multiple of 4",
        ),
        (wrn_size, WrnConfig(size="250m", image_size=100), r"choose a multiple of 32"),
        (wrn_size, WrnConfig(size="tiny", num_classes=0), r"model.num_classes=0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(look_up, config, message):
    with pytest.raises(ConfigError, match=message):
        look_up(config)
