"""The process of a job's first node: how it notes its end, and what it says to Slurm."""

import os
import signal

import pytest
from omegaconf import OmegaConf

from launcher.cli import compose, job
from launcher.cli.frozen import read_config
from launcher.errors import ConfigError, NoRestartLeftError, StoppedBySignal, TrainingError
from launcher.slurm.job_folder import ends_folder, is_done, note_end, read_ends

STEP = {
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a job whose run does this; its status, and the notes of its end."""
    for name in STEP:
        monkeypatch.delenv(name, raising=False)
    heard = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    }
    write_config(tmp_path)

    def do(action):
        def run_logged(make_config, run_dir, left_by, meeting):
            make_config()
            return action()

        monkeypatch.setattr(job, "run_logged", run_logged)
        for path in ends_folder(tmp_path).glob("rank-*"):
            path.unlink()
        return job.main([str(tmp_path)]), read_ends(ends_folder(tmp_path))

    yield do
    for number, handler in heard.items():
        signal.signal(number, handler)


def write_config(folder, *overrides):
    config = compose.load(overrides)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return config


def raising(error):
    def action():
        raise error

    return action


def test_a_run_that_is_done(run, tmp_path):
    status, (end,) = run(lambda: 0)
    assert (status, end.end, end.rank) == (0, "done", 0)
    assert is_done(tmp_path)


def test_a_run_that_fails_says_why(run, tmp_path, capsys):
    status, (end,) = run(raising(TrainingError("loss is nan\nin step 3")))
    assert (status, end.end, end.exit_status, end.reason) == (
        5,
        "failed",
        5,
        "loss is nan in step 3",
    )
    assert capsys.readouterr().err == "launcher: loss is nan in step 3\n"
    assert not is_done(tmp_path)


def test_a_run_that_has_lost_a_host_can_be_started_again(run):
    status, (end,) = run(raising(NoRestartLeftError("host 1 was lost")))
    assert (status, end.end, end.exit_status) == (5, "lost", 5)


def test_a_bug_is_a_failure_too(run):
    status, (end,) = run(raising(ZeroDivisionError("division by zero")))
    assert (status, end.end, end.reason) == (1, "failed", "division by zero")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_run_that_was_told_to_stop_fails_no_step(run, number):
    status, (end,) = run(lambda: os.kill(os.getpid(), number))
    assert (status, end.end, end.exit_status) == (0, "stopped", 75)
    assert end.reason == signal.Signals(number).name


def test_a_job_that_never_comes_further_is_not_started_for_ever(run, tmp_path):
    stop = raising(StoppedBySignal("SIGUSR2 after step 7"))
    (tmp_path / "checkpoints/step-00000007").mkdir(parents=True)
    for _ in range(job.MOST_STOPS - 1):
        assert run(stop)[0] == 0
    (tmp_path / "checkpoints/step-00000009").mkdir()  # it has
    for _ in range(job.MOST_STOPS - 1):
        assert run(stop)[0] == 0
    status, (end,) = run(stop)
    assert (status, end.end) == (5, "failed")
    assert end.reason == (
        "stopped 10 times in a row without a checkpoint after step 9: give the job more time "
        "(cluster.slurm.time), or write checkpoints more often (checkpoint.every_minutes)"
    )


def test_another_process_of_the_node_leaves_all_to_the_first(tmp_path, monkeypatch):
    for name, value in (STEP | {"SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "2"}).items():
        monkeypatch.setenv(name, value)
    assert job.main([str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())


def test_it_takes_one_folder(capsys):
    assert job.main([]) == 2
    assert (
        capsys.readouterr().err == "launcher: give one folder: python -m launcher.cli.job FOLDER\n"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=moe", "cluster=8xp3", "parallel=zero", "logger.tags=[a,b]"),
        ("model=wrn", "parallel=manual", "parallel.tp=2", "plan.why_not=[{pp: 1}]"),
        ("model=custom", "model.target=a:b", "+model.args={n: 3}", "optimizer=adafactor"),
        ("data=tokens", "data.path=x", "cluster=v100-a100", "+cluster.slurm.sbatch.nice=3"),
    ],
    ids=str,
)
def test_the_config_comes_back_as_it_was(tmp_path, overrides):
    assert write_config(tmp_path, *overrides) == read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, r"config.yaml cannot be read \(.*No such file.*\): submit the run again"),
        ("{", r"config.yaml cannot be read"),
        ("- a", r"config.yaml is no config of a run: submit the run again"),
        (
            "seed: x",
            r"config.yaml has a value that no run can have \(ValidationError\): submit the run",
        ),
        ("tseed: 3", r"config.yaml has a value that no run can have \(ConfigKeyError\)"),
    ],
)
def test_a_config_that_is_damaged(tmp_path, text, says):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_config(tmp_path)


def test_notes_that_nobody_of_ours_has_written_are_ignored(tmp_path):
    ends = ends_folder(tmp_path)
    note_end(ends, 1, "failed", 5, "a")
    for name, text in (
        ("rank-x.done", "0"),
        ("rank-2.odd", "0"),
        ("rank-3.done", "nothing"),
        ("b", "0"),
    ):
        (ends / name).write_text(text)
    assert [one.rank for one in read_ends(ends)] == [1]
