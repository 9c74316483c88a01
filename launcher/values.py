"""What one value of a config may be, whatever the others are: its choices, or its range.

Every message names the key and its value, and says what to give instead. Values that contradict one another
are left to `checks`.
"""

import math
from collections.abc import Mapping

from launcher.errors import ConfigError

CHOICES: Mapping[str, tuple[str, ...]] = {
    "mode": ("train", "plan", "eval", "profile"),
    "model.dtype": ("auto", "fp32", "bf16", "fp16", "fp64"),
    "model.attention": ("auto", "plain", "cudnn"),
    "model.second_expert": ("always", "random"),
    "parallel.name": ("single", "data", "zero", "manual", "auto", "from_file"),
    "parallel.recompute": ("none", "layer", "full"),
    "parallel.schedule": ("gpipe", "1f1b", "interleaved", "zb_h1"),
    "data.tokenizer": ("bytes", "bpe"),
    "optimizer.decay": ("constant", "cosine", "linear"),
    "logger.name": ("wandb", "jsonl"),
    "runtime.name": ("auto", "local", "emulate"),
}

# Values that the interface has and this version has not.
LATER: Mapping[str, tuple[str, ...]] = {
    "mode": ("submit",),
}

# The smallest value, and the first that is too large.
COUNTS, AMOUNTS, SHARES = (1, math.inf), (0, math.inf), (0, 1)
RANGES: Mapping[str, tuple[float, float]] = {
    "seed": (0, 2**63),
    "model.hidden": COUNTS,
    "model.layers": COUNTS,
    "model.heads": COUNTS,
    "model.seq_len": COUNTS,
    "model.vocab_size": COUNTS,
    "model.dropout": SHARES,
    "model.loss_chunks": COUNTS,
    "model.experts": COUNTS,
    "model.expert_group_size": COUNTS,
    "model.mlp_factor": COUNTS,
    "model.aux_loss_weight": AMOUNTS,
    "model.depth": COUNTS,
    "model.base_channels": COUNTS,
    "model.width_factor": COUNTS,
    "model.image_size": COUNTS,
    "model.num_classes": COUNTS,
    "cluster.hosts": COUNTS,
    "cluster.devices_per_host": COUNTS,
    "parallel.num_microbatches": COUNTS,
    "parallel.dp": COUNTS,
    "parallel.tp": COUNTS,
    "parallel.pp": COUNTS,
    "parallel.ep": COUNTS,
    "parallel.zero": (0, 4),
    "parallel.virtual_stages": COUNTS,
    "data.valid_fraction": SHARES,
    "optimizer.learning_rate": AMOUNTS,
    "optimizer.warmup_steps": AMOUNTS,
    "optimizer.clip_norm": AMOUNTS,
    "optimizer.weight_decay": AMOUNTS,
    "optimizer.beta1": SHARES,
    "optimizer.beta2": SHARES,
    "optimizer.eps": AMOUNTS,
    "optimizer.momentum": SHARES,
    "train.steps": COUNTS,
    "train.global_batch": COUNTS,
    "train.tokens": COUNTS,
    "train.eval_every": AMOUNTS,
    "train.eval_batches": AMOUNTS,
    "train.sample_tokens": AMOUNTS,
    "train.sample_temperature": AMOUNTS,
    "train.sample_top_k": AMOUNTS,
    "checkpoint.every_steps": AMOUNTS,
    "checkpoint.every_minutes": AMOUNTS,
    "checkpoint.keep": COUNTS,
}


def check_value(key: str, value: object) -> None:
    """Raise `ConfigError` for a value that its key cannot have."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value} is not a finite number: give one")
    if key in CHOICES and value is not None:
        _check_choice(key, value)
    if key in RANGES and isinstance(value, int | float):
        _check_range(key, value)


def _check_choice(key: str, value: object) -> None:
    if value in LATER.get(key, ()):
        raise ConfigError(
            f"{key}={value} is not in this version yet: take {key}={' or '.join(CHOICES[key])}"
        )
    if value not in CHOICES[key]:
        raise ConfigError(f"{key}={value} is unknown: take {key}={' or '.join(CHOICES[key])}")


def _check_range(key: str, value: float) -> None:
    smallest, too_large = RANGES[key]
    if value < smallest:
        raise ConfigError(f"{key}={value} is less than {smallest}: give {key}={smallest} or more")
    if value >= too_large and isinstance(value, int):
        raise ConfigError(
            f"{key}={value} is more than {too_large - 1}: give {smallest} to {too_large - 1}"
        )
    if value >= too_large:
        raise ConfigError(
            f"{key}={value} is not less than {too_large}: "
            f"give at least {smallest} and less than {too_large}"
        )
