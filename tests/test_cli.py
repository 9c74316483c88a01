"""The command line as a user meets it: real processes, with a stand-in for what `main` runs."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

import launcher
from launcher.cli import sweep
from launcher.cli.run_folder import run_dir_override

# Stands in for launcher.main in the child processes: Python imports a sitecustomize when it starts.
STAND_IN = """
import os, pathlib, signal, sys, time, types
from launcher import errors

def run(config, run_dir):
    assert "jax" not in sys.modules, "the command line must leave JAX to main"
    import logging
    logging.getLogger("launcher.main").info("seed %d", config.seed)
    logging.getLogger("launcher.main").debug("debug %d", config.seed)
    logging.getLogger("other").info("chatter")
    with open("pids", "a") as file:
        file.write(f"{config.seed} {os.getpid()}\\n")
    kind = os.environ.get("STAND_IN", "").split(":")[config.seed:][:1]
    match kind:
        case ["config"]: raise errors.ConfigError("plan.json has 3 stages\\nfor 2: mend it")
        case ["cluster"]: raise errors.ClusterError("no devices")
        case ["bug"]: raise RuntimeError("broken inside")
        case ["full"]: raise OSError(28, "No space left on device", str(run_dir / "x"))
        case ["preempted"]: return 75
        case ["many" | "many then config" as what]:
            for number in range(2000):  # more than a pipe holds
                logging.getLogger("launcher.main").info("line %d%s", number, "." * 50)
            if what != "many": raise errors.ConfigError("mend it")
        case ["interrupt"]: raise KeyboardInterrupt
        case ["killed"]: os.kill(os.getpid(), signal.SIGKILL)
        case ["wait"]:
            pathlib.Path("started").touch()
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                return 130
    return 0

sys.modules["launcher.main"] = types.ModuleType("launcher.main")
sys.modules["launcher.main"].run = run
"""

Launch = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stand_in")
    (folder / "sitecustomize.py").write_text(STAND_IN)
    root = pathlib.Path(__file__).parents[1]  # also where the package is not installed
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{root}"}


@pytest.fixture
def launch(tmp_path: pathlib.Path, environment: dict[str, str]) -> Launch:
    def call(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "launcher", *arguments],
            cwd=tmp_path,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return call


def only_folder(tmp_path: pathlib.Path, pattern: str) -> pathlib.Path:
    (folder,) = tmp_path.glob(pattern)
    return folder


def test_a_run_writes_its_config_and_log(launch, tmp_path):
    result = launch("seed=3", "train.steps=7")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"\[\d\d:\d\d:\d\d\] seed 3\n", result.stdout)
    run_dir = only_folder(tmp_path, "outputs/*/*")
    assert "seed: 3" in (run_dir / "config.yaml").read_text().splitlines()
    assert "INFO launcher.main: seed 3" in (run_dir / "launcher.log").read_text()
    assert (run_dir / ".hydra" / "overrides.yaml").is_file()


def test_verbose_logs_everything(launch):
    result = launch("seed=3", "hydra.verbose=true")
    assert "debug 3" in result.stdout
    assert "chatter" in result.stdout


def test_the_run_folder_can_be_chosen_with_a_name_that_needs_quotes(launch, tmp_path):
    assert launch("hydra.run.dir='a=b, c'").returncode == 0
    assert (tmp_path / "a=b, c" / "config.yaml").is_file()


def test_default_config_is_the_golden_one(launch, golden):
    result = launch("--cfg", "job")
    assert result.returncode == 0
    golden("config.yaml", result.stdout)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--help"], "model: custom, gpt, moe, wrn\n"),
        (["--cfg", "job", "--resolve", "--package", "train"], "steps: 100\n"),
        (["model=wrn", "--info", "defaults"], "data/digits"),
        (["--info", "searchpath"], "conf"),
        (["--hydra-help"], "--multirun"),
        (["--version"], f"launcher {launcher.__version__} (Hydra {hydra.__version__})\n"),
        (["-sc", "install=bash"], "hydra_bash_completion"),
    ],
)
def test_hydra_flags_print_and_write_nothing(launch, tmp_path, arguments, text):
    result = launch(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert text in result.stdout
    assert not list(tmp_path.iterdir())


def test_help_lists_only_what_can_be_chosen(launch):
    assert "schema" not in launch("--help").stdout


@pytest.mark.parametrize(
    ("typed", "completions"),
    [
        ("launcher model=g", ["model=gpt"]),
        ("launcher train.st", ["train.steps="]),
        ("launcher model=moe model.exp", ["model.expert_group_size=", "model.experts="]),
        ("launcher model='", []),
    ],
)
def test_the_shell_completes(launch, typed, completions):
    result = launch("-sc", "query=bash", COMP_LINE=typed)
    assert result.stdout.split() == completions
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["model.hiden=3"], "launcher: model.hiden=3: there is no key model.hiden"),
        (["--multirun", "seed=0,x"], "launcher: seed=x is of the wrong type"),
        (["--steps=3"], "unrecognized arguments: --steps=3: the launcher takes key=value"),
        (["--cfg", "job", "model=gptt"], "launcher: model=gptt is unknown"),
        (["--cfg", "job", "--package", "zzz"], "package 'zzz' not found in config"),
        (["--cfg", "job", "--multirun"], "Only one of --run, --multirun"),
        (["--info", "config", "modle=gpt"], "launcher: modle=gpt: there is no key modle"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(launch, tmp_path, arguments, text):
    result = launch(*arguments)
    assert result.returncode == 2
    assert text in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "status", "line"),
    [
        ("config", 2, "launcher: plan.json has 3 stages for 2: mend it\n"),
        ("cluster", 3, "launcher: no devices\n"),
        ("full", 6, "No space left on device"),
        (
            "interrupt",
            130,
            "launcher: stopped by Ctrl-C; to go on: python -m launcher hydra.run.dir=/",
        ),
    ],
)
def test_a_failed_run_ends_in_one_line_and_its_status(launch, kind, status, line):
    result = launch(STAND_IN=kind)
    assert result.returncode == status
    assert line in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_late_config_error_takes_back_what_was_written(launch, tmp_path):
    assert launch(STAND_IN="config").returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["pids"]


def test_a_late_config_error_leaves_what_was_there(launch, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.yaml").write_text("older")
    assert launch("hydra.run.dir=mine", STAND_IN="config").returncode == 2
    assert [path.name for path in mine.iterdir()] == ["config.yaml"]
    assert (mine / "config.yaml").read_text() == "older"
    (tmp_path / "outputs").mkdir()
    assert launch(STAND_IN="config").returncode == 2
    assert (tmp_path / "outputs").is_dir()


def test_a_bug_keeps_its_traceback_and_says_where_to_report_it(launch, tmp_path):
    result = launch(STAND_IN="bug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    log = only_folder(tmp_path, "outputs/*/*") / "launcher.log"
    last = result.stderr.splitlines()[-1]
    assert last.startswith("launcher: this is a bug of ours: please report it")
    assert str(log) in last
    assert "RuntimeError: broken inside" in log.read_text()


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [(["debug=true"], {}), ([], {"HYDRA_FULL_ERROR": "1"})],
    ids=["debug", "hydra"],
)
def test_tracebacks_can_be_asked_for(launch, arguments, variables):
    for extra in ([], ["model.hiden=3"]):
        result = launch(*arguments, *extra, STAND_IN="cluster", **variables)
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("launcher: ")


def test_a_folder_that_cannot_be_made_is_a_storage_error(launch, tmp_path):
    (tmp_path / "outputs").write_text("a file in the way")
    result = launch()
    assert result.returncode == 6
    assert "take another hydra.run.dir=<folder>" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["launcher.log", "config.yaml"])
def test_a_file_that_cannot_be_written_is_a_storage_error(launch, tmp_path, name):
    (tmp_path / "mine" / name).mkdir(parents=True)
    result = launch("hydra.run.dir=mine")
    assert result.returncode == 6
    assert f"{name}'" in result.stderr
    assert "take another hydra.run.dir=<folder>" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("arguments", "stand_in", "status", "said"),
    [
        ("--help", "", 0, ""),
        ("seed=0", "many", 0, ""),
        ("seed=0", "many then config", 2, "launcher: mend it\n"),
        ("--multirun seed=0,1", "many:many", 0, ""),
    ],
)
def test_a_run_goes_on_when_nobody_reads_it(
    environment, tmp_path, arguments, stand_in, status, said, unbuffered
):
    result = subprocess.run(
        [
            "bash",
            "-c",
            f"{sys.executable} -m launcher {arguments} | head -1; exit ${{PIPESTATUS[0]}}",
        ],
        cwd=tmp_path,
        env=environment | {"PYTHONUNBUFFERED": unbuffered, "STAND_IN": stand_in},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (status, said)
    logs = (path.read_text() for path in tmp_path.rglob("launcher.log"))
    assert all(text.count("line") == 2000 for text in logs)


@pytest.mark.parametrize("closed", ["1", "2", "1 and 2"])
def test_a_run_without_standard_streams(environment, tmp_path, closed):
    closings = " ".join(f"{number}>&-" for number in closed.split(" and "))
    result = subprocess.run(
        ["bash", "-c", f"exec {sys.executable} -m launcher {closings}"],
        cwd=tmp_path,
        env=environment | {"STAND_IN": "many"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    (log,) = tmp_path.rglob("launcher.log")
    assert log.read_text().count("line") == 2000


def test_a_run_whose_errors_nobody_reads(environment, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher"],
        cwd=tmp_path,
        env=environment | {"STAND_IN": "many then config"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    process.stderr.close()
    assert process.wait(60) == 2


def test_each_point_of_a_sweep_has_a_process_and_a_folder(launch, tmp_path):
    result = launch("--multirun", "seed=5,6", "logger.group='${hydra:job.num}'")
    assert (result.returncode, result.stderr) == (0, "")
    assert "seed 5" in result.stdout
    pids = dict(line.split() for line in (tmp_path / "pids").read_text().splitlines())
    assert len(set(pids.values())) == 2
    for number, seed in enumerate(("5", "6")):
        folder = only_folder(tmp_path, f"multirun/*/*/{number}")
        written = (folder / "config.yaml").read_text()
        assert f"seed: {seed}\n" in written
        assert f"group: '{number}'\n" in written
        overrides = (folder / ".hydra" / "overrides.yaml").read_text()
        assert overrides == f"- seed={seed}\n- logger.group='${{hydra:job.num}}'\n"


def test_a_sweep_goes_on_after_a_failure_and_ends_with_its_status(launch, tmp_path):
    result = launch("--multirun", "seed=0,1,2", STAND_IN="ok:cluster:killed")
    assert result.returncode == 3
    assert "point 1 of the sweep (seed=1) ended with exit status 3" in result.stderr
    assert "point 2 of the sweep (seed=2) ended with exit status 137" in result.stderr
    assert "Traceback" not in result.stderr
    assert len((tmp_path / "pids").read_text().splitlines()) == 3


@pytest.mark.parametrize(("kind", "status"), [("preempted", 75), ("interrupt", 130)])
def test_a_sweep_ends_where_a_point_was_told_to_stop(launch, tmp_path, kind, status):
    result = launch("--multirun", "seed=0,1", STAND_IN=f"{kind}:ok")
    assert result.returncode == status
    assert len((tmp_path / "pids").read_text().splitlines()) == 1


def test_a_sweep_reads_the_same_config_folders(launch, tmp_path):
    (tmp_path / "extra" / "recipe").mkdir(parents=True)
    (tmp_path / "extra" / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ntrain:\n  steps: 3\n"
    )
    assert launch("--config-dir=extra", "-m", "+recipe=mine", "seed=0,1").returncode == 0
    assert "steps: 3" in (only_folder(tmp_path, "multirun/*/*/1") / "config.yaml").read_text()


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stopped_sweep_waits_for_its_point(environment, tmp_path, sent, status):
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "--multirun", "seed=0,1"],
        cwd=tmp_path,
        env=environment | {"STAND_IN": "wait:ok"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as the terminal does
    else:
        process.send_signal(sent)
    assert process.wait(timeout=20) == status
    assert len((tmp_path / "pids").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("folder", "written"),
    [
        ("/tmp/outputs/2026-11-29/04-24-08-123456", None),
        ("a/7", None),
        ("a/null", None),
        ("/-x/1e5_.y", None),
        ("7", "'7'"),
        ("null", "'null'"),
        ("it's/0", "'it\\'s/0'"),
        ("a b/c=d", "'a b/c=d'"),
        ("/ä/${x},y", "'/ä/${x},y'"),
    ],
)
def test_a_folder_is_quoted_where_hydra_needs_it(folder, written):
    text = run_dir_override(pathlib.Path(folder))
    assert text == f"hydra.run.dir={written or folder}"
    (parsed,) = OverridesParser.create().parse_overrides([text])
    assert parsed.value() == folder  # a text, and no number


def test_a_point_is_the_command_that_a_user_could_type():
    command = sweep.command(
        ["seed=1"], flags=("--config-dir=x",), run_dir=pathlib.Path("it's/0"), number=4
    )
    assert command[1:] == [
        *("-m", "launcher", "--config-dir=x", "seed=1", "hydra.mode=RUN"),
        *("hydra.run.dir='it\\'s/0'", "hydra.job.num=4", "hydra.job.id=4"),
    ]
