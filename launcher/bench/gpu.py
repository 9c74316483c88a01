"""`python -m launcher.bench gpu`: GPT on one GPU, its tokens/s and MFU beside plain Flax and PyTorch.

The planner and the executor are those of a real run with `parallel=single`; of the recomputations that
fit, the one that is predicted to be the fastest is taken. In the same run the peers train the same model
on as many samples: a plain jitted step (`bench/plain_steps.py`), and PyTorch with `torch.compile` and flash
attention (`bench/torch_gpt.py`), where it is installed and has a GPU. A step time is the median over groups
of steps, with one wait for each group. MFU counts the operations of the model's forward pass three times,
without recomputation, over the dense peak of the device; where no peak is known there is no MFU. Status 1
if 1.3b at sequence 2048 misses its bar on a GPU whose peak is known.

    models        which of tiny, 350m and 1.3b; default: 350m,1.3b. Without a GPU only tiny runs, in fp32
    steps         how many are timed; default: 20
    batch         samples of a step; default: 8
    seq_len       tokens of a sample; default: 2048
    peers         which of plain and torch; default: both
    attention     as model.attention: auto (cuDNN's where the GPU has it), plain or cudnn; default: auto
    loss_chunks   what the planner may choose from, of 1, 2, 4, 8 and 16; default: 1,8
    recompute     the same, as in none,layer; default: none,layer,full
    microbatches  of a step; default: what the planner chooses
    profile       a folder: jax's profiler records one more step of each model there, to see where time goes

It has not run on a GPU yet, so there are no figures with machine and date here.
"""

import datetime
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax

from launcher.autopar.clusters.cluster import cluster_at_hand, load_cluster
from launcher.autopar.clusters.hosts import Cluster
from launcher.autopar.make_plan import Planned
from launcher.autopar.plans.planned_model import describe_model
from launcher.autopar.text.wording import aligned, count, percent, seconds
from launcher.bench import gpu_steps
from launcher.bench.gpu_steps import Task, Timed
from launcher.bench.settings import Settings, check_keys, chosen, whole_number
from launcher.errors import ClusterError
from launcher.limits import CHOICES
from launcher.models.model import Model
from launcher.outputs import make_meter
from launcher.runtime import devices
from launcher.runtime.records.metrics import Meter

_KEYS = (
    "models", "steps", "batch", "seq_len", "peers", "attention", "loss_chunks", "recompute",
    "microbatches", "profile",
)  # fmt: skip
_SIZES, _WITHOUT_GPU = ("tiny", "350m", "1.3b"), "tiny"
_PEERS = ("plain", "torch")
_RECOMPUTE = ("none", "layer", "full")
_LOSS_CHUNKS = ("1", "2", "4", "8", "16")
LEAST_MFU = {("1.3b", 2048): 0.5}


def run(settings: Mapping[str, str]) -> int:
    """Print a table per model; status 1 if a known GPU misses a bar."""
    check_keys("gpu", settings, _KEYS)
    tasks = _tasks({"models": "350m,1.3b", **settings})
    peers = chosen(settings, "peers", _PEERS)
    recompute = chosen(settings, "recompute", _RECOMPUTE)
    chunks = chosen({"loss_chunks": "1,8", **settings}, "loss_chunks", _LOSS_CHUNKS)
    microbatches = whole_number(settings, "microbatches", 1) if "microbatches" in settings else None
    # First, while JAX leaves the GPU's memory alone.
    torch_times = {task.size: gpu_steps.time_torch(task) for task in tasks if "torch" in peers}
    cluster = local_cluster(tasks)
    _say(headline(cluster))
    missed = 0
    for task in tasks:
        variants = [gpu_steps.build_model(task, cluster, int(number)) for number in chunks]
        model, planned = gpu_steps.best_plan(variants, cluster, task.batch, recompute, microbatches)
        _say("", description(task, model, planned))
        grid = devices.acquire(cluster, emulated=not cluster.device.accelerator)
        folder = Path(settings["profile"]) / task.size if "profile" in settings else None
        times = [gpu_steps.time_plan(planned, model, grid, task.steps, folder)]
        times += [gpu_steps.time_plain(planned, model, task.steps)] if "plain" in peers else []
        times += [torch_times[task.size]] if "torch" in peers else []
        meter = make_meter(planned, model, cluster, emulated=not cluster.device.accelerator)
        _say(*table(meter, times))
        passed, verdict = judged(task, meter.speed(times[0].step_s)["mfu"])
        _say(verdict)
        missed += not passed
    return int(missed > 0)


def _tasks(settings: Settings) -> list[Task]:
    numbers = {
        key: whole_number(settings, key, default)
        for key, default in (("batch", 8), ("seq_len", 2048), ("steps", 20))
    }
    attention = settings.get("attention", "auto")
    chosen({"attention": attention}, "attention", CHOICES["model.attention"])
    sizes = chosen(settings, "models", _SIZES)
    return [Task(size=size, attention=attention, **numbers) for size in sizes]


def local_cluster(tasks: Sequence[Task]) -> Cluster:
    """The devices at hand, as `cluster=local` finds them."""
    found = devices.discover(load_cluster("cpu8").num_devices)
    large_ones = [task.size for task in tasks if task.size != _WITHOUT_GPU]
    if large_ones and not found.count:
        raise ClusterError(
            f"models={large_ones[0]} needs 1 GPU, and this machine has 0 ({found.kind}): run it where "
            f"there is one, with jax[cuda12], or take models={_WITHOUT_GPU}"
        )
    return cluster_at_hand(found.kind, found.count, found.memory_bytes)


def headline(cluster: Cluster) -> str:
    """When and on what."""
    day = datetime.date.today().isoformat()
    used = f"1 of {count(cluster.num_devices, 'device')}, {jax.devices()[0].device_kind}"
    lines = [f"{day}, {used}, jax {jax.__version__}"]
    if not cluster.device.accelerator:
        lines.append("this is no GPU: the times say nothing of one, and there is no MFU")
    return "\n".join(lines)


def description(task: Task, model: Model, planned: Planned) -> str:
    """The model, and what was planned."""
    plan = planned.plan
    return (
        f"{describe_model(model)}; {task.batch} x {task.seq_len} tokens in "
        f"{count(plan.num_microbatches, 'microbatch')}, recomputation "
        f"{plan.stages[0].recompute}, predicted {seconds(plan.predicted.step_s)}"
    )


def table(meter: Meter, times: Sequence[Timed]) -> Iterator[str]:
    """A row for each who was timed, ours first; the others with how many times faster we are."""
    rows = [("", "step", "tokens/s", "TFLOP/s", "MFU", "launcher is")]
    for timed in times:
        if timed.step_s is not None:
            speed, faster = meter.speed(timed.step_s), timed.step_s / times[0].step_s
            rows.append(
                (
                    timed.who,
                    seconds(timed.step_s),
                    f"{speed[meter.throughput_key]:,.0f}",
                    f"{speed['tflops_per_device']:.3g}",
                    "unknown" if speed["mfu"] is None else percent(speed["mfu"]),
                    "" if timed is times[0] else f"{faster:.2f} x as fast",
                )
            )
    yield from aligned(rows, right=range(1, 6))
    yield from (f"{timed.who} left out: {timed.left_out}" for timed in times if timed.left_out)


def judged(task: Task, mfu: float | None) -> tuple[bool, str]:
    """Whether the bar for the model is kept, where it has one and the peak of the device is known."""
    bar = LEAST_MFU.get((task.size, task.seq_len))
    if bar is None:
        return True, f"no bar for {task.size} at sequence {task.seq_len}"
    if mfu is None:
        return True, f"bar {percent(bar)}: not judged, the peak of this device is not known"
    return (
        mfu >= bar,
        f"MFU {percent(mfu)} (bar {percent(bar)}: {'kept' if mfu >= bar else 'missed'})",
    )


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
