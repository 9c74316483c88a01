"""Runs of one plan in one process and over several, and what is compared of them."""

import json
import pathlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import host_run
import numpy as np
import pytest

from launcher import main
from launcher.autopar.clusters.cluster import cluster_from_config
from launcher.cli.compose import load
from launcher.runtime.checkpoints.checkpoint_store import Checkpoint, read_checkpoint
from launcher.runtime.hosts.host_contract import HostTask

SMALL = (
    "logger=jsonl", "cluster=cpu8", "cluster.devices_per_host=2", "runtime=emulate", "data=synthetic",
    "model.dtype=fp64", "train.steps=4", "train.eval_every=2", "train.eval_batches=2",
    "train.global_batch=8", "checkpoint.every_steps=2", "checkpoint.keep=9", "optimizer.clip_norm=0.1",
)  # fmt: skip
_SMALL_DECODER = (
    "model.layers=2", "model.hidden=16", "model.heads=2", "model.seq_len=8", "model.vocab_size=32",
    "model.dropout=0.1",
)  # fmt: skip
NUMBERS = ("loss", "grad_norm", "eval_loss", "learning_rate")
# Within which losses and parameters of the same plan agree, in double precision.
BOUND = 1e-9


def plan_text(stages: Sequence[dict], hosts: int, devices: int, **fields) -> str:
    """A plan as a person writes it; stages have layers, hosts, devices and mesh."""
    given = {
        "version": 1, "model": {"name": "gpt", "size": "tiny"}, "global_batch": 8,
        "cluster": {"name": "cpu8", "hosts": hosts, "devices_per_host": devices},
        "num_microbatches": 4, "schedule": "1f1b", "stages": list(stages),
    }  # fmt: skip
    return json.dumps(given | fields)


@dataclass(frozen=True)
class Case:
    """One plan, in a folder of its own, and the runs of it."""

    folder: pathlib.Path
    overrides: tuple[str, ...]

    def config(self, *more: str):
        decoder = () if "model=wrn" in self.overrides else _SMALL_DECODER
        return load([*SMALL, *decoder, *self.overrides, *more])

    def in_one_process(self, name: str, *more: str) -> pathlib.Path:
        """Run it here; gives the run's folder."""
        run_dir = self.folder / name
        run_dir.mkdir(exist_ok=True)
        assert main.run(self.config(*more), run_dir) == 0
        return run_dir

    def start_hosts(self, name: str, plan: pathlib.Path, *more: str, **fields) -> host_run.Hosts:
        """Start the processes of a run of the plan in a run's folder."""
        run_dir, config = self.folder / name, self.config(*more)
        run_dir.mkdir(exist_ok=True)
        cluster, text = cluster_from_config(config.cluster), (plan / "plan.json").read_text()

        def task(host: int) -> HostTask:
            return HostTask(
                config=config, run_dir=run_dir, plan_text=text, cluster=cluster, host=host,
                num_hosts=cluster.num_hosts, emulated=True, **fields,
            )  # fmt: skip

        return host_run.start_hosts(task, self.folder)

    def over_hosts(self, name: str, plan: pathlib.Path, *more: str) -> pathlib.Path:
        """Run it over hosts to the end, and leave its rows as one process does."""
        with self.start_hosts(name, plan, *more) as hosts:
            hosts.prepare()
            hosts.train()
            rows = hosts.rows()
        run_dir = self.folder / name
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run_dir / "metrics.jsonl").write_text(text)
        return run_dir

    def copy_checkpoint(self, source: pathlib.Path, step: int, name: str) -> None:
        """Let a run that has not been begun go on from a checkpoint of another."""
        there = self.folder / name / "checkpoints"
        there.mkdir(parents=True)
        shutil.copytree(checkpoint_of(source, step), there / checkpoint_of(source, step).name)


def checkpoint_of(run_dir: pathlib.Path, step: int) -> pathlib.Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def rows_of(run_dir: pathlib.Path, after: int = 0) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: row[key] for key in ("step", *NUMBERS) if key in row}
        for row in rows
        if row["step"] > after
    ]


def compare_rows(one: pathlib.Path, other: pathlib.Path, after: int = 0) -> None:
    wanted, found = rows_of(one, after), rows_of(other, after)
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for row, expected in zip(found, wanted, strict=True):
        assert row == pytest.approx(expected, rel=BOUND, abs=0)


def compare_checkpoints(one: pathlib.Path, other: pathlib.Path, step: int) -> None:
    wanted, found = (read_checkpoint(checkpoint_of(run, step)) for run in (one, other))
    assert found.arrays.keys() == wanted.arrays.keys()
    assert found.manifest.samples == wanted.manifest.samples
    for name, array in wanted.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        largest = np.abs(array).max(initial=0.0)
        assert np.abs(found.arrays[name] - array).max(initial=0.0) <= BOUND * largest, name


def checkpoint_at(run_dir: pathlib.Path, step: int) -> Checkpoint:
    return read_checkpoint(checkpoint_of(run_dir, step))
