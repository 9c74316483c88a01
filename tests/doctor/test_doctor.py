"""The command: its lines, its exit statuses, and that nothing that breaks or hangs stops it."""

import http.server
import io
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from launcher.doctor import machine
from launcher.doctor.__main__ import main, parse
from launcher.doctor.checkup import Check, Checkup
from launcher.doctor.commands import Processes
from launcher.doctor.findings import Status, absent, failed, ok, warning
from launcher.doctor.report import Progress, Report, exit_status, lines
from launcher.doctor.wiring import GROUPS, Surroundings, checks
from launcher.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
FAKE_SMI = """#!/bin/sh
echo "NVIDIA A100-SXM4-40GB, 535.1, 40960, 10"
"""
FAKE_SINFO = """#!/bin/sh
echo "main*|up|2|idle|gpu:8"
echo "main*|up|1|down*|gpu:8"
"""


def check(run, *, group="storage", limit_s=5.0, progress="", status=6) -> Check:
    return Check(group=group, run=run, limit_s=limit_s, progress=progress, exit_status=status)


def found_by(*given: Check):
    return list(Checkup().run(given, lambda text: None))


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only its entry, which waits for its parent."""
    try:
        return ") Z" not in pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launcher.doctor", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_a_check_that_breaks_is_a_line():
    def breaks():
        yield ok("first")
        raise KeyError("second")

    results = found_by(check(breaks), check(lambda: [ok("third")]))
    assert [finding.status for _, finding in results] == [Status.FAILED, Status.OK]
    assert results[0][1].what == "the check of storage broke: KeyError: 'second'"
    assert "test_doctor.py:" in results[0][1].meaning
    assert exit_status(results) == 1


def test_a_system_that_refuses_is_a_line():
    def refused():
        raise FileNotFoundError(2, "No usable temporary directory found")

    results = found_by(check(refused))
    assert "could not begin" in results[0][1].what
    assert "No usable temporary directory found" in results[0][1].what
    assert exit_status(results) == 6


def test_a_check_that_hangs_is_a_line():
    never = threading.Event()
    results = found_by(check(never.wait, limit_s=0.1), check(lambda: [ok("next")]))
    never.set()
    assert "did not end within 0 s" in results[0][1].what
    assert results[1][1].what == "next"


def test_slow_checks_say_what_they_do():
    said = []
    list(Checkup().run([check(lambda: [ok("x")], progress="trying")], said.append))
    assert said == ["trying (at most 5 s)", ""]
    stream = io.StringIO()
    Progress(stream)("trying")
    assert stream.getvalue() == "  ... trying\n"


def test_the_first_failure_decides_the_status():
    bad = failed("what", "meaning", "cure")
    results = found_by(
        check(lambda: [warning("w", "m", "c")], status=2),
        check(lambda: [bad], status=3),
        check(lambda: [bad], status=6),
    )
    assert exit_status(results) == 3
    assert exit_status(results[:1]) == 0


def test_the_report():
    stream = io.StringIO()
    report = Report(stream)
    report.print_all(
        found_by(
            check(lambda: [ok("fine"), failed("full", "no room", "make room")]),
            check(lambda: [absent("no Slurm")], group="slurm"),
        )
    )
    report.print_sum(1.25)
    assert stream.getvalue().splitlines() == [
        "storage",
        "  ok        fine",
        "  failed    full",
        "              means: no room",
        "              to do: make room",
        "slurm",
        "  not here  no Slurm",
        "1 ok, 1 failed, 1 not here; 1.2 s",
    ]
    assert report.exit_status() == 6
    assert lines(ok("fine")) == ["ok        fine"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("folder=/tmp", "folder=/tmp is not understood: give dir=<folder> or only="),
        ("dir", "dir is not understood"),
        ("dir=", "dir= is not understood"),
        ("--help", "--help is not understood"),
        ("dir=/no/such", "dir=/no/such is no folder: make it, or give one that exists"),
        ("dir=~nobody-of-that-name", "cannot be found .*: give dir=<folder>"),
        ("only=disk", "only=disk is no group: choose from installation, devices"),
    ],
)
def test_a_wrong_key_or_value(argument, message, capsys):
    with pytest.raises(ConfigError, match=message):
        parse([argument])
    assert main([argument]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


def test_a_folder_and_groups_that_are_chosen(tmp_path):
    settings = parse([f"dir={tmp_path}", "only=storage,ray"])
    assert settings.folder == tmp_path
    assert settings.groups == ("storage", "ray")


def test_every_group_has_checks_and_every_check_a_group(tmp_path):
    around = Surroundings(environment={}, run=lambda *_: None, folder=tmp_path)
    assert tuple(dict.fromkeys(check.group for check in checks(around))) == GROUPS


def test_a_command_that_hangs_ends_with_what_it_started(tmp_path):
    mark = tmp_path / "pid"
    script = f"sleep 60 & echo $! > {mark}; wait"
    start = time.monotonic()
    outcome = Processes(os.environ).run(("sh", "-c", script), 0.5, {})
    assert outcome.status is None
    assert time.monotonic() - start < 20
    child, limit = int(mark.read_text()), time.monotonic() + 20
    while is_running(child) and time.monotonic() < limit:
        time.sleep(0.05)  # a busy system takes a moment to end what was killed
    assert not is_running(child)


def test_after_the_end_nothing_is_started():
    processes = Processes(os.environ)
    processes.close()
    assert processes.run(("true",), 20, {}) is None


def test_an_interrupted_check_cleans_up():
    cleaned = threading.Event()

    def slow():
        time.sleep(0.3)
        cleaned.set()
        return ()

    checkup = Checkup()
    list(checkup.run([check(slow, limit_s=0.01)], lambda text: None))
    checkup.settle(20)
    assert cleaned.is_set()


def test_commands(tmp_path):
    processes = Processes(os.environ)
    outcome = processes.run(("sh", "-c", "echo $X; echo bad >&2; exit 3"), 20, {"X": "good"})
    assert (outcome.status, outcome.stdout, outcome.last_words) == (3, "good\n", "bad")
    assert processes.run((str(tmp_path / "missing"),), 20, {}) is None
    processes.close()


class NoSuchPage(http.server.BaseHTTPRequestHandler):
    """A server that answers, if only that it has no such page."""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


def test_a_server_that_answers():
    with http.server.HTTPServer(("127.0.0.1", 0), NoSuchPage) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert machine.reach(f"http://127.0.0.1:{server.server_port}", 5.0) is None


def test_servers_that_do_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert machine.connect("127.0.0.1", port, 5.0) is None
        start = time.monotonic()
        assert machine.reach(f"http://127.0.0.1:{port}", 0.2)
        assert time.monotonic() - start < 5
    assert "refused" in machine.reach(f"http://127.0.0.1:{port}", 5.0)
    assert "refused" in machine.connect("127.0.0.1", port, 5.0)
    assert "unknown url type" in machine.reach("no-url", 5.0)


def test_fake_tools_on_the_path(tmp_path):
    tools = {"nvidia-smi": FAKE_SMI, "sinfo": FAKE_SINFO, "sbatch": "", "squeue": ""}
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    slurm = command("only=slurm", PATH=path)
    assert (
        "3 nodes (2 idle, 1 down (not answering)), with gpu:8; 1 of 3 take no jobs" in slurm.stdout
    )
    assert slurm.returncode == 0


@pytest.mark.slow
def test_gpus_that_jax_does_not_see(tmp_path):
    (tmp_path / "nvidia-smi").write_text(FAKE_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JAX_PLATFORMS": ""}
    ended = command("only=devices", **environment)
    assert ended.returncode == 3
    assert "NVIDIA driver 535.1, 1 x NVIDIA A100-SXM4-40GB, 40.0 GiB each" in ended.stdout
    assert "failed    the machine has 1 GPU, and JAX computes on the CPU" in ended.stdout
    assert 'to do: pip install "jax-launcher[cuda]"' in ended.stdout


def test_a_jax_that_breaks(tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError('no jaxlib for this CPU')\n")
    ended = command("only=devices", PYTHONPATH=f"{tmp_path}:{ROOT}", JAX_PLATFORMS="")
    assert ended.returncode == 3
    assert "failed    JAX does not start: ImportError: no jaxlib for this CPU" in ended.stdout


def test_a_reader_that_has_read_enough():
    pipe = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m launcher.doctor only=limits,wandb | head -n 1"],
        capture_output=True,
        text=True,
    )
    assert (pipe.stdout, pipe.stderr) == ("limits\n", "")


def test_storage_through_the_command(tmp_path):
    ended = command("only=storage,limits", f"dir={tmp_path}")
    assert ended.returncode == 0
    assert f"{tmp_path} takes " in ended.stdout
    assert "writing 64 MB" in ended.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_name_is_no_text(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    ended = command("only=storage", f"dir={os.fsdecode(folder)}")
    assert ended.returncode == 0, ended.stderr
    assert "\\udcff takes " in ended.stdout


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_ends_it_and_its_processes(number, status):
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher.doctor", "only=ray"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "running a task on Ray" in process.stderr.readline()
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == status


@pytest.mark.slow
@pytest.mark.ray
def test_all_of_it(tmp_path):
    start = time.monotonic()
    ended = command(f"dir={tmp_path}", WANDB_API_KEY="secret-of-this-test")
    assert time.monotonic() - start < 120  # 20 s where nothing else runs
    assert ended.returncode == 0, ended.stdout
    for line in (
        "a plan of the tiny GPT on 8 devices",
        "8 emulated CPU devices; each computes, and they add up",
        "a local Ray session starts, runs a task and ends",
    ):
        assert f"  ok        {line}" in ended.stdout
    assert [line for line in ended.stdout.splitlines() if line in GROUPS] == list(GROUPS)
    assert "secret-of-this-test" not in ended.stdout + ended.stderr
