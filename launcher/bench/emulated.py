"""`python -m launcher.bench emulated`: predicted beside measured step times, on emulated devices.

The devices are profiled as by `mode=profile`, or `cluster=FILE` gives what a profile wrote. Plans of the tiny
models are made and priced for them, and run by the executor of a real run, a few steps of every plan in turn,
so that what else the machine does hits all of them. Of a plan's step times the lower quartile counts, as in
the profile. The table ends with the rank correlation (Spearman's) and the median error; status 1 if one
misses its bar.

    cluster   a cluster file of emulated devices; default: profile them now
    plans     which, as in gpt-data,moe-data; default: all
    rounds    how often every plan has its turn; default: 6
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import optax

from launcher import models
from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.clusters.hosts import Cluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import find_plan
from launcher.bench.settings import check_keys, chosen, whole_number
from launcher.config import GptConfig, ModelConfig, MoeConfig, WrnConfig
from launcher.models.optimizer import Optimizer
from launcher.runtime import devices
from launcher.runtime.profiling import profile
from launcher.runtime.profiling.profile_timing import lower_quartile
from launcher.runtime.steps.local_executor import LocalExecutor

LEAST_CORRELATION, LARGEST_ERROR = 0.9, 0.15
_STEPS = 4  # of a plan's turn, after one that brings its data back into the caches
_BATCH = 32
_MODELS: Mapping[str, ModelConfig] = {
    "gpt": GptConfig(size="tiny", dtype="fp32"),
    "moe": MoeConfig(size="tiny", dtype="fp32"),
    "wrn": WrnConfig(size="tiny", dtype="fp32"),
}
_ONE = {"tp": 1, "pp": 1, "num_microbatches": 1}
_TWO_STAGES = {"tp": 1, "pp": 2, "num_microbatches": 4}
# Without `hosts` a plan has all devices. WRN has no plan on 8 in one stage: its many collectives may
# overtake one another on the CPU backend, which then waits for ever.
PLANS: Mapping[str, Mapping] = {
    "gpt-single": {"mode": "single", "num_microbatches": 2},
    "gpt-data": _ONE,
    "gpt-zero-2": {**_ONE, "num_microbatches": 2, "zero": 2},
    "gpt-tensor": {**_ONE, "tp": 4, "hosts": 1},
    "gpt-mixed": {**_ONE, "tp": 4, "num_microbatches": 2},
    "gpt-layer": {**_ONE, "num_microbatches": 2, "recompute": "layer"},
    "gpt-1f1b": _TWO_STAGES,
    "gpt-gpipe": {**_TWO_STAGES, "pp": 4, "schedule": "gpipe"},
    "gpt-zb-h1": {**_TWO_STAGES, "tp": 2, "schedule": "zb_h1", "hosts": 1},
    "moe-single": {"mode": "single", "num_microbatches": 2},
    "moe-data": _ONE,
    "moe-mixed": {**_ONE, "tp": 4, "num_microbatches": 2},
    "moe-1f1b": _TWO_STAGES,
    "wrn-single": {"mode": "single", "num_microbatches": 2},
    "wrn-data": {**_ONE, "hosts": 1},
    "wrn-1f1b": _TWO_STAGES,
}


class PlannedRun:
    """A plan, ready to run; `predicted_s` is what the planner promises."""

    def __init__(self, name: str, cluster: Cluster):
        wanted = dict(PLANS[name])
        cluster = cluster.replace(hosts=wanted.pop("hosts", cluster.num_hosts))
        model = models.build(_MODELS[name.split("-")[0]])
        transform = optax.adamw(1e-3)
        options = {"mode": "manual", "global_batch": _BATCH, "optimizer": transform, **wanted}
        planned = find_plan(model, cluster, PlanOptions(**options), lambda text: None)
        self.predicted_s = planned.plan.predicted.step_s
        self.took_s: list[float] = []
        optimizer = Optimizer(transform=transform, clip_norm=1.0, schedule=lambda step: 1e-3)
        grid = devices.acquire(cluster, emulated=True)
        self._executor = LocalExecutor(planned.realized, model, optimizer, grid, seed=0)
        batch = model.example_batch(_BATCH)
        ones = {key: np.ones(leaf.shape, leaf.dtype) for key, leaf in batch.items()}
        self._placed = self._executor.place(ones, 0)
        self._step()

    @property
    def measured_s(self) -> float:
        return lower_quartile(self.took_s)

    def take_turn(self) -> None:
        self._step()
        self.took_s += [self._step() for _ in range(_STEPS)]

    def _step(self) -> float:
        began_s = time.perf_counter()
        self._executor.step(self._placed)
        self._executor.wait()
        return time.perf_counter() - began_s


def run(settings: Mapping[str, str]) -> int:
    """Print a row per plan."""
    check_keys("emulated", settings, ["cluster", "plans", "rounds"])
    names, rounds = chosen(settings, "plans", PLANS), whole_number(settings, "rounds", 6)
    start = load_cluster(settings.get("cluster", "cpu8"))
    devices.emulate(start.num_devices)
    cluster = start if "cluster" in settings else profiled(start)
    runs = {}
    for name in names:
        _say(f"planning and compiling {name}")
        runs[name] = PlannedRun(name, cluster)
    for number in range(rounds):
        _say(f"round {number + 1} of {rounds}, load {os.getloadavg()[0]:.1f}")
        for planned in runs.values():
            planned.take_turn()
    sys.stdout.write("\n".join(report({n: (r.predicted_s, r.measured_s) for n, r in runs.items()})))
    sys.stdout.write("\n")
    return int(not passes([(r.predicted_s, r.measured_s) for r in runs.values()]))


def profiled(cluster: Cluster) -> Cluster:
    """What a profile of this machine says, by way of the file that it writes."""
    grid = np.array(jax.devices(), dtype=object).reshape(cluster.num_hosts, -1)
    measured = profile.measure(cluster, grid, lambda what: _say(f"measuring {what}"))
    with tempfile.TemporaryDirectory() as folder:
        contents = profile.as_file(cluster, measured, "profiled")
        return load_cluster(profile.write_cluster(Path(folder), "profiled", contents))


def report(times: Mapping[str, tuple[float, float]]) -> Iterator[str]:
    """The table, and the two figures that count; times are (predicted, measured)."""
    yield f"{'plan':<14}{'predicted':>14}{'measured':>14}{'ratio':>8}"
    for name, (predicted_s, measured_s) in times.items():
        ratio = predicted_s / measured_s
        yield f"{name:<14}{1e3 * predicted_s:>11.1f} ms{1e3 * measured_s:>11.1f} ms{ratio:>8.2f}"
    pairs = list(times.values())
    yield (
        f"rank correlation {rank_correlation(pairs):.3f} (bar {LEAST_CORRELATION}), "
        f"median error {median_error(pairs):.1%} (bar {LARGEST_ERROR:.0%}), {len(pairs)} plans"
    )


def passes(pairs: Sequence[tuple[float, float]]) -> bool:
    return rank_correlation(pairs) >= LEAST_CORRELATION and median_error(pairs) <= LARGEST_ERROR


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's: the correlation of the ranks."""
    predicted, measured = (np.argsort(np.argsort(times)) for times in zip(*pairs, strict=True))
    return float(np.corrcoef(predicted, measured)[0, 1])


def median_error(pairs: Sequence[tuple[float, float]]) -> float:
    return statistics.median(abs(predicted / measured - 1) for predicted, measured in pairs)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
