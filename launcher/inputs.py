"""What a config asks for, as the objects that answer to it: the cluster, the model, what the planner and the
training loop are told."""

import logging
import os

import jax

from launcher import models
from launcher.autopar.clusters.cluster import cluster_at_hand, cluster_from_config
from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.plans.plan import Plan
from launcher.autopar.plans.planned_model import as_planned, describe_model
from launcher.config import Config
from launcher.models.model import Model
from launcher.models.optimizer import Optimizer
from launcher.resume import Start
from launcher.runtime import devices
from launcher.runtime.hosts.ray_pool import ray_address
from launcher.runtime.training.train_loop import TrainSettings

log = logging.getLogger(__name__)


def find_cluster(config: Config) -> AnyCluster:
    """The cluster of the config; `local` is whatever this machine has."""
    cluster = cluster_from_config(config.cluster)
    audits = config.plan.audit and config.mode == "plan"
    is_local = cluster.name == "local"
    on_hosts = runs_on_hosts(config, cluster)
    computes_here = not (emulates(config) or audits or on_hosts)
    if is_local and (computes_here or on_hosts):
        # Those of the hosts' processes are not to be taken by this one.
        look = devices.discover_apart if on_hosts else devices.discover
        found = look(cluster.num_devices)
        if found.count:
            cluster = cluster_at_hand(found.kind, found.count, found.memory_bytes)
    if not computes_here or not (is_local or cluster.has_accelerators):
        devices.emulate(cluster.num_devices)
    log.info("cluster: %s", cluster.describe())
    return cluster


def emulates(config: Config) -> bool:
    """Whether CPU devices stand for the cluster's."""
    return config.runtime.name == "emulate"


def runs_on_hosts(config: Config, cluster: AnyCluster) -> bool:
    """Whether every host of the cluster gets a process of its own, through Ray.

    With `runtime=auto`: several real hosts, and a Ray that may have them.
    """
    runtime = config.runtime
    if config.mode != "train" or runtime.name not in ("auto", "ray"):
        return False
    several = cluster.has_accelerators and sum(kind.num_hosts for kind in cluster.kinds) > 1
    has_ray = ray_address(runtime.address, os.environ) is not None
    return runtime.name == "ray" or (several and has_ray)


def plan_options(
    config: Config, given: Plan | None, model: Model, optimizer: Optimizer
) -> PlanOptions:
    """What the config asks of the planner."""
    parallel = config.parallel
    count = parallel.num_microbatches
    default_batch = given.global_batch if given else model.default_global_batch
    return PlanOptions(
        mode=parallel.name,
        global_batch=config.train.global_batch or default_batch,
        num_microbatches=None if count == "auto" else int(count),
        dp=parallel.dp,
        tp=parallel.tp,
        pp=parallel.pp,
        ep=parallel.ep,
        zero=parallel.zero,
        recompute=parallel.recompute,
        schedule=parallel.schedule,
        virtual_stages=parallel.virtual_stages,
        optimizer=optimizer.transform,
    )


def build_model(
    config: Config, cluster: AnyCluster, given: Plan | None, *, emulated: bool
) -> Model:
    """The model; what is left open is as in the given plan, or decided by the cluster."""
    on_cpu = emulated or not cluster.has_accelerators
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "fp32" if on_cpu else cluster.default_dtype
    if dtype == "fp64":
        jax.config.update("jax_enable_x64", True)
    resolved = models.resolve(
        as_planned(config.model, given),
        memory_bytes=cluster.memory_bytes,
        has_accelerator=cluster.has_accelerators,
        dtype=dtype,
        without_cudnn=cluster.without_cudnn,
        prefer_plain=on_cpu and given is None,
    )
    model = models.build(resolved)
    log.info("model: %s", describe_model(model))
    return model


def train_settings(config: Config, plan: Plan, start: Start) -> TrainSettings:
    """How long to train from where, and when to evaluate."""
    watched_steps = {*config.train.trace_steps, *config.train.profile_steps}
    return TrainSettings(
        steps=config.train.steps,
        global_batch=plan.global_batch,
        eval_every=config.train.eval_every,
        eval_batches=config.train.eval_batches,
        first_step=start.step,
        progress=start.progress,
        nonfinite_steps=config.train.nonfinite_steps,
        max_rollbacks=config.train.max_rollbacks,
        # What is written after a watched step holds up the next one.
        untypical_steps=frozenset(step + late for step in watched_steps for late in (0, 1)),
    )
