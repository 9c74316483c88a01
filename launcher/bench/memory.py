"""`python -m launcher.bench memory`: what plans hold on their devices, beside what was predicted.

For each model and plan: the stages' peaks per device as the plan predicts them, as the compiled programs
have them (`launcher.runtime.memory_audit`), and their ratio; the furthest ratios come last. The devices are
emulated, so the figures are those of XLA's CPU backend. Status 1 if a ratio is out of bounds.

    models   which, as in gpt,wrn; default: all
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import optax

from launcher import models
from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import adopt_plan, find_plan
from launcher.autopar.plans.plan import Stage
from launcher.bench.settings import check_keys, chosen
from launcher.config import GptConfig, ModelConfig, MoeConfig, WrnConfig
from launcher.models.optimizer import Optimizer
from launcher.runtime import devices
from launcher.runtime.memory_audit import HIGHEST, LOWEST, MemoryAudit, audit_memory

_MIB = 2**20
MODELS: Mapping[str, ModelConfig] = {
    "gpt-tiny": GptConfig(size="tiny", dtype="fp32", layers=3),
    "gpt": GptConfig(size="tiny", dtype="fp32", layers=4, hidden=256, heads=4, seq_len=256),
    "moe": MoeConfig(size="tiny", dtype="fp32"),
    "wrn": WrnConfig(size="tiny", dtype="fp32"),
}
_ONE_STAGE = {"dp": 4, "tp": 1, "pp": 1, "num_microbatches": 2}
_TWO_STAGES = {"dp": 2, "tp": 1, "pp": 2, "num_microbatches": 4}
PLANS: Mapping[str, Mapping] = {
    "data": _ONE_STAGE,
    "tensor": {**_ONE_STAGE, "dp": 1, "tp": 4},
    "data x tensor": {**_ONE_STAGE, "dp": 2, "tp": 2},
    "zero-1": {**_ONE_STAGE, "zero": 1},
    "zero-2": {**_ONE_STAGE, "zero": 2},
    "zero-3": {**_ONE_STAGE, "zero": 3},
    "data, layer": {**_ONE_STAGE, "recompute": "layer"},
    "data, full": {**_ONE_STAGE, "recompute": "full"},
    "1f1b": _TWO_STAGES,
    "1f1b, layer": {**_TWO_STAGES, "recompute": "layer"},
    "1f1b, full": {**_TWO_STAGES, "recompute": "full"},
    "gpipe": {**_TWO_STAGES, "schedule": "gpipe"},
    "zb-h1": {**_TWO_STAGES, "schedule": "zb_h1"},
    "zb-h1, layer": {**_TWO_STAGES, "schedule": "zb_h1", "recompute": "layer"},
    "zb-h1, full": {**_TWO_STAGES, "schedule": "zb_h1", "recompute": "full"},
    "interleaved": {**_TWO_STAGES, "schedule": "interleaved"},
    "interleaved, zero-3": {**_TWO_STAGES, "schedule": "interleaved", "zero": 3},
    "zero-2, scatter": {**_ONE_STAGE, "zero": 2, "scatter": True},
    "zero-3, scatter": {**_ONE_STAGE, "dp": 2, "tp": 2, "zero": 3, "scatter": True},
    "zero-2, overlap": {**_ONE_STAGE, "zero": 2, "overlap": True},
    "1f1b, overlap": {**_TWO_STAGES, "overlap": True},
    "zb-h1, overlap": {**_TWO_STAGES, "schedule": "zb_h1", "overlap": True},
    "four stages": {"dp": 1, "tp": 1, "pp": 4, "num_microbatches": 8},
}


def run(settings: Mapping[str, str]) -> int:
    """Print a row per stage."""
    check_keys("memory", settings, ["models"])
    wanted = chosen(settings, "models", MODELS)
    devices.emulate(4)
    sys.stdout.write(
        f"{'model':<10}{'plan':<20}{'stage':>5}{'predicted':>15}{'measured':>15}{'ratio':>8}  at\n"
    )
    ratios: dict[str, float] = {}
    for name in wanted:
        for plan, audit in _audits(MODELS[name]):
            ratios[f"{name}, {plan}, stage {audit.stage}"] = audit.ratio
            sys.stdout.write(_row(name, plan, audit))
            sys.stdout.flush()
    for place in (min(ratios, key=ratios.get), max(ratios, key=ratios.get)):
        sys.stdout.write(f"furthest: {ratios[place]:.3f} ({place})\n")
    inside = sum(LOWEST <= ratio <= HIGHEST for ratio in ratios.values())
    sys.stdout.write(f"{inside} of {len(ratios)} within {LOWEST} to {HIGHEST}\n")
    return int(inside < len(ratios))


def _audits(config: ModelConfig) -> Iterator[tuple[str, MemoryAudit]]:
    for plan in PLANS:
        yield from ((plan, audit) for audit in measure(config, plan))


def measure(config: ModelConfig, plan: str) -> list[MemoryAudit]:
    """Plan a model in one of the `PLANS`, compile it, and compare."""
    cluster = dataclasses.replace(load_cluster("cpu8"), num_hosts=1, devices_per_host=4)
    transform, model = optax.adamw(1e-3), models.build(config)
    given = dict(PLANS[plan])
    changes = {name: given.pop(name) for name in ("scatter", "overlap") if name in given}
    options = PlanOptions(mode="manual", global_batch=16, optimizer=transform, **given)
    found = find_plan(model, cluster, options, lambda text: None)
    if changes:  # which the planner does not choose for such models on emulated devices
        stages = tuple(_changed(stage, changes) for stage in found.plan.stages)
        found = adopt_plan(dataclasses.replace(found.plan, stages=stages), model, cluster, options)
    realized = found.realized
    optimizer = Optimizer(transform=transform, clip_norm=1.0, schedule=lambda step: 1e-3)
    grid = np.array(jax.devices()[:4], dtype=object).reshape(1, 4)
    return audit_memory(realized, model, optimizer, grid, lambda text: None)


def _changed(stage: Stage, changes: Mapping[str, bool]) -> Stage:
    """A stage that sums its gradients elsewhere, or brings them together at another time."""
    strategies = {
        group: texts for group, texts in stage.strategies.items() if group.endswith("/op")
    }
    return dataclasses.replace(stage, **changes, strategies=strategies)


def _row(model: str, plan: str, audit: MemoryAudit) -> str:
    mark = "" if audit.agrees else "  <-- out of bounds"
    return (
        f"{model:<10}{plan:<20}{audit.stage:>5}{audit.predicted_bytes / _MIB:>11.2f} MiB"
        f"{audit.measured_bytes / _MIB:>11.2f} MiB{audit.ratio:>8.3f}  {audit.at}{mark}\n"
    )
