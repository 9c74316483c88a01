"""How a run's numbers are made, where they go, and what writes a text at its end."""

import dataclasses
from pathlib import Path

from rich.console import Console

from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.make_plan import Planned
from launcher.autopar.plans.stage_hosts import peak_flops_per_s
from launcher.autopar.predictions.predict import model_flops_per_step
from launcher.config import Config
from launcher.data.dataset import Dataset
from launcher.models.model import Model
from launcher.runtime.records.metrics import Meter, PlanMetrics
from launcher.runtime.records.progress import progress_sink
from launcher.runtime.records.sinks import JsonlSink, Sink, SummarySink
from launcher.runtime.records.wandb_sink import WandbRun, WandbSink
from launcher.runtime.training.sampling import Sampler, SampleSettings, make_sampler


def make_meter(planned: Planned, model: Model, cluster: AnyCluster, *, emulated: bool) -> Meter:
    """How step times become throughput and MFU; emulated devices have no peak."""
    plan = planned.plan
    traced = planned.realized.planner.model.traced
    return Meter(
        model_flops_per_step=model_flops_per_step(traced, plan.num_microbatches),
        num_devices=plan.num_devices,
        peak_flops_per_s=None if emulated else peak_flops_per_s(plan, cluster, model.dtype),
        global_batch=plan.global_batch,
        units_per_sample=model.units_per_sample,
        sample_unit=model.sample_unit,
        predicted_step_s=plan.predicted.step_s,
        predicted_peak_bytes_per_stage=tuple(plan.predicted.peak_bytes_per_device),
        incomparable=_incomparable(cluster, emulated=emulated),
    )


def _incomparable(cluster: AnyCluster, *, emulated: bool) -> str | None:
    """Why a step time measured here says nothing of the predicted one; None where it does."""
    if emulated and cluster.has_accelerators:
        return f"CPU devices stand for {' and '.join(k.device.kind for k in cluster.kinds)}"
    return f"the figures of cluster={cluster.name} are nominal" if cluster.nominal else None


def make_sinks(
    config: Config, run_dir: Path, console: Console, meter: Meter, steps: int, metrics: PlanMetrics,
    *, resumes: bool = False,
) -> list[Sink]:  # fmt: skip
    """Where the numbers go: files, the terminal, and W&B, which comes last since it may be slow.

    `resumes`: what the folder has of an earlier run is gone on with.
    """
    sinks: list[Sink] = [
        JsonlSink(run_dir),
        SummarySink(run_dir, metrics),
        progress_sink(console, meter, steps, run_dir),
    ]
    if config.logger.name == "wandb":
        settings = WandbRun(
            run_dir=run_dir,
            config=dataclasses.asdict(config),
            plan=metrics,
            project=config.logger.project or "launcher",
            entity=config.logger.entity,
            group=config.logger.group,
            tags=tuple(config.logger.tags),
            resumes=resumes,
        )
        sinks.append(WandbSink(settings))
    return sinks


def find_sampler(
    config: Config, cluster: AnyCluster, model: Model, dataset: Dataset, *, emulated: bool
) -> Sampler | None:
    """What writes a text at the end, if one is asked for."""
    if not config.train.sample_tokens:
        return None
    settings = SampleSettings(
        num_tokens=config.train.sample_tokens,
        prompt=config.train.sample_prompt,
        temperature=config.train.sample_temperature,
        top_k=config.train.sample_top_k,
        seed=config.seed,
    )
    is_real = cluster.has_accelerators and not emulated
    first_bytes = cluster.kinds[0].device.memory_bytes if is_real else None
    return make_sampler(settings, model, dataset, first_bytes)
