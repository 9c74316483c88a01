"""A run that is resumed: bit for bit the same on its plan, and the same to 1e-9 on any other.

Checkpoints go through the disk. Dropout, random routing and BatchNorm are on, so that a wrong key, step or
statistic would show in the very next loss.
"""

import itertools

import numpy as np
import pytest

from launcher.config import AdafactorConfig, AdamwConfig, SgdConfig
from launcher.models.optimizer import LossScaling, build_optimizer
from launcher.runtime.checkpoints.checkpoint_manifest import (
    Manifest,
    ModelEntry,
    Progress,
    RunEntry,
)
from launcher.runtime.checkpoints.checkpoint_store import CheckpointStore
from launcher.runtime.checkpoints.host_copies import to_host
from launcher.runtime.steps.local_executor import LocalExecutor

pytestmark = pytest.mark.usefixtures("double")

BEFORE, AFTER = 3, 3  # steps before the checkpoint, and after it
HOSTS = {"hosts": [0, 1], "devices": [0, 1, 2, 3]}
EIGHT = {
    "stages": [
        {"layers": 2, "hosts": [0], "devices": [0, 1, 2, 3], "data": 2, "zero": 0},
        {"layers": 1, "hosts": [1], "devices": [0, 1, 2, 3], "data": 2, "zero": 0},
    ],
    "microbatches": 4,
}  # fmt: skip
ONE_STAGE = {"stages": [{"layers": 3, **HOSTS, "data": 4, "zero": 0}], "microbatches": 4}
ZERO_3 = {"stages": [{"layers": 3, **HOSTS, "data": 4, "zero": 3}], "microbatches": 4}
FOUR = {
    "cluster": (1, 4),
    "stages": [{"layers": 3, "hosts": [0], "devices": [0, 1, 2, 3], "data": 2, "zero": 2}],
    "microbatches": 4,
}
FOUR_STAGES = {
    "stages": [
        {"layers": 1, "hosts": [host], "devices": devices, "data": data, "zero": zero}
        for host, devices, data, zero in (
            (0, [0, 1], 1, 0),
            (0, [2, 3], 2, 1),
            (1, [0, 1], 2, 3),
            (1, [2, 3], 2, 0),
        )
    ],
    "microbatches": 4,
}
ALONE = {
    "cluster": (1, 1),
    "stages": [{"layers": 3, "hosts": [0], "devices": [0], "zero": 0}],
    "microbatches": 4,
}


@pytest.fixture
def resumed(exact, tmp_path):
    """Give an executor that goes on, on a plan, from a checkpoint of another."""
    store = CheckpointStore(tmp_path)

    def resume(executor: LocalExecutor, given: dict, **more) -> LocalExecutor:
        model = executor.model
        run = RunEntry(
            model=ModelEntry(
                name=model.name, size=model.size, dtype=model.dtype, fingerprint="", overrides={}
            ),
            seed=exact.SEED, dataset="", global_batch=exact.BATCH, origin=None, config={}, plan="",
        )  # fmt: skip
        manifest = Manifest(
            step=BEFORE, samples=0, eval_loss=None, progress=Progress(), run=run, arrays={}
        )
        store.save(manifest, to_host(executor.training_arrays()), keep=1)
        found = store.newest_intact()
        return exact.executor_for(model, given, restored=found, **more)

    return resume


def steps(exact, executor, first: int, count: int) -> list:
    """What so many steps report, as numbers."""
    found = []
    for step in range(first, first + count):
        result = executor.step(executor.place(exact.draw_batch(executor.model, step), step))
        reported = {"loss": result.loss, "norm": result.grad_norm, **result.metrics}
        found.append({name: np.asarray(value) for name, value in reported.items()})
    return found


def both(exact, resumed, model, before: dict, after: dict, **more) -> tuple[list, list, tuple]:
    """The reports of a run that went on, and of one that was stopped and resumed; the executors too."""
    executor = exact.executor_for(model, before, **more)
    steps(exact, executor, 0, BEFORE)
    again = resumed(executor, after, **more)
    wanted = steps(exact, executor, BEFORE, AFTER)
    return wanted, steps(exact, again, BEFORE, AFTER), (executor, again)


FAMILIES = "gpt", "moe", "wrn"
SAME = {"pipeline": EIGHT, "one loop, ZeRO-3": ZERO_3}


def quick_and_slow(quick: list, *choices) -> list:
    """All combinations; those that are not quick have the marker `slow`."""
    return [
        pytest.param(*which, marks=() if which in quick else pytest.mark.slow, id=", ".join(which))
        for which in itertools.product(*choices)
    ]


@pytest.mark.parametrize(
    ("plan", "family"), quick_and_slow([("one loop, ZeRO-3", "gpt")], SAME, FAMILIES)
)
def test_on_the_same_plan_bit_for_bit(exact, resumed, plan, family):
    given = SAME[plan]
    model = exact.model_of(family, "fp32")
    wanted, found, executors = both(exact, resumed, model, given, given)
    assert found == wanted
    for what in ("params", "state"):
        ours, theirs = (getattr(executor, what)() for executor in executors)
        assert all(np.array_equal(ours[path], theirs[path]) for path in theirs)


@pytest.mark.parametrize("plan", SAME)
def test_going_back_in_the_midst_of_a_run_bit_for_bit(exact, plan):
    """Also from a step that was dispatched and not read."""
    executor = exact.executor_for(exact.model_of("gpt", "fp32"), SAME[plan])
    steps(exact, executor, 0, BEFORE)
    kept = to_host(executor.training_arrays())
    wanted = steps(exact, executor, BEFORE, AFTER)
    executor.step(executor.place(exact.draw_batch(executor.model, BEFORE), BEFORE))
    executor.restore(kept)
    assert steps(exact, executor, BEFORE, AFTER) == wanted


ACROSS = {
    "8 to 4 devices": (EIGHT, FOUR),
    "pp 4 to pp 1": (FOUR_STAGES, ONE_STAGE),
    "pp 1 to pp 4": (ONE_STAGE, FOUR_STAGES),
    "ZeRO 0 to 3": (ONE_STAGE, ZERO_3),
    "ZeRO 3 to 0": (ZERO_3, ONE_STAGE),
    "ZeRO 3 to one device": (ZERO_3, ALONE),
    "one device to ZeRO 3": (ALONE, ZERO_3),
}


@pytest.mark.parametrize(
    ("case", "family"), quick_and_slow([("8 to 4 devices", "gpt")], ACROSS, FAMILIES)
)
def test_on_another_plan_to_1e_9(exact, resumed, case, family):
    before, after = ACROSS[case]
    wanted, found, _ = both(exact, resumed, exact.model_of(family), before, after)
    for ours, theirs in zip(found, wanted, strict=True):
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-9, err_msg=name)


SHARED = {
    "learning_rate": 0.01, "warmup_steps": 2, "decay": "cosine", "clip_norm": 0.1, "weight_decay": 0.1,
}  # fmt: skip
OPTIMIZERS = {
    "adamw": AdamwConfig(beta1=0.9, beta2=0.95, eps=1e-6, **SHARED),
    "adafactor": AdafactorConfig(**SHARED),
    "sgd": SgdConfig(momentum=0.9, **SHARED),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_comes_back_whole(exact, resumed, name):
    """Also the factors of Adafactor, which are no tensors of a parameter's shape, and step counts."""
    transform = build_optimizer(OPTIMIZERS[name], 20).transform
    model = exact.model_of("wrn")
    wanted, found, executors = both(exact, resumed, model, EIGHT, ZERO_3, transform=transform)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-9)
    before, after = (to_host(executor.training_arrays()) for executor in executors)
    assert before.keys() == after.keys()
    assert any(key.startswith("optimizer/") and key.endswith("count") for key in before)
    assert any(key.startswith("state/") for key in before)
    assert all(before[key].shape == after[key].shape for key in before)


def test_nothing_changes_on_the_way(exact, resumed):
    """Through the disk onto another plan: every array bit for bit."""
    transform = build_optimizer(OPTIMIZERS["adafactor"], 20).transform
    executor = exact.executor_for(exact.model_of("wrn"), FOUR_STAGES, transform=transform)
    steps(exact, executor, 0, 1)
    before = to_host(executor.training_arrays())
    after = to_host(resumed(executor, ZERO_3, transform=transform).training_arrays())
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.slow
def test_the_loss_scale_goes_on(exact, resumed):
    scaling = LossScaling(scale=2.0**8, dynamic=True, growth_steps=2)
    model = exact.model_of("gpt")
    wanted, found, (executor, again) = both(
        exact, resumed, model, EIGHT, FOUR, loss_scaling=scaling
    )
    assert [float(x["loss"]) for x in found] == pytest.approx(
        [float(x["loss"]) for x in wanted], rel=1e-9
    )
    names = ("loss_scale/scale", "loss_scale/good_steps")
    scales = [[float(e.training_arrays()[name]) for name in names] for e in (executor, again)]
    assert scales[0] == scales[1]
    assert scales[0][0] > 2.0**8  # it has grown, also before the checkpoint
