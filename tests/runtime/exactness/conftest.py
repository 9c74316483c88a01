"""What the exactness tests share: small models, plans from a few words, and the run of one device.

The reference is the plain model under `jax.value_and_grad` and optax on one device, microbatch by
microbatch. It is made once per model and number of microbatches, and only as far as it is asked for.

Every optimizer clips by the global norm, at a norm that every step exceeds. Where the true gradient is zero
(a key's bias) Adam would make updates of full size out of rounding noise; an epsilon of 1e-6 is far above
that noise in double precision (1e-17) and far below gradients, so the comparison means something. The
Wide-ResNet takes SGD with momentum.
"""

import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import batches
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launcher import models
from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import adopt_plan, find_plan
from launcher.autopar.plans.plan_file import from_json
from launcher.autopar.realized.realize import RealizedPlan
from launcher.config import CustomConfig, GptConfig, MoeConfig, WrnConfig
from launcher.models.optimizer import LossScaling, Optimizer
from launcher.runtime.steps.local_executor import LocalExecutor
from launcher.runtime.steps.training_state import check_arrays, values

BATCH, SEED, CLIP_NORM = 16, 3, 0.1
CLUSTER = 2, 4  # hosts, and devices of each
_TRUNK = {
    "size": "tiny", "layers": 3, "hidden": 16, "heads": 2, "seq_len": 8, "vocab_size": 32, "dropout": 0.1,
}  # fmt: skip
_CONFIGS = {
    "gpt": (GptConfig, _TRUNK),
    "moe": (
        MoeConfig,
        _TRUNK | {"expert_group_size": 8, "second_expert": "random", "aux_loss_weight": 1.0},
    ),
    "wrn": (WrnConfig, {"size": "tiny", "depth": 11, "base_channels": 4, "num_classes": 8}),
    "custom": (CustomConfig, {"target": "foreign_ladder:build"}),
}
_ADAMW, _SGD = optax.adamw(3e-3, eps=1e-6, weight_decay=0.1), optax.sgd(0.1, momentum=0.9)


@functools.cache
def _model_of(family: str, dtype: str, fields: tuple):
    folder = str(pathlib.Path(__file__).parent)
    sys.path.append(folder)  # of the user's model
    try:
        config, given = _CONFIGS[family]
        return models.build(config(dtype=dtype, **given | dict(fields)))
    finally:
        sys.path.remove(folder)


def model_of(family: str, dtype: str = "fp64", **fields):
    """The family's small model; the same object for the same request."""
    return _model_of(family, dtype, tuple(sorted(fields.items())))


def _transform(model) -> optax.GradientTransformation:
    return _SGD if model.name == "wrn" else _ADAMW


def draw_batch(model, step: int):
    return batches.draw_batch(model, BATCH, seed=step)


@functools.cache
def cluster(hosts: int, devices: int):
    return replace(load_cluster("cpu8"), num_hosts=hosts, devices_per_host=devices)


# The run of one device


@dataclass(frozen=True, eq=False)
class Moment:
    """What a step reported, and what it left behind; gradients are means over its microbatches."""

    loss: float
    metrics: dict
    gradients: dict
    norm: float
    params: dict
    state: dict


@dataclass(eq=False)
class Reference:
    """The plain model on one device; `moments[k]` is what step k made."""

    steps: Iterator[Moment]
    moments: list[Moment] = field(default_factory=list)

    def after(self, count: int) -> list[Moment]:
        """The first `count` steps."""
        while len(self.moments) < count:
            self.moments.append(next(self.steps))
        return self.moments[:count]


@functools.cache
def reference(model, num_microbatches: int) -> Reference:
    return Reference(_train(model, num_microbatches))


def _train(model, count: int) -> Iterator[Moment]:
    transform = optax.chain(optax.clip_by_global_norm(CLIP_NORM), _transform(model))
    params, state = model.init(SEED)
    memory = transform.init(params)

    @jax.jit
    def microbatch(params, state, part, key):
        (loss, (after, metrics)), gradients = jax.value_and_grad(model.loss, has_aux=True)(
            params, state, part, key
        )
        return {**state, **after}, (loss, metrics, gradients)

    @jax.jit
    def update(params, memory, sums):
        loss, metrics, gradients = jax.tree.map(lambda total: total / count, sums)
        updates, memory = transform.update(gradients, memory, params)
        norm = optax.tree.norm(gradients)
        return optax.apply_updates(params, updates), memory, (loss, metrics, gradients, norm)

    add = jax.jit(functools.partial(jax.tree.map, jnp.add))
    step = 0
    while True:
        batch, sums = draw_batch(model, step), None
        for k in range(count):
            part = {name: np.split(leaf, count)[k] for name, leaf in batch.items()}
            key = np.array([SEED, step * count + k], np.uint32)
            state, made = microbatch(params, state, part, key)
            sums = made if sums is None else add(sums, made)
        params, memory, made = update(params, memory, sums)
        loss, metrics, gradients, norm = jax.tree.map(np.asarray, made)
        after = jax.tree.map(np.asarray, (params, state))
        yield Moment(float(loss), metrics, gradients, float(norm), *after)
        step += 1


# Plans


def _stage(given: dict, first: int) -> dict:
    """A stage of a plan file; `given` has the number of its layers, and of its mesh the data axis alone."""
    num_devices, data = len(given["hosts"]) * len(given["devices"]), given.get("data", 1)
    rest = {key: value for key, value in given.items() if key not in ("layers", "data")}
    layers, mesh = [first, first + given["layers"]], {"data": data, "tensor": num_devices // data}
    return {"layers": layers, "mesh": mesh} | rest


def plan_file(
    model, machine, stages: list[dict], *, microbatches: int, schedule: str = "1f1b",
    virtual_stages: int | None = None,
) -> str:  # fmt: skip
    """The text of a plan as a person writes it: nothing but what it must say."""
    ends = itertools.accumulate(given["layers"] for given in stages)
    placed = [_stage(given, end - given["layers"]) for given, end in zip(stages, ends, strict=True)]
    found = {
        "version": 1,
        "model": {"name": model.name, "size": model.size},
        "cluster": {
            "name": machine.name, "hosts": machine.num_hosts,
            "devices_per_host": machine.devices_per_host,
        },
        "global_batch": BATCH,
        "num_microbatches": microbatches,
        "schedule": schedule,
        "stages": placed,
    }  # fmt: skip
    if virtual_stages is not None:
        found["virtual_stages"] = virtual_stages
    return json.dumps(found)


def realized_for(model, given: dict, transform=None) -> RealizedPlan:
    """A plan: of `stages` as in a file, or what the planner makes of its options."""
    given = dict(given)
    machine = cluster(*given.pop("cluster", CLUSTER))
    transform = transform or _transform(model)
    if "stages" in given:
        plan = from_json(plan_file(model, machine, **given))
        options = PlanOptions(mode="from_file", global_batch=BATCH, optimizer=transform)
        return adopt_plan(plan, model, machine, options).realized
    count = given.pop("microbatches")
    options = PlanOptions(global_batch=BATCH, num_microbatches=count, optimizer=transform, **given)
    return find_plan(model, machine, options, lambda text: None).realized


def executor_for(
    model, given: dict, *, loss_scaling: LossScaling | None = None, transform=None, restored=None
) -> LocalExecutor:
    """An executor that trains the model as a plan says, from a checkpoint or from the beginning."""
    realized = realized_for(model, given, transform)
    optimizer = Optimizer(
        transform=transform or _transform(model),
        clip_norm=CLIP_NORM,
        schedule=lambda step: 0.1,
        loss_scaling=loss_scaling or LossScaling(),
    )
    hosts, devices = given.get("cluster", CLUSTER)
    grid = np.array(jax.devices()[: hosts * devices], dtype=object).reshape(hosts, devices)
    if restored is None:
        return LocalExecutor(realized, model, optimizer, grid, seed=SEED)
    check_arrays(restored.manifest, str(restored.path), model, optimizer)
    return LocalExecutor(
        realized, model, optimizer, grid, seed=SEED, weights=values(restored.arrays, model),
        restored=restored.arrays,
    )  # fmt: skip


# Comparing


def errors(found: dict, wanted: dict, floor: float = 0.0) -> dict[str, float]:
    """Per tensor: the largest error over its largest entry, or over that share of the largest of all."""
    assert found.keys() == wanted.keys()
    biggest = max((np.abs(array).max() for array in wanted.values()), default=0.0)
    result = {}
    for path, array in wanted.items():
        difference = np.abs(np.asarray(found[path], array.dtype) - array).max()
        scale = max(np.abs(array).max(), floor * biggest)
        result[path] = float(difference / scale if scale else difference)
    return result


def assert_within(bound: float, found: dict, wanted: dict, what: str, floor: float = 0.0) -> float:
    """The largest error, which is within the bound."""
    by_path = errors(found, wanted, floor)
    wrong = {path: error for path, error in by_path.items() if not error <= bound}  # NaN too
    assert not wrong, f"{what} of {wrong}"
    return max(by_path.values(), default=0.0)


def first_gradients(executor: LocalExecutor, bound: float, floor: float = 0.0) -> tuple:
    """The largest errors of the first step's loss and gradients; the executor is as before."""
    (wanted,) = reference(executor.model, executor.plan.num_microbatches).after(1)
    before = [stage.state for stage in executor.stages]
    loss, gradients = executor.gradients(draw_batch(executor.model, 0), 0)
    for held, state in zip(executor.stages, before, strict=True):
        held.state = state
    of_loss = assert_within(bound, {"": loss}, {"": np.asarray(wanted.loss)}, "loss")
    return of_loss, assert_within(bound, gradients, wanted.gradients, "the gradient", floor)


def train(executor: LocalExecutor, steps: int, bound: float) -> dict[str, float]:
    """Train so many steps; the largest errors of loss, parameters and state."""
    moments = reference(executor.model, executor.plan.num_microbatches).after(steps)
    of_loss = 0.0
    for step, wanted in enumerate(moments):
        result = executor.step(executor.place(draw_batch(executor.model, step), step))
        assert wanted.norm > CLIP_NORM
        found = {"loss": result.loss, "norm": result.grad_norm, **result.metrics}
        report = {"loss": wanted.loss, "norm": wanted.norm, **wanted.metrics}
        report = {name: np.asarray(value) for name, value in report.items()}
        of_loss = max(of_loss, assert_within(bound, found, report, f"step {step}: the report"))
    last = moments[-1]
    return {
        "loss": of_loss,
        "parameters": assert_within(bound, executor.params(), last.params, "the value"),
        "state": assert_within(bound, executor.state(), last.state, "the value"),
    }


def check_evaluation(executor: LocalExecutor) -> None:
    """After one step, the evaluation loss of a batch is the plain model's."""
    model, count = executor.model, executor.plan.num_microbatches
    (moment,) = reference(model, count).after(1)
    executor.step(executor.place(draw_batch(model, 0), 0))
    batch = draw_batch(model, 1)
    parts = [{name: np.split(leaf, count)[k] for name, leaf in batch.items()} for k in range(count)]
    losses = [float(model.eval_loss(moment.params, moment.state, part)[0]) for part in parts]
    assert float(executor.evaluate(batch)) == pytest.approx(np.mean(losses), rel=1e-9)


@pytest.fixture(scope="session")
def exact() -> SimpleNamespace:
    """Give the parts; test files cannot import them from one another."""
    return SimpleNamespace(
        BATCH=BATCH, SEED=SEED, CLIP_NORM=CLIP_NORM,
        model_of=model_of, draw_batch=draw_batch, cluster=cluster, reference=reference,
        plan_file=plan_file, realized_for=realized_for, executor_for=executor_for,
        first_gradients=first_gradients, train=train, check_evaluation=check_evaluation,
    )  # fmt: skip


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield
