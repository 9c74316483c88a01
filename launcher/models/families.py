"""From a config to a model: which family, at which size, in which precision."""

import bisect
import dataclasses
from functools import partial
from typing import Any

import jax

from launcher.config import CustomConfig, GptConfig, ModelConfig, MoeConfig, WrnConfig
from launcher.errors import ConfigError
from launcher.models.custom import build_custom
from launcher.models.gpt import Gpt
from launcher.models.kernels import AUTO, Kernels, choose_attention, kernels_of
from launcher.models.layers import PRECISIONS, Precision
from launcher.models.model import Model, fingerprint, make_model
from launcher.models.moe import Moe
from launcher.models.sizes import (
    PAPER_SIZES,
    MoeSize,
    TransformerSize,
    WrnSize,
    default_global_batch,
    gpt_size,
    moe_size,
    wrn_size,
)
from launcher.models.wide_resnet import WideResNet

# Mixed precision with Adam: weights and gradients in 2 bytes each, master weights and two moments
# in 4.
STATE_BYTES_PER_PARAMETER = 16
STATE_FRACTION_OF_MEMORY = 0.65


def build(config: ModelConfig) -> Model:
    """Build a model, from shapes alone; size and dtype of the config must be decided."""
    match config:
        case GptConfig():
            size = gpt_size(config)
            return _build_decoder(config, Gpt, size, trunk=size)
        case MoeConfig():
            size = moe_size(config)
            return _build_decoder(config, Moe, size, trunk=size.transformer)
        case WrnConfig():
            return _build_wide_resnet(config)
        case CustomConfig():
            return build_custom(config, _precision(config))
        case _:
            raise AssertionError(f"no family is built from {type(config).__name__}")


def num_parameters(config: ModelConfig) -> int:
    """Count the weights of a model, from shapes alone; the size of the config must be decided."""
    return build(dataclasses.replace(config, dtype="fp32")).num_parameters


def resolve(
    config: ModelConfig,
    *,
    memory_bytes: float,
    has_accelerator: bool,
    dtype: str,
    without_cudnn: str | None = None,
    prefer_plain: bool = True,
) -> ModelConfig:
    """Decide what a config leaves open, and check its sizes.

    `size=auto` is the largest of the paper's table whose training state takes at most 65 % of the
    cluster's memory, and `tiny` where there is no accelerator or not even the smallest fits.

    Args:
        without_cudnn: The kind of the cluster's devices, if cuDNN's attention does not run on them.
        prefer_plain: Whether `attention=auto` is plain where it could be cuDNN's.
    """
    config = dataclasses.replace(config, dtype=dtype)
    if isinstance(config, CustomConfig):
        return dataclasses.replace(config, size="custom")
    if config.size == AUTO:
        size = _largest_that_fits(config, memory_bytes) if has_accelerator else "tiny"
        config = dataclasses.replace(config, size=size)
    check_size(config)
    if isinstance(config, GptConfig | MoeConfig):
        trunk = gpt_size(config) if isinstance(config, GptConfig) else moe_size(config).transformer
        attention = choose_attention(
            config.attention,
            trunk,
            dtype=dtype,
            without_cudnn=without_cudnn,
            prefer_plain=prefer_plain,
        )
        config = dataclasses.replace(config, attention=attention)
    return config


def check_size(config: ModelConfig) -> None:
    """Raise a ConfigError unless the config names a size of its family with overrides that fit."""
    match config:
        case GptConfig():
            gpt_size(config)
        case MoeConfig():
            moe_size(config)
        case WrnConfig():
            wrn_size(config)
        case CustomConfig():
            pass  # its sizes are arguments of the user's own function
        case _:
            raise AssertionError(f"no family has the sizes of {type(config).__name__}")


def _build_decoder(
    config: GptConfig | MoeConfig,
    module_type: type[Gpt] | type[Moe],
    size: TransformerSize | MoeSize,
    *,
    trunk: TransformerSize,
) -> Model:
    precision, kernels = _precision(config), kernels_of(config, trunk)
    return make_model(
        partial(module_type, size, kernels, precision),
        precision=precision,
        kernels=kernels,
        sample_unit="tokens",
        units_per_sample=trunk.seq_len,
        vocab_size=trunk.vocab_size,
        **_identity(config, size),
    )


def _build_wide_resnet(config: WrnConfig) -> Model:
    precision = _precision(config)
    size = wrn_size(config)
    return make_model(
        partial(WideResNet, size, precision),
        precision=precision,
        sample_unit="samples",
        units_per_sample=1,
        vocab_size=size.num_classes,
        **_identity(config, size),
    )


def _identity(config: ModelConfig, size: TransformerSize | MoeSize | WrnSize) -> dict[str, Any]:
    return {
        "name": config.name,
        "size": config.size,
        "dtype": config.dtype,
        "default_global_batch": default_global_batch(config.name, config.size),
        "fingerprint": fingerprint(config.name, dataclasses.asdict(size)),
        "overrides": _overrides(config),
    }


def _overrides(config: ModelConfig) -> dict[str, Any]:
    """The fields of its family that a config sets, but for those that change nothing of the model."""
    left_out = {
        field.name for types in (ModelConfig, Kernels) for field in dataclasses.fields(types)
    }
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in left_out and value != defaults[name]
    }


def _precision(config: ModelConfig) -> Precision:
    # Arrays would silently become fp32.
    assert config.dtype != "fp64" or jax.config.jax_enable_x64, "fp64 needs jax_enable_x64"
    if config.dtype not in PRECISIONS:
        raise ConfigError(
            f"no model computes in {config.dtype!r} (model.dtype={config.dtype}): "
            f"choose one of {', '.join(PRECISIONS)}, or auto"
        )
    return PRECISIONS[config.dtype]


def _largest_that_fits(config: ModelConfig, memory_bytes: float) -> str:
    most = STATE_FRACTION_OF_MEMORY * memory_bytes / STATE_BYTES_PER_PARAMETER
    sizes = PAPER_SIZES[config.name]  # ascending
    num_fitting = bisect.bisect_right(
        sizes, most, key=lambda size: num_parameters(dataclasses.replace(config, size=size))
    )
    return sizes[num_fitting - 1] if num_fitting else "tiny"
