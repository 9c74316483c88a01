"""The W&B sink: what it sends, when it is offline, and that none of W&B's failures gets out."""

import dataclasses
import json
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.runtime.records.metrics import Meter, PlanMetrics, TrainSummary
from launcher.runtime.records.wandb_sink import WandbRun, WandbSink

METER = Meter(
    model_flops_per_step=1e9,
    num_devices=2,
    peak_flops_per_s=None,
    global_batch=8,
    units_per_sample=4,
    sample_unit="tokens",
    predicted_step_s=0.25,
)
SUMMARY = TrainSummary(
    status="done",
    steps=2,
    planned_steps=2,
    loss=1.5,
    best_loss=1.25,
    eval_loss=None,
    wall_s=2.0,
    measured={**METER.speed(0.5), "peak_bytes_per_device": 7},
    timed_steps=38,
    predicted_step_s=0.25,
)
LOGGER = "launcher.runtime.records.wandb_sink"


class FakeWandb:
    """Stands for the module and its run; raises in the calls named in `broken`."""

    def __init__(self, broken: tuple[str, ...] = ()) -> None:
        self.broken = broken
        self.inits = []
        self.rows = []
        self.metrics = []
        self.summary_row = {}
        self.exit_code = None
        self.offline = True
        self.disabled = os.environ.get("WANDB_MODE") == "disabled"
        self.url = "https://wandb.example/run"
        self.id = "abc123"
        self.summary = SimpleNamespace(update=self._update)

    def init(self, **kwargs):
        self.inits.append(kwargs)
        self._break("init")
        self._break(f"init {kwargs['mode']}")
        self.offline = kwargs["mode"] == "offline"
        return self

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, row):
        self._break("log")
        self.rows.append(row)

    def finish(self, exit_code):
        self._break("finish")
        self.exit_code = exit_code

    def _update(self, row):
        # The plan's numbers come first; the second update is that of the end.
        self._break("second update" if self.summary_row else "update")
        self.summary_row |= row

    def _break(self, what):
        if what in self.broken:
            raise ConnectionError(f"{what} is broken\nand a page of advice")


@pytest.fixture(autouse=True)
def logged_out(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def make_run(tmp_path: Path) -> WandbRun:
    return WandbRun(
        run_dir=tmp_path,
        config={"seed": 0, "model": {"name": "gpt"}},
        plan=PlanMetrics(
            step_s=0.25,
            bubble_fraction=0.1,
            peak_bytes_per_device=(5.0, 6.0),
            communicated_bytes=100.0,
            tflops_per_device=0.1,
            solver_s=2.0,
        ),
        project="launcher",
        entity=None,
        group="sweep",
        tags=("a", "b"),
    )


def train(monkeypatch, tmp_path, wandb) -> None:
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    sink = WandbSink(make_run(tmp_path))
    sink.write({"step": 1, "loss": 2.0, "mfu": None})
    sink.write({"step": 2, "loss": 1.5, "mfu": None})
    sink.finish(SUMMARY)


def test_rows_and_both_halves_of_the_summary_arrive(monkeypatch, tmp_path):
    wandb = FakeWandb()
    train(monkeypatch, tmp_path, wandb)
    (init,) = wandb.inits
    assert (init["dir"], init["mode"], init["project"]) == (str(tmp_path), "offline", "launcher")
    assert (init["entity"], init["group"], init["tags"]) == (None, "sweep", ["a", "b"])
    assert init["config"] == {"seed": 0, "model": {"name": "gpt"}}
    assert wandb.rows == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    assert wandb.metrics == [("step", None), ("*", "step")]
    assert (wandb.summary_row["predicted_step_s"], wandb.summary_row["measured_step_s"]) == (
        0.25,
        0.5,
    )
    for name in ("predicted_bubble_fraction", "predicted_communicated_bytes", "solver_s"):
        assert name in wandb.summary_row
    assert wandb.summary_row["predicted_peak_bytes_per_stage"] == (5.0, 6.0)
    assert wandb.exit_code == 0


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ("init", "could not start"),
        ("update", "could not start"),
        ("log", "could not log"),
        ("second update", "could not finish"),
        ("finish", "could not finish"),
    ],
)
def test_each_failure_is_one_warning_and_training_goes_on(
    monkeypatch, tmp_path, caplog, broken, what
):
    with caplog.at_level(logging.WARNING, LOGGER):
        train(monkeypatch, tmp_path, FakeWandb(broken=(broken,)))
    (record,) = caplog.records
    text = record.getMessage()
    assert f"W&B {what} (ConnectionError: {broken} is broken): training goes on" in text
    assert "logger=jsonl" in text
    assert "\n" not in text


def test_a_resumed_run_goes_on_under_its_id(monkeypatch, tmp_path):
    first, second, other = FakeWandb(), FakeWandb(), FakeWandb()
    train(monkeypatch, tmp_path, first)
    assert "id" not in first.inits[0]
    assert (tmp_path / "wandb" / "run-id.txt").read_text() == "abc123\n"
    for wandb, resumes in ((second, True), (other, False)):
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        WandbSink(dataclasses.replace(make_run(tmp_path), resumes=resumes)).finish(SUMMARY)
    assert (second.inits[0]["id"], second.inits[0]["resume"]) == ("abc123", "allow")
    assert "id" not in other.inits[0]


def test_a_resumed_run_without_an_earlier_one_is_new(monkeypatch, tmp_path, caplog):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "wandb").write_text("")  # no folder: the id cannot be noted
    WandbSink(dataclasses.replace(make_run(tmp_path), resumes=True)).finish(SUMMARY)
    assert "id" not in wandb.inits[0]
    assert "a resumed run will be a new one" in caplog.text


def test_without_wandb_training_goes_on(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "key")
    train(monkeypatch, tmp_path, None)
    (record,) = caplog.records
    assert "W&B could not be imported (ModuleNotFoundError" in record.getMessage()


def test_logged_in_by_the_environment_is_online(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "key")
    wandb = FakeWandb()
    with caplog.at_level(logging.INFO, LOGGER):
        train(monkeypatch, tmp_path, wandb)
    assert [init["mode"] for init in wandb.inits] == ["online"]
    assert "W&B run: https://wandb.example/run" in caplog.text


@pytest.mark.parametrize(
    ("host", "server", "mode"),
    [
        ("api.wandb.ai", None, "online"),
        ("github.com", None, "offline"),
        ("wandb.company.example", "https://wandb.company.example/", "online"),
        ("api.wandb.ai", "https://wandb.company.example/", "offline"),
    ],
)
def test_logged_in_by_netrc(monkeypatch, tmp_path, host, server, mode):
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password key\n")
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    wandb = FakeWandb()
    train(monkeypatch, tmp_path, wandb)
    assert [init["mode"] for init in wandb.inits] == [mode]


def test_a_netrc_that_cannot_be_read_is_no_login(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine\n")
    wandb = FakeWandb()
    train(monkeypatch, tmp_path, wandb)
    assert [init["mode"] for init in wandb.inits] == ["offline"]


def test_wandb_that_is_disabled_says_so_and_leaves_no_folder(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb = FakeWandb()
    with caplog.at_level(logging.INFO, LOGGER):
        train(monkeypatch, tmp_path, wandb)
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == ["W&B is off"]
    assert not wandb.rows
    assert not (tmp_path / "wandb").exists()


def test_the_real_wandb_knows_that_it_is_disabled(tmp_path):
    pytest.importorskip("wandb")
    result = subprocess.run(
        [sys.executable, "-c", REAL_RUN, str(tmp_path)],
        env=os.environ
        | {
            "WANDB_MODE": "disabled",
            "HOME": str(tmp_path),
            "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *sys.path)),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "INFO W&B is off (WANDB_MODE=disabled, or `wandb disabled`)\n"
    assert not (tmp_path / "wandb").exists()


def test_wandb_mode_is_left_to_wandb(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "shared")
    monkeypatch.setenv("WANDB_API_KEY", "key")
    wandb = FakeWandb()
    train(monkeypatch, tmp_path, wandb)
    assert [init["mode"] for init in wandb.inits] == [None]


def test_logged_in_without_a_network_logs_offline(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "key")
    wandb = FakeWandb(broken=("init online",))
    with caplog.at_level(logging.WARNING, LOGGER):
        train(monkeypatch, tmp_path, wandb)
    assert [init["mode"] for init in wandb.inits] == ["online", "offline"]
    assert len(wandb.rows) == 2
    (record,) = caplog.records
    assert "logging offline instead" in record.getMessage()


@pytest.mark.parametrize(("status", "exit_code"), [("failed", 1), ("interrupted", 0)])
def test_a_failed_run_is_marked_as_such(monkeypatch, tmp_path, status, exit_code):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    WandbSink(make_run(tmp_path)).finish(dataclasses.replace(SUMMARY, status=status))
    assert wandb.exit_code == exit_code


REAL_RUN = """
import logging, sys
from pathlib import Path
from test_wandb_sink import SUMMARY, make_run
from launcher.runtime.records.wandb_sink import WandbSink
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
sink = WandbSink(make_run(Path(sys.argv[1])))
sink.write({"step": 1, "loss": 2.0, "mfu": None})
sink.write({"step": 1, "eval_loss": 2.5})
sink.write({"step": 2, "loss": 3.0, "mfu": None})
sink.rewind(1)
sink.write({"step": 2, "loss": 1.5, "mfu": None})
sink.finish(SUMMARY)
"""


def records(data: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format, which W&B's files have behind 7 bytes of their own."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is filled up
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def history(run_file: Path) -> list[dict]:
    """The rows of an offline run, as W&B will upload them."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for data in records(run_file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = record.history.item if record.HasField("history") else []
        names = [(item.key or item.nested_key[0], json.loads(item.value_json)) for item in items]
        row = {name: value for name, value in names if not name.startswith("_")}
        rows += [row] if row else []
    return rows


def test_the_real_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    # A process of its own: wandb starts a service and hooks that would outlive the test.
    environment = {name: value for name, value in os.environ.items() if "WANDB" not in name}
    result = subprocess.run(
        [sys.executable, "-c", REAL_RUN, str(tmp_path)],
        env=environment
        | {
            "HOME": str(tmp_path),
            "NETRC": str(tmp_path / "netrc"),
            "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *sys.path)),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stdout, result.stdout
    assert "W&B logs offline" in result.stdout
    (run_file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert history(run_file) == [
        {"step": 1, "loss": 2.0},
        {"step": 1, "eval_loss": 2.5},
        {"step": 2, "loss": 3.0},
        {"step": 2, "loss": 1.5},  # of a run that went back
    ]
    data = run_file.read_bytes()
    for name in (b"eval_loss", b"predicted_step_s", b"measured_step_s", b"solver_s"):
        assert name in data
