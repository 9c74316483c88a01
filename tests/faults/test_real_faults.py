"""What storage, data and numbers do to a run, through the real command and without stand-ins."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

import numpy as np
import pytest
from process_run import PATIENCE_S, Run

from launcher.data.tokens import write_tokens

# Smaller than that of the other runs: what is computed does not matter here.
QUICK = ("train.eval_batches=0", "train.global_batch=8", "logger=jsonl")
ONE_DEVICE = ("parallel=single",)
TWO_HOSTS = (
    "parallel=data", "runtime=ray", "cluster=cpu8", "cluster.hosts=2", "cluster.devices_per_host=1",
)  # fmt: skip
GPT = ("model.layers=1", "model.hidden=32", "model.heads=2", "model.seq_len=32")


def start(folder: pathlib.Path, *more: str) -> subprocess.Popen:
    """A run in `run/` below the folder."""
    with (folder / "output").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "launcher", "hydra.run.dir=run", *QUICK, *more],
            cwd=folder, stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": f"{pathlib.Path(__file__).parents[2]}:{folder}"},
        )  # fmt: skip


def test_a_token_file_that_is_cut_short_under_a_run(tmp_path):
    ids = np.random.default_rng(0).integers(0, 256, 100_000)
    write_tokens(tmp_path / "ids.tokens", (ids,), 256)
    whole = (tmp_path / "ids.tokens").read_bytes()
    given = (
        *ONE_DEVICE,
        *GPT,
        "data=tokens",
        "data.path=ids.tokens",
        "checkpoint.every_steps=5",
        "train.steps=2000",
    )
    process, run = start(tmp_path, *given), Run(tmp_path / "run")
    while len(run.rows()) < 10:
        assert process.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.01)
    os.truncate(tmp_path / "ids.tokens", 64)
    assert process.wait(PATIENCE_S) == 6
    said = (tmp_path / "output").read_text()
    assert "ids.tokens was cut short while it was read: it has 64 bytes" in said
    assert "Traceback" not in said
    assert run.summary()["status"] == "failed"
    assert json.loads((run.folder / "state.json").read_text())["exit_status"] == 6
    (tmp_path / "ids.tokens").write_bytes(whole)
    done = run.summary()["steps"]
    assert start(tmp_path, *given[:-1], f"train.steps={done + 5}").wait(PATIENCE_S) == 0
    assert [row["step"] for row in run.rows()] == list(range(1, done + 6))


MODEL = """
import jax
import jax.numpy as jnp
from flax import nnx

class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(256, 16, rngs=rngs)

    def loss(self, batch):
        tokens = batch["tokens"]
        bad = jnp.where(tokens == 255, jnp.nan, 1.0)
        x = self.embed(tokens) * bad[:, :, None]
        return jnp.mean((x - 1.0) ** 2), {}

    def example_batch(self, batch_size):
        return {"tokens": jax.ShapeDtypeStruct((batch_size, 32), jnp.int32)}

def build(rngs):
    return Net(rngs)
"""


@pytest.mark.parametrize(
    "where",
    [ONE_DEVICE, pytest.param(TWO_HOSTS, marks=[pytest.mark.ray, pytest.mark.slow])],
    ids=["one device", "two hosts"],
)
def test_a_batch_that_yields_no_number_is_gone_back_from(tmp_path, where):
    (tmp_path / "spoiled.py").write_text(MODEL)
    ids = np.random.default_rng(0).integers(0, 255, 32 * 1000)
    ids[32 * 500 + 7] = 255  # in one window, so in one batch of an epoch of about 118
    write_tokens(tmp_path / "ids.tokens", (ids,), 256)
    process = start(
        tmp_path, *where, "model=custom", "model.target=spoiled:build", "data=tokens", "data.path=ids.tokens",
        "train.steps=110", "train.nonfinite_steps=0", "checkpoint.every_steps=4",
    )  # fmt: skip
    said, run = (tmp_path / "output"), Run(tmp_path / "run")
    assert process.wait(PATIENCE_S) == 0, said.read_text()
    told = re.search(r"going back to step (\d+), and on without batches (\d+)\n", said.read_text())
    step, batch = int(told[1]), int(told[2])
    assert step % 4 == 0
    assert step <= batch < step + 4  # the batches before were none to leave out
    assert said.read_text().count("going back") == 1
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, 111))
    assert None not in [row["loss"] for row in rows]
    assert (run.summary()["status"], run.summary()["skipped_steps"]) == ("done", 0)
    assert run.summary()["goodput_lost_s"] > 0


def in_a_namespace(folder: pathlib.Path, script: str) -> subprocess.CompletedProcess:
    """Run a script of the shell that may mount what nobody else sees; `$RUN` is the launcher."""
    own = ["unshare", "--mount", "--propagation", "private"]
    try:
        tried = subprocess.run(
            [*own, "mount", "-t", "tmpfs", "none", str(folder)], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if tried.returncode:
        pytest.skip(f"a file system cannot be mounted here: {tried.stderr.strip()}")
    command = (
        sys.executable,
        "-m",
        "launcher",
        "hydra.run.dir=run",
        *QUICK,
        *ONE_DEVICE,
        *GPT,
        "train.steps=20",
    )
    return subprocess.run(
        [*own, "sh", "-ec", script],
        cwd=folder,
        env=os.environ
        | {
            "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
            "RUN": shlex.join((*command, "checkpoint.every_steps=5", "checkpoint.dir=small")),
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


FULL = """
mkdir small; mount -t tmpfs -o size=560k none small
$RUN || echo ended with $?
ls small
mount -o remount,size=100m small
$RUN
"""


def test_a_disk_that_is_full(tmp_path):
    done = in_a_namespace(tmp_path, FULL)
    assert done.returncode == 0, done.stderr
    assert "ended with 6" in done.stdout
    # One checkpoint has room, and no second one beside it.
    assert re.search(r"\nstep-00000005\n(?!step)", done.stdout)
    (line,) = done.stderr.splitlines()
    assert re.search(r"cannot write .*small.*No space left on device.* free", line), line
    assert "going on after step 5" in done.stdout
    assert [row["step"] for row in Run(tmp_path / "run").rows()] == list(range(1, 21))


READ_ONLY = """
mkdir small; mount -t tmpfs none small; mount -o remount,ro small
$RUN || echo ended with $?
"""


def test_a_folder_that_cannot_be_written(tmp_path):
    done = in_a_namespace(tmp_path, READ_ONLY)
    assert "ended with 6" in done.stdout
    (line,) = done.stderr.splitlines()
    assert re.search(r"small.*Read-only file system", line), line
