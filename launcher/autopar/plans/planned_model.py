"""A run's model in words, in its plan, and as the plan that it is given has it."""

import logging
from dataclasses import replace

from launcher.autopar.plans.plan import ModelRef, Plan
from launcher.autopar.text.wording import large
from launcher.config import GptConfig, ModelConfig, MoeConfig
from launcher.models.kernels import AUTO, CUDNN, PLAIN
from launcher.models.model import Model

log = logging.getLogger(__name__)

_HALF_PRECISIONS = {"fp16", "bf16"}  # a model has the same ops in both


def describe_model(model: Model) -> str:
    """Return the model in one line."""
    kernels = model.kernels
    parts = [
        f"{model.name} {model.size}",
        f"{large(model.num_parameters)} parameters",
        f"computing in {model.dtype}",
        "attention by cuDNN" if kernels.attention == CUDNN else "",
        f"the loss in {kernels.loss_chunks} chunks" if kernels.loss_chunks > 1 else "",
    ]
    return ", ".join(filter(None, parts))


def model_ref(model: Model) -> ModelRef:
    """Return what a plan for this model writes down of it."""
    return ModelRef(
        name=model.name,
        size=model.size,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        attention=model.kernels.attention,
        loss_chunks=model.kernels.loss_chunks,
    )


def as_planned(config: ModelConfig, plan: Plan | None) -> ModelConfig:
    """Return the config with the size and the kernels of a plan, where it leaves them open."""
    if plan is None or plan.model.name != config.name:
        return config
    if config.size == AUTO:
        config = replace(config, size=plan.model.size)
    if isinstance(config, GptConfig | MoeConfig):
        # A plan with cuDNN's attention leaves `auto` as it is: the run may not be able to.
        if config.attention == AUTO and plan.model.attention == PLAIN:
            config = replace(config, attention=PLAIN)
        if config.loss_chunks is None:
            config = replace(config, loss_chunks=plan.model.loss_chunks)
    return config


def for_model(plan: Plan, model: Model) -> Plan:
    """Return the plan without its strategies where they are for other ops, and warn of that.

    Those of another dtype have the casts of a wider one, those of other kernels other ops altogether. What
    a plan does not say of its model is taken to agree.
    """
    there, here = plan.model, model_ref(model)
    differing = [
        (key, planned, own)
        for key, planned, own in (
            ("model.dtype", there.dtype, here.dtype),
            ("model.attention", there.attention, here.attention),
            ("model.loss_chunks", there.loss_chunks, here.loss_chunks),
        )
        if planned not in (None, own)
    ]
    for key, planned, own in differing:
        log.warning(
            "the plan was made for %s=%s, and this run has %s: set %s=%s to do as planned",
            key, planned, own, key, planned,
        )  # fmt: skip
    if all({planned, own} <= _HALF_PRECISIONS for _, planned, own in differing):
        return plan
    return replace(plan, stages=tuple(replace(stage, strategies={}) for stage in plan.stages))
