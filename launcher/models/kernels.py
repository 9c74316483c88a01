"""How a decoder computes: by which kernel its attention, in how many pieces its loss.

None of it changes what is computed, so a model's fingerprint does not hold it.
"""

from dataclasses import dataclass

from launcher.config import GptConfig, MoeConfig
from launcher.errors import ConfigError
from launcher.models.sizes import TransformerSize

AUTO, PLAIN, CUDNN = "auto", "plain", "cudnn"

# What cuDNN's kernel computes on every GPU that has it (jax 0.10.2, check_is_flash_attention).
_DTYPES = ("bf16", "fp16")
_HEAD_MULTIPLE, _LARGEST_HEAD = 8, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """How attention and loss are computed.

    Attributes:
        attention: "plain" operators, or "cudnn".
        loss_chunks: Pieces of the sequence whose logits are there one after the other.
    """

    attention: str = PLAIN
    loss_chunks: int = 1


def kernels_of(config: GptConfig | MoeConfig, size: TransformerSize) -> Kernels:
    """Return what a config asks for, checked; what is still open is plain, and in one piece."""
    chunks = 1 if config.loss_chunks is None else config.loss_chunks
    if size.seq_len % chunks:
        raise ConfigError(
            f"a sequence of {size.seq_len} tokens cannot be cut into {chunks} equal chunks "
            f"(model.loss_chunks={chunks}): choose a divisor of model.seq_len={size.seq_len}"
        )
    attention = PLAIN if config.attention == AUTO else config.attention
    return Kernels(attention=attention, loss_chunks=chunks)


def choose_attention(
    asked: str, size: TransformerSize, *, dtype: str, without_cudnn: str | None, prefer_plain: bool
) -> str:
    """Decide `model.attention`.

    Args:
        without_cudnn: The kind of the cluster's devices, if cuDNN's kernel does not run on them.
        prefer_plain: What `auto` takes where it could be either.

    Raises:
        ConfigError: it is asked for where it cannot be.
    """
    obstacle = _obstacle(size, dtype, without_cudnn)
    if asked == CUDNN and obstacle is not None:
        raise ConfigError(f"model.attention=cudnn {obstacle}, or model.attention=plain")
    if asked == AUTO:
        return PLAIN if prefer_plain or obstacle is not None else CUDNN
    return asked


def _obstacle(size: TransformerSize, dtype: str, without_cudnn: str | None) -> str | None:
    """Say what cuDNN's kernel lacks here, and what would cure it."""
    head = size.hidden // size.heads
    if without_cudnn is not None:
        return (
            f"needs NVIDIA GPUs of compute capability 8.0 or later, and the cluster has "
            f"{without_cudnn} (cluster.device.kind): take another cluster"
        )
    if dtype not in _DTYPES:
        return (
            f"computes in {' or '.join(_DTYPES)}, and the model in {dtype} (model.dtype={dtype}): "
            f"set model.dtype={_DTYPES[0]}"
        )
    if size.dropout > 0:
        return (
            f"drops no probabilities, and the model drops {size.dropout:g} of them "
            f"(model.dropout={size.dropout:g}): set model.dropout=0"
        )
    if head > _LARGEST_HEAD or head % _HEAD_MULTIPLE:
        return (
            f"takes heads of up to {_LARGEST_HEAD} features in multiples of {_HEAD_MULTIPLE}, and the "
            f"model's have {head} (model.hidden={size.hidden} / model.heads={size.heads}): set other "
            f"model.heads"
        )
    return None
