"""Watched steps: who is traced, who is profiled, what is written, and how a profile ends early."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from launcher.autopar.programs.communication import add_communication
from launcher.autopar.programs.launches import launches
from launcher.autopar.programs.program import Wiring
from launcher.autopar.programs.schedules import schedule_by_name
from launcher.autopar.programs.simulator import Durations, simulate
from launcher.errors import StorageError
from launcher.runtime.steps.memory_use import peak_bytes
from launcher.runtime.steps.watched_executor import Watch, WatchedExecutor
from launcher.runtime.traces.recording import Recording, Span

WIRING = Wiring.chain(2, with_norm=True)
PROGRAM = add_communication(schedule_by_name("gpipe").build(2, 2), WIRING)
PLANNED = simulate(
    PROGRAM,
    Durations(forward_s=(1, 1), backward_s=(2, 2), synchronize_s=(0, 0), update_s=(1, 1)),
)


class Inner:
    """An executor that notes what is asked of it."""

    def __init__(self):
        self.asked: list[str] = []
        self.run = jax.jit(lambda x: x + 1)

    def place(self, batch, step):
        return SimpleNamespace(step=step)

    def step(self, placed):
        self.asked.append(f"step {placed.step + 1}")
        return self.run(jnp.zeros(()))

    def traced_step(self, placed):
        self.asked.append(f"trace {placed.step + 1}")
        spans = {launch: (event.start_s, event.end_s)
                 for launch in launches(PROGRAM, WIRING) for event in PLANNED.events
                 if event.instruction == launch.first}  # fmt: skip
        played = sorted(launches(PROGRAM, WIRING), key=lambda launch: launch.submesh)
        recording = Recording(
            placed.step + 1, PROGRAM, tuple(Span(x, *spans.get(x, (0.0, 0.0))) for x in played)
        )
        return self.step(placed), recording

    def wait(self):
        self.asked.append("wait")

    def peak_bytes_per_stage(self):
        return (5, 6)

    def close(self):
        self.asked.append("close")


def watched(run_dir, *, trace=(), profile=()) -> tuple[Inner, WatchedExecutor]:
    inner = Inner()
    watch = Watch(
        run_dir=run_dir,
        trace_steps=frozenset(trace),
        profile_steps=frozenset(profile),
        planned=PLANNED,
        title="a step",
        incomparable=None,
    )
    return inner, WatchedExecutor(inner, watch)


def run_steps(executor: WatchedExecutor, count: int) -> None:
    for step in range(count):
        executor.step(executor.place({}, step))


def test_only_the_steps_that_were_named_are_traced(tmp_path, caplog):
    caplog.set_level("INFO", "launcher")
    inner, executor = watched(tmp_path, trace=(2, 4))
    run_steps(executor, 5)
    executor.close()
    assert inner.asked == [
        "step 1", "trace 2", "step 2", "step 3", "trace 4", "step 4", "step 5", "close",
    ]  # fmt: skip
    names = [
        event["args"]["name"]
        for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        if event["name"] == "process_name"
    ]
    assert names == ["planned", "measured, step 2", "measured, step 4"]
    assert "Measured, step 4" in (tmp_path / "trace.html").read_text()
    assert f"step 2 traced: {PLANNED.step_s:.0f} s, bubble" in caplog.text
    assert not (tmp_path / "profile").exists()
    assert executor.peak_bytes_per_stage() == (5, 6)


def test_consecutive_profiled_steps_are_one_profile(tmp_path):
    inner, executor = watched(tmp_path, profile=(2, 3, 5))
    run_steps(executor, 5)
    assert inner.asked == [
        "step 1", "wait", "step 2", "step 3", "wait", "step 4", "wait", "step 5", "wait",
    ]  # fmt: skip
    folders = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert folders == ["step_2", "step_5"]
    for folder in folders:
        assert list((tmp_path / "profile" / folder).rglob("*.xplane.pb"))


def test_a_run_that_ends_early_still_ends_its_profile(tmp_path):
    inner, executor = watched(tmp_path, profile=(1, 2, 3))
    run_steps(executor, 2)
    executor.close()
    assert inner.asked[-1] == "close"
    assert list((tmp_path / "profile" / "step_1").rglob("*.xplane.pb"))
    # There can be only one at a time: another one may begin.
    _, other = watched(tmp_path, profile=(1,))
    run_steps(other, 1)


@pytest.mark.parametrize(("name", "steps"), [("trace.json", "trace"), ("profile", "profile")])
def test_what_cannot_be_written_is_said_in_one_line(tmp_path, name, steps):
    path = tmp_path / name
    if steps == "trace":
        path.mkdir()  # a folder where the file should be
    else:
        path.touch()
    _, executor = watched(tmp_path, **{steps: (1,)})
    with pytest.raises(StorageError, match=f"cannot write .*{name}.*hydra.run.dir"):
        run_steps(executor, 1)


@pytest.mark.parametrize(
    ("counts", "peak"),
    [
        ([{"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 7}], 7),
        ([{"peak_bytes_in_use": 5}, None], None),
        ([{}], None),
    ],
)
def test_the_high_water_mark_is_that_of_the_fullest_device(counts, peak):
    devices = [SimpleNamespace(memory_stats=lambda count=count: count) for count in counts]
    assert peak_bytes(devices) == peak


def test_cpu_devices_do_not_count():
    assert peak_bytes(jax.devices("cpu")) is None
