"""The training steps that the GPU benchmark times: a plan's, a hand-written one, and PyTorch's.

Each returns a `Timed`; a peer that cannot run says why in `left_out`, and the benchmark goes on.
"""

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax

from launcher import models
from launcher.autopar.clusters.hosts import Cluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import Planned, find_plan
from launcher.bench import plain_steps
from launcher.bench.step_timing import median_step_s
from launcher.config import GptConfig
from launcher.errors import InfeasiblePlanError
from launcher.models.model import Model
from launcher.models.optimizer import Optimizer
from launcher.models.sizes import gpt_size
from launcher.runtime.steps.local_executor import LocalExecutor
from launcher.runtime.steps.memory_error import is_memory_error
from launcher.runtime.steps.watched_executor import PROFILE_NAME, Watch, WatchedExecutor

_TORCH_MODULE = "launcher.bench.torch_gpt"
_TRANSFORM = optax.adamw(1e-3)
_OPTIMIZER = Optimizer(transform=_TRANSFORM, clip_norm=1.0, schedule=lambda step: 1e-3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a step is about: a size of GPT, samples per step and tokens per sample.

    Attributes:
        steps: How many are timed.
        attention: As `model.attention`.
    """

    size: str
    batch: int
    seq_len: int
    steps: int
    attention: str = "auto"

    def config(self, dtype: str, loss_chunks: int = 1) -> GptConfig:
        """The model, without dropout, which fused attention in other libraries draws differently."""
        return GptConfig(
            size=self.size,
            dtype=dtype,
            seq_len=self.seq_len,
            dropout=0.0,
            attention=self.attention,
            loss_chunks=loss_chunks,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A step's time, or why there is none."""

    who: str
    step_s: float | None = None
    left_out: str = ""


def best_plan(
    variants: Sequence[Model],
    cluster: Cluster,
    batch: int,
    recompute: Sequence[str],
    count: int | None,
) -> tuple[Model, Planned]:
    """The model and plan on one device that are predicted to be the fastest of those that fit.

    Args:
        variants: The same model by different kernels.
        recompute: What may be recomputed: `single` by itself recomputes nothing.
        count: Of microbatches; None leaves it open.

    Raises:
        InfeasiblePlanError: none fits; that of the last choice.
    """
    found = []
    for model, choice in itertools.product(variants, recompute):
        options = PlanOptions(
            mode="single", global_batch=batch, num_microbatches=count, recompute=choice,
            optimizer=_TRANSFORM,
        )  # fmt: skip
        try:
            found.append((model, find_plan(model, cluster, options, lambda text: None)))
        except InfeasiblePlanError as error:
            refused = error
    if not found:
        raise refused
    return min(found, key=lambda pair: pair[1].plan.predicted.step_s)


def time_plan(
    planned: Planned, model: Model, grid: np.ndarray, steps: int, profile: Path | None
) -> Timed:
    """The executor's steps; afterwards one is profiled into a folder, if one is given."""
    executor = LocalExecutor(planned.realized, model, _OPTIMIZER, grid, seed=0)
    placed = executor.place(plain_steps.draw_batch(model, planned.plan.global_batch), 0)
    step_s = median_step_s(lambda: executor.step(placed), lambda _: executor.wait(), steps)
    if profile is not None:
        _profile(executor, planned, placed, profile)
    executor.close()
    return Timed(who="launcher", step_s=step_s)


def _profile(executor: LocalExecutor, planned: Planned, placed, folder: Path) -> None:
    watch = Watch(
        run_dir=folder,
        trace_steps=frozenset(),
        profile_steps=frozenset({placed.step + 1}),
        planned=planned.outlook.timeline,
        title=PROFILE_NAME,
        incomparable=None,
    )
    WatchedExecutor(executor, watch).step(placed)


def time_plain(planned: Planned, model: Model, steps: int) -> Timed:
    """A plain jitted step of the same Flax model, with the plan's microbatches.

    Where the plan recomputes, it recomputes what does not come out of a product with weights.
    """
    plan, who = planned.plan, "plain jit"
    batch = plain_steps.draw_batch(model, plan.global_batch)
    recompute = any(stage.recompute != "none" for stage in plan.stages)
    try:
        start = plain_steps.plain_step(
            model, _TRANSFORM, batch, 1, plan.num_microbatches, recompute=recompute
        )
        return Timed(who=who, step_s=median_step_s(start, jax.block_until_ready, steps))
    except jax.errors.JaxRuntimeError as error:
        if not is_memory_error(error):
            raise
        return Timed(who=who, left_out="out of device memory")


def time_torch(task: Task) -> Timed:
    """The same GPT in PyTorch, by a process of its own, before JAX takes the memory of the GPU."""
    if importlib.util.find_spec("torch") is None:
        return Timed(who="torch", left_out="torch is not installed")
    request = {
        "size": dataclasses.asdict(gpt_size(task.config("bf16"))),
        "batch": task.batch,
        "steps": task.steps,
    }
    command = [sys.executable, "-m", _TORCH_MODULE, json.dumps(request)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        *_, last = ended.stderr.strip().splitlines() or ["no message"]
        return Timed(who="torch", left_out=f"its process ended with {ended.returncode}: {last}")
    answer = json.loads(ended.stdout.splitlines()[-1])
    if "left_out" in answer:
        return Timed(who="torch", left_out=answer["left_out"])
    who = f"torch {answer['version']}, {answer['num_microbatches']} microbatches"
    return Timed(who=who, step_s=answer["step_s"])


def build_model(task: Task, cluster: Cluster, loss_chunks: int = 1) -> Model:
    """The model in bf16, and in fp32 where there is no accelerator."""
    device = cluster.device
    dtype = "bf16" if device.accelerator else "fp32"
    config = models.resolve(
        task.config(dtype, loss_chunks),
        memory_bytes=cluster.memory_bytes,
        has_accelerator=device.accelerator,
        dtype=dtype,
        without_cudnn=None if device.has_cudnn_attention else device.kind,
        prefer_plain=False,
    )
    return models.build(config)
