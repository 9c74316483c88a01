"""Building models from configs, and the rule that chooses a size for a cluster."""

import pytest

from launcher import models
from launcher.config import CustomConfig, GptConfig, ModelConfig, MoeConfig, WrnConfig
from launcher.errors import ConfigError

V100_BYTES = 16e9
GIB = 2**30


def resolve(config, num_devices, memory_bytes=V100_BYTES, has_accelerator=True):
    return models.resolve(
        config,
        memory_bytes=num_devices * memory_bytes,
        has_accelerator=has_accelerator,
        dtype="fp16",
    )


@pytest.mark.parametrize(
    ("num_devices", "size"), [(64, "39b"), (8, "2.6b"), (1, "350m"), (3072, "76b")]
)
@pytest.mark.parametrize("memory_bytes", [V100_BYTES, 16 * GIB])
def test_auto_chooses_the_papers_sizes_for_v100s(num_devices, size, memory_bytes):
    assert resolve(GptConfig(), num_devices, memory_bytes).size == size


def test_auto_follows_the_rule_for_every_family():
    for config in (MoeConfig(), WrnConfig()):
        chosen = resolve(config, 64)
        assert models.num_parameters(chosen) * 16 <= 0.65 * 64 * V100_BYTES
    assert resolve(MoeConfig(), 64).size == "27b"
    assert resolve(WrnConfig(), 64).size == "13b"


def test_auto_counts_overrides():
    assert resolve(GptConfig(layers=96), 64).size == "15b"


def test_auto_is_tiny_without_accelerators_and_where_nothing_fits():
    assert resolve(GptConfig(), 64, has_accelerator=False).size == "tiny"
    assert resolve(GptConfig(), 1, memory_bytes=1e9).size == "tiny"


def test_resolve_keeps_a_chosen_size_and_sets_the_dtype():
    config = GptConfig(size="1t", seq_len=4096)
    resolved = resolve(config, 1)
    assert (resolved.size, resolved.dtype, resolved.seq_len) == ("1t", "fp16", 4096)
    assert (config.size, config.dtype) == ("1t", "auto")


def test_resolve_leaves_a_custom_model_to_its_arguments():
    config = CustomConfig(target="a.b:c", args={"hidden": 3})
    assert resolve(config, 1) == CustomConfig(
        target="a.b:c", args={"hidden": 3}, size="custom", dtype="fp16"
    )


def test_resolve_checks_sizes():
    with pytest.raises(ConfigError, match=r"7 heads do not divide"):
        resolve(GptConfig(size="tiny", heads=7), 1)
    with pytest.raises(ConfigError, match=r"no size '39b'"):
        resolve(MoeConfig(size="39b"), 1)
    with pytest.raises(ConfigError, match=r"model.depth=3"):
        resolve(WrnConfig(size="tiny", depth=3), 1)


def test_build_describes_the_model():
    gpt = models.build(GptConfig(size="39b", dtype="bf16"))
    assert (gpt.name, gpt.size, gpt.dtype) == ("gpt", "39b", "bf16")
    assert (gpt.sample_unit, gpt.units_per_sample, gpt.vocab_size) == ("tokens", 1024, 51200)
    assert gpt.default_global_batch == 1024

    moe = models.build(MoeConfig(size="tiny", dtype="fp32"))
    assert (moe.sample_unit, moe.units_per_sample, moe.vocab_size) == ("tokens", 64, 256)

    wrn = models.build(WrnConfig(size="13b", dtype="fp32"))
    assert (wrn.sample_unit, wrn.units_per_sample, wrn.vocab_size) == ("samples", 1, 1024)
    assert wrn.default_global_batch == 1520


def test_fingerprint_follows_sizes_and_not_the_dtype():
    def fingerprint(**fields):
        return models.build(GptConfig(**({"size": "tiny", "dtype": "fp32"} | fields))).fingerprint

    assert fingerprint() == fingerprint(dtype="bf16") == fingerprint(hidden=64)
    others = {fingerprint(hidden=32), fingerprint(size="125m"), fingerprint(tied_embeddings=False)}
    assert len(others | {fingerprint()}) == 4


def test_build_needs_a_decided_dtype():
    with pytest.raises(ConfigError, match=r"'auto' \(model.dtype=auto\): choose one of fp32, bf16"):
        models.build(GptConfig(size="tiny"))


def test_fp64_needs_x64():
    with pytest.raises(AssertionError, match="fp64 needs jax_enable_x64"):
        models.build(GptConfig(size="tiny", dtype="fp64"))


def test_a_family_that_is_not_there_is_a_bug():
    with pytest.raises(AssertionError, match="no family is built from ModelConfig"):
        models.build(ModelConfig(name="mlp", size="tiny", dtype="fp32"))
    with pytest.raises(AssertionError, match="no family has the sizes of ModelConfig"):
        models.resolve(
            ModelConfig(name="mlp", size="tiny"), memory_bytes=1, has_accelerator=True, dtype="fp32"
        )
