"""A run without devices, as the fixture `fake`: its parts note what is asked of them."""

import threading
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from launcher.data.dataset import Dataset
from launcher.errors import TrainingError
from launcher.runtime.records.metrics import Meter, TrainSummary
from launcher.runtime.records.sinks import Sink
from launcher.runtime.training import train_loop
from launcher.runtime.training.train_loop import TrainSettings

METER = Meter(
    model_flops_per_step=1e9,
    num_devices=2,
    peak_flops_per_s=None,
    global_batch=4,
    units_per_sample=8,
    sample_unit="tokens",
    predicted_step_s=0.25,
)


class DeviceScalar:
    """A number that notes when it is fetched."""

    def __init__(self, value: float, events: list[str], name: str) -> None:
        self.value, self.events, self.name = value, events, name

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        self.events.append(self.name)
        return np.asarray(self.value, dtype)


@dataclass(frozen=True)
class StepResult:
    loss: DeviceScalar
    grad_norm: float
    metrics: dict
    loss_scale: float | None = None


class FakeExecutor:
    """Answers with given losses; `at_step` runs something in the middle of a step."""

    def __init__(self, losses, events=None, at_step=None, peak_bytes=None) -> None:
        self.losses = losses
        self.events = [] if events is None else events
        self.at_step = at_step or {}
        self.peak_bytes = peak_bytes

    def place(self, batch, step):
        assert batch["tokens"][0] == step
        return step

    def step(self, step):
        self.events.append(f"step {step}")
        self.at_step.get(step, lambda: None)()
        loss = DeviceScalar(self.losses[step], self.events, f"read {step}")
        return StepResult(loss=loss, grad_norm=np.float32(0.5), metrics={"aux": np.float32(0.25)})

    def evaluate(self, batch):
        index = int(batch["tokens"][0]) - 1000
        self.events.append(f"evaluate {index}")
        return DeviceScalar(10.0 + index, self.events, f"read evaluation {index}")

    def peak_bytes_per_stage(self):
        return self.peak_bytes


class CountingDataset(Dataset):
    """Batches that hold their own step, 1000 higher in the held-out split."""

    name = "counting"

    def __init__(self) -> None:
        self.made = [threading.Event() for _ in range(100)]
        self.threads = set()

    def batch(self, step, batch_size, split="train"):
        self.threads.add(threading.current_thread().name)
        self.made[step].set()
        return {"tokens": np.full(batch_size, step + (1000 if split == "valid" else 0))}


class ListSink(Sink):
    """Keeps what it is given, and may fail at the end."""

    def __init__(self, error: Exception | None = None) -> None:
        self.rows: list[dict] = []
        self.summaries: list[TrainSummary] = []
        self.rewound: list[int] = []
        self.error = error

    def write(self, row):
        self.rows.append(row)

    def rewind(self, step):
        self.rewound.append(step)

    def finish(self, summary):
        self.summaries.append(summary)
        if self.error:
            raise self.error


def settings(steps: int, **changes) -> TrainSettings:
    fields = {"steps": steps, "global_batch": 4, "eval_every": 0, "eval_batches": 0}
    return TrainSettings(**fields | changes)


class CompletionClock:
    """Moves on by a second whenever a step is complete, and stands still in between."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        if threading.current_thread().name.startswith("completions"):
            self.now_s += 1.0
        return self.now_s


def train(executor, train_settings, *sinks, dataset=None, clock=None, **more) -> TrainSummary:
    return train_loop.run(
        executor,
        dataset or CountingDataset(),
        train_settings,
        METER,
        sinks,
        learning_rate=lambda step: 0.1 * (step + 1),
        explain_memory=lambda error: TrainingError(f"explained ({str(error).splitlines()[0]})"),
        clock=clock or CompletionClock(),
        **more,
    )


@pytest.fixture(scope="session")
def fake() -> SimpleNamespace:
    """Give the parts of the run; test files cannot import them from one another."""
    return SimpleNamespace(
        METER=METER,
        Dataset=CountingDataset,
        Executor=FakeExecutor,
        Sink=ListSink,
        StepResult=StepResult,
        settings=settings,
        train=train,
    )
