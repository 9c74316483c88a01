"""What a single field of a config may hold, by its key: choices, ranges, paths.

What several fields say together is `checks`' to judge. A limit from above is far beyond anything
that is trained; it keeps slips and absurd values from ending in overflows, or in waits without end.
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
    "runtime.name": ("auto", "local", "emulate", "ray"),
}

# Values that the interface has and this version has not.
LATER: Mapping[str, tuple[str, ...]] = {
    "mode": ("submit",),
}

# The smallest value, and the first that is too large.
# Counts go into 32-bit integers of devices (a step, a token), amounts into their 32-bit floats.
COUNTS, ALSO_NONE, AMOUNTS, SHARES = (1, 2**31), (0, 2**31), (0, 1e30), (0, 1)
RANGES: Mapping[str, tuple[float, float]] = {
    "seed": (0, 2**63),
    "model.hidden": COUNTS,
    "model.layers": (1, 10_001),  # each is built and traced, so that more would seem to hang
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
    "parallel.num_microbatches": (1, 2**16 + 1),  # each is several instructions of a program
    "parallel.dp": COUNTS,
    "parallel.tp": COUNTS,
    "parallel.pp": COUNTS,
    "parallel.ep": COUNTS,
    "parallel.zero": (0, 4),
    "parallel.virtual_stages": COUNTS,
    "data.valid_fraction": SHARES,
    "optimizer.learning_rate": AMOUNTS,
    "optimizer.warmup_steps": ALSO_NONE,
    "optimizer.clip_norm": AMOUNTS,
    "optimizer.weight_decay": AMOUNTS,
    "optimizer.beta1": SHARES,
    "optimizer.beta2": SHARES,
    "optimizer.eps": AMOUNTS,
    "optimizer.momentum": SHARES,
    "train.steps": COUNTS,
    "train.global_batch": (1, 10**7 + 1),
    "train.tokens": (1, 1e30),
    "train.eval_every": ALSO_NONE,
    "train.eval_batches": ALSO_NONE,
    "train.nonfinite_steps": ALSO_NONE,
    "train.max_rollbacks": ALSO_NONE,
    "train.sample_tokens": ALSO_NONE,
    "train.sample_temperature": AMOUNTS,
    "train.sample_top_k": ALSO_NONE,
    "checkpoint.every_steps": ALSO_NONE,
    "checkpoint.every_minutes": (0, 10**6),
    "checkpoint.keep": COUNTS,
    "runtime.max_restarts": ALSO_NONE,
    "runtime.heartbeat_s": (0.1, 3601),
}

# Fields that name files and folders.
PATHS = (
    "model.weights",
    "parallel.path",
    "data.path",
    "plan.compare",
    "profile.dir",
    "checkpoint.dir",
    "resume",
)
LONGEST_PATH = 4096  # PATH_MAX of Linux


def check_value(key: str, value: object) -> None:
    """Raise `ConfigError` if the field cannot hold the value, whatever others hold."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value} is not a finite number: give one")
    if key in CHOICES and value is not None:
        _check_choice(key, value)
    if key in RANGES and isinstance(value, int | float):
        _check_range(key, value)
    if isinstance(value, str):
        _check_text(key, value)


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


def _check_text(key: str, value: str) -> None:
    if "\0" in value:
        raise ConfigError(f"{key} has a null character, which no text of ours has: take it out")
    if key not in PATHS:
        return
    if not value:
        raise ConfigError(f"{key}='' is empty and names no file: give a path, or leave it out")
    if len(value) > LONGEST_PATH:
        raise ConfigError(
            f"{key}={value[:40]}... has {len(value)} characters, and a path at most {LONGEST_PATH}: "
            f"correct it"
        )
