"""Optimizers and learning-rate schedules, as optax transformations.

A transformation here treats every weight by itself and works on any part of a model's flat dict of
weights, so each stage of a pipeline updates its own. The one thing that looks at all gradients,
clipping by their global norm, is left to the runtime, which sees all stages.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from launcher.config import AdafactorConfig, AdamwConfig, OptimizerConfig, SgdConfig
from launcher.errors import ConfigError

Schedule = Callable[[Array | int], Array]

# Weights that shift or scale are not decayed, whatever their rank.
_NOT_DECAYED = ("bias", "scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScaling:
    """What the loss is multiplied with before the backward pass."""

    scale: float = 1.0  # the first one, or the only one
    dynamic: bool = False  # halved by gradients that are not finite, whose step is skipped
    growth_steps: int = 2000  # good steps after which a dynamic scale doubles


# Most first steps of a run in fp16 are skipped until the scale fits: 16 halvings would bring it to 1.
DYNAMIC = LossScaling(scale=2.0**16, dynamic=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """How weights are updated."""

    transform: optax.GradientTransformation  # without clipping
    clip_norm: float | None  # largest global norm of the gradients
    schedule: Schedule  # update, counted from 0 -> learning rate
    loss_scaling: LossScaling = LossScaling()


def build_optimizer(config: OptimizerConfig, total_steps: int, dtype: str = "fp32") -> Optimizer:
    """Build the optimizer of a config for a run of so many steps, computing in `dtype`."""
    _check(config)
    schedule = make_schedule(config, total_steps)
    decay = optax.add_decayed_weights(config.weight_decay, mask=decayed)
    steps = [_direction(config), decay, optax.scale_by_learning_rate(schedule)]
    return Optimizer(
        transform=optax.chain(*steps),
        clip_norm=config.clip_norm or None,
        schedule=schedule,
        loss_scaling=make_loss_scaling(config.loss_scale, dtype),
    )


def make_loss_scaling(given: str, dtype: str) -> LossScaling:
    """Read `optimizer.loss_scale`; by itself only fp16 is scaled, the other types reach far enough."""
    if given == "dynamic" or (given == "auto" and dtype == "fp16"):
        return DYNAMIC
    if given == "auto":
        return LossScaling()
    try:
        scale = float(given)
    except ValueError:
        scale = math.nan
    if not 0 < scale < math.inf:
        raise ConfigError(
            f"optimizer.loss_scale={given} is neither auto, dynamic nor a number above 0: "
            f"give one of them, such as optimizer.loss_scale=1024"
        )
    return LossScaling(scale=scale)


def make_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Return the learning rate as a function of the step: a linear rise, then the decay.

    The rise starts from 0 before the first step and the decay ends in 0 after the last: no step is
    taken at 0.
    """
    _check(config)
    decay_steps = max(total_steps - config.warmup_steps, 1)

    def schedule(step: Array | int) -> Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum((step + 1.0) / max(config.warmup_steps, 1), 1.0)
        progress = jnp.clip((step - config.warmup_steps) / decay_steps, 0.0, 1.0)
        return config.learning_rate * rise * _remaining(config.decay, progress)

    return schedule


def decayed(params: dict[str, Any]) -> dict[str, bool]:
    """Tell which weights weight decay pulls to 0: matrices, and not what shifts or scales."""
    return {
        path: weight.ndim >= 2 and path.rpartition("/")[2] not in _NOT_DECAYED
        for path, weight in params.items()
    }


def _remaining(decay: str, progress: Array) -> Array:
    match decay:
        case "constant":
            return jnp.ones_like(progress)
        case "cosine":
            return 0.5 * (1.0 + jnp.cos(math.pi * progress))
        case "linear":
            return 1.0 - progress
        case _:
            raise ConfigError(
                f"no learning rate decays by {decay!r} (optimizer.decay={decay}): "
                f"choose constant, cosine or linear"
            )


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return what turns gradients into a direction; learning rate and decay come after it."""
    match config:
        case AdamwConfig():
            return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps)
        case AdafactorConfig():
            # Shazeer and Stern 2018, algorithms 4 and 2: factored second moments, updates of at
            # most unit size, steps in proportion to the weight's own size.
            return optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.scale_by_param_block_rms(),
            )
        case SgdConfig():
            return optax.trace(decay=config.momentum)
        case _:
            raise AssertionError(f"no optimizer is built from {type(config).__name__}")


def _check(config: OptimizerConfig) -> None:
    if not config.learning_rate > 0:
        raise ConfigError(
            f"a learning rate of {config.learning_rate} does not train "
            f"(optimizer.learning_rate={config.learning_rate}): set it above 0"
        )
    for name, value in (
        ("warmup_steps", config.warmup_steps),
        ("clip_norm", config.clip_norm),
        ("weight_decay", config.weight_decay),
    ):
        if value < 0:
            raise ConfigError(
                f"{name} cannot be negative, and is {value} (optimizer.{name}={value}): "
                f"set 0 or more, 0 turns it off"
            )
    _remaining(config.decay, jnp.zeros(()))
