"""A plan's step beside the step that one would write by hand: one jit of the same model and shardings."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launcher import models
from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import find_plan
from launcher.config import GptConfig
from launcher.models.model import Model
from launcher.models.optimizer import Optimizer
from launcher.runtime.steps.local_executor import LocalExecutor

Step = Callable[[], None]
# Starts a step, and returns what is there when it is done.
Dispatch = Callable[[], Any]

_SAMPLES_PER_MICROBATCH = 16
_CLIP_NORM = 1.0
_CONFIG = GptConfig(
    size="tiny", dtype="fp32", hidden=256, layers=4, heads=4, seq_len=128, dropout=0.0
)


def pair(*, num_devices: int, num_microbatches: int) -> tuple[Step, Step]:
    """A step of the data-parallel plan, and of its peer; both wait until the step is done."""
    model = models.build(_CONFIG)
    batch_size = _SAMPLES_PER_MICROBATCH * max(1, num_microbatches // 4)
    batch = draw_batch(model, batch_size)
    transform = optax.adamw(1e-3)
    ours = _ours(model, transform, batch, num_devices, num_microbatches)
    peer = plain_step(model, transform, batch, num_devices, num_microbatches)
    return ours, lambda: jax.block_until_ready(peer())


def draw_batch(model: Model, batch_size: int) -> dict[str, np.ndarray]:
    """Draw token sequences."""
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, model.vocab_size, leaf.shape).astype(leaf.dtype)
        for name, leaf in model.example_batch(batch_size).items()
    }


def _ours(model: Model, transform, batch, num_devices: int, num_microbatches: int) -> Step:
    machine = load_cluster("cpu8")
    machine = dataclasses.replace(machine, num_hosts=1, devices_per_host=num_devices)
    options = PlanOptions(
        mode="data", global_batch=len(batch["tokens"]), num_microbatches=num_microbatches,
        optimizer=transform,
    )  # fmt: skip
    planned = find_plan(model, machine, options, lambda text: None)
    optimizer = Optimizer(transform=transform, clip_norm=_CLIP_NORM, schedule=lambda step: 1e-3)
    grid = np.array(jax.devices()[:num_devices], dtype=object)[None]
    executor = LocalExecutor(planned.realized, model, optimizer, grid, seed=0)
    placed = executor.place(batch, 0)

    def step() -> None:
        jax.block_until_ready(executor.step(placed).loss)
        jax.block_until_ready(executor.stages[0].params)

    return step


def plain_step(
    model: Model,
    transform,
    batch,
    num_devices: int,
    num_microbatches: int,
    *,
    recompute: bool = False,
) -> Dispatch:
    """The hand-written step: one jit, data parallel, with the gradients accumulated by `lax.scan`.

    Args:
        recompute: In the backward pass, all but the results of the products without a batch dim.
    """
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(None, "data"))
    optimizer = optax.chain(optax.clip_by_global_norm(_CLIP_NORM), transform)
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    loss_of = jax.checkpoint(model.loss, policy=keep) if recompute else model.loss
    differentiate = jax.value_and_grad(loss_of, has_aux=True)

    def gradients(params, batch, keys):
        if num_microbatches == 1:
            only = {name: leaf[0] for name, leaf in batch.items()}
            (loss, _), sums = differentiate(params, {}, only, keys[0])
            return loss, sums

        def add(sums, inputs):
            (loss, _), found = differentiate(params, {}, *inputs)
            return jax.tree.map(jnp.add, sums, found), loss

        sums, losses = lax.scan(add, jax.tree.map(jnp.zeros_like, params), (batch, keys))
        return losses.mean(), jax.tree.map(lambda total: total / num_microbatches, sums)

    def train(params, memory, batch, keys):
        loss, found = gradients(params, batch, keys)
        updates, memory = optimizer.update(found, memory, params)
        return optax.apply_updates(params, updates), memory, loss

    compiled = jax.jit(train, donate_argnums=(0, 1))
    params, _ = model.init(0)
    held = [jax.device_put(params, whole), jax.device_put(optimizer.init(params), whole)]
    stacked = {
        name: jax.device_put(leaf.reshape(num_microbatches, -1, *leaf.shape[1:]), split)
        for name, leaf in batch.items()
    }
    keys = jax.device_put(np.zeros((num_microbatches, 2), np.uint32), whole)

    def step():
        *held[:], loss = compiled(*held, stacked, keys)
        return loss, held[0]

    return step
