"""Training on hosts of several kinds, which CPU devices stand for."""

import json

import jax
import numpy as np
import optax
import pytest
from batches import draw_batch
from machines import ragged

from launcher import main
from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import find_plan
from launcher.cli.compose import load
from launcher.config import GptConfig
from launcher.errors import ClusterError, ConfigError
from launcher.models import build
from launcher.models.optimizer import Optimizer
from launcher.runtime import devices
from launcher.runtime.steps.local_executor import LocalExecutor

BATCH = 8
TWO_KINDS = (
    "cluster.groups=[{cluster: 1xp3, devices_per_host: 4}, "
    "{cluster: dgx-a100, devices_per_host: 2, hosts: 2}]"
)


def executor_on(machine, **options) -> LocalExecutor:
    model = build(GptConfig(size="tiny", dtype="fp32", layers=2))
    asked = PlanOptions(global_batch=BATCH, num_microbatches=2, **options)
    realized = find_plan(model, machine, asked, lambda text: None).realized
    optimizer = Optimizer(transform=optax.adamw(1e-3), clip_norm=1.0, schedule=lambda step: 1e-3)
    grid = devices.acquire(machine, emulated=True)
    return LocalExecutor(realized, model, optimizer, grid, seed=0)


def test_hosts_with_fewer_devices_have_gaps_in_the_grid():
    grid = devices.acquire(ragged(), emulated=True)
    assert grid.shape == (3, 4)
    present = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
    assert [device is not None for device in grid.flat] == present.flatten().tolist()
    assert grid[present].tolist() == jax.devices()[:8]


def test_two_kinds_train_as_one_device_does():
    here, alone = executor_on(ragged(), mode="manual", pp=2), executor_on(ragged(), mode="single")
    assert {stage.hosts for stage in here.plan.stages} == {(0, 1), (2,)}
    for step in range(2):
        batch = draw_batch(here.model, BATCH, seed=step)
        ours, wanted = (run.step(run.place(batch, step)) for run in (here, alone))
        assert float(ours.loss) == pytest.approx(float(wanted.loss), rel=1e-5)
        assert float(ours.grad_norm) == pytest.approx(float(wanted.grad_norm), rel=1e-3)


def test_a_run_on_devices_that_stand_for_two_kinds(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(main.devices, "emulate", lambda num_devices: None)  # the tests have done so
    caplog.set_level("INFO", "launcher")
    given = [
        "cluster=v100-a100", TWO_KINDS, "runtime=emulate", "model.size=tiny", "logger=jsonl",
        "train.steps=2", "train.eval_batches=0", "parallel.num_microbatches=2",
        "parallel=manual", "parallel.pp=2", "model.layers=2",
    ]  # fmt: skip
    assert main.run(load(given), tmp_path) == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    written = json.loads((tmp_path / "plan.json").read_text())
    assert [group["hosts"] for group in written["cluster"]["groups"]] == [1, 2]
    for stage in written["stages"]:
        assert set(stage["hosts"]) <= {0} or set(stage["hosts"]) <= {1, 2}
    assert "CPU devices stand for V100-SXM2-16GB and A100-SXM4-80GB" in caplog.text
    assert "A100-SXM4-80GB" in (tmp_path / "plan.html").read_text()


def test_devices_that_are_not_here_are_named_by_kind(tmp_path):
    with pytest.raises(ClusterError, match=r"needs 2 x 8 V100.* and 1 x 8 A100.* \(24 devices\)"):
        devices.acquire(load_cluster("v100-a100"), emulated=False)
    with pytest.raises(
        ConfigError, match=r"mode=profile measures 1 kind .* has 2 \(cluster\.groups"
    ):
        main.run(load(["mode=profile", "cluster=v100-a100", "runtime=local"]), tmp_path)
