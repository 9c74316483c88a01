"""What an executor holds: given back when it is closed, unchanged by a check, summed in one order."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import find_plan
from launcher.autopar.realized.evaluation import realize_evaluation
from launcher.models.layers import PRECISIONS
from launcher.models.model import make_model
from launcher.models.optimizer import Optimizer
from launcher.runtime.steps.cotangents import Cotangents
from launcher.runtime.steps.local_executor import LocalExecutor
from launcher.runtime.steps.pipeline import Pipeline

WIDTH = 8


class Remembering(nnx.Module):
    """Layers that remember the mean of what enters them."""

    def __init__(self, rngs: nnx.Rngs):
        self.weights = nnx.List([nnx.Param(rngs.normal((WIDTH, WIDTH)) / 2) for _ in range(2)])
        self.means = nnx.List([nnx.BatchStat(jnp.zeros(WIDTH)) for _ in range(2)])

    def loss(self, batch):
        x = batch["x"]
        for weight, mean in zip(self.weights, self.means, strict=True):
            mean[...] = 0.5 * mean[...] + 0.5 * jax.lax.stop_gradient(jnp.mean(x, axis=0))
            x = jnp.tanh(x @ weight[...])
        return jnp.mean(x**2), {}

    def example_batch(self, batch_size):
        return {"x": jax.ShapeDtypeStruct((batch_size, WIDTH), jnp.float32)}


@pytest.fixture(params=[1, 2], ids=["one program", "pipeline"])
def executor(request) -> LocalExecutor:
    return build(request.param)


def build(pp: int, **more) -> LocalExecutor:
    model = make_model(
        Remembering, precision=PRECISIONS["fp32"], casts=True, name="remembering", size="tiny",
        dtype="fp32", sample_unit="samples", units_per_sample=1, vocab_size=None,
        default_global_batch=4, fingerprint="remembering",
    )  # fmt: skip
    machine = replace(load_cluster("cpu8"), num_hosts=1, devices_per_host=pp)
    options = PlanOptions(mode="manual", global_batch=4, num_microbatches=2, pp=pp)
    realized = find_plan(model, machine, options, lambda text: None).realized
    optimizer = Optimizer(transform=optax.adam(0.1), clip_norm=None, schedule=lambda step: 0.1)
    grid = np.array(jax.devices()[:pp], dtype=object).reshape(1, -1)
    return LocalExecutor(realized, model, optimizer, grid, seed=0, **more)


def batch() -> dict[str, np.ndarray]:
    return {"x": np.arange(4 * WIDTH, dtype=np.float32).reshape(4, WIDTH) / 32}


def test_a_closed_executor_holds_no_arrays(executor):
    executor.step(executor.place(batch(), 0))
    held = [
        weakref.ref(leaf)
        for stage in executor.stages
        for leaf in jax.tree.leaves((stage.params, stage.state, stage.optimizer_state))
    ]
    executor.close()
    assert held
    assert not [reference for reference in held if reference() is not None]


def test_gradients_for_a_check_leave_all_state_as_it_was(executor):
    before = executor.params(), executor.state()
    _, gradients = executor.gradients(batch(), 0)
    assert gradients.keys() == executor.model.abstract_params.keys()
    jax.tree.map(np.testing.assert_array_equal, (executor.params(), executor.state()), before)
    executor.step(executor.place(batch(), 0))
    assert not np.array_equal(executor.state()["means/0"], before[1]["means/0"])


def test_cotangents_are_summed_in_the_order_of_the_stages():
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.ShapeDtypeStruct((), jnp.float32, sharding=where)
    realized = SimpleNamespace(
        planner=SimpleNamespace(model=SimpleNamespace(traced=SimpleNamespace(loss=1))),
        returned={(0, stage): (7,) for stage in (1, 2, 3)},
    )
    programs = SimpleNamespace(
        layout=SimpleNamespace(cotangents={7: None}), abstract_cotangent=lambda value: like
    )
    cotangents = Cotangents(realized, 0, programs)
    parts = {stage: jnp.float32(x) for stage, x in ((3, 1.0), (1, 1e8), (2, -1e8))}
    assert float(cotangents.of({7: parts})[7]) == 1.0  # (1 + 1e8) - 1e8 would be 0


def test_what_is_lent_by_several_owners_is_summed_up_once():
    reduced = []

    def reduce_tied(sums):
        reduced.append(sorted(sums))
        return {path: f"sum of {path}" for path in sums}

    stage = SimpleNamespace(
        accumulators={"a": 1, "b": 2, "own": 3}, lent_gradients={},
        programs=SimpleNamespace(owned={"own"}), compiled=SimpleNamespace(reduce_tied=reduce_tied),
    )  # fmt: skip
    pipeline = SimpleNamespace(realized=SimpleNamespace(owner={"a": 0, "b": 1, "own": 2}))
    for owner, path in ((0, "a"), (1, "b")):
        assert Pipeline._lent_gradients(pipeline, stage, owner) == {path: f"sum of {path}"}
    assert reduced == [["a", "b"]]
    assert (stage.accumulators, stage.lent_gradients) == ({"own": 3}, {})


@pytest.mark.parametrize("executor", [2], indirect=True, ids=["pipeline"])
def test_the_bytes_that_move_are_those_of_the_plan(executor):
    steps = 3
    for step in range(steps):
        executor.step(executor.place(batch(), step))
    sent = executor.pipeline.links.transport.bytes_sent()
    norms = sent.pop("norm")
    planned = executor.realized.messages.bytes_per_step(executor.plan.num_microbatches)
    assert planned > 0
    assert sum(sent.values()) == steps * planned
    assert norms == steps * 2 * np.dtype(np.float32).itemsize  # each of two devices to the other
    # One activation forward and one cotangent back, a microbatch of two rows at a time.
    assert sent["activation"] == sent["cotangent"] == steps * 4 * WIDTH * 4


@pytest.mark.parametrize("pp", [1, 2])
def test_an_evaluation_that_is_to_come_is_compiled_before_the_first_step(pp, monkeypatch):
    counted = build(pp).compilation.num_programs
    executor = build(pp, evaluates=True)
    assert executor.compilation.num_programs == counted + pp
    first = float(executor.evaluate(batch()))
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)  # nothing is compiled any more
    executor.step(executor.place(batch(), 0))
    assert float(executor.evaluate(batch())) < first


def test_an_evaluation_sends_through_channels_and_keeps_nothing():
    executor = build(2)
    executor.evaluate(batch())
    executor.step(executor.place(batch(), 0))
    sent = executor.pipeline.links.transport.bytes_sent()
    assert sent["evaluation"] == sent["activation"] == 4 * WIDTH * 4
    passing = realize_evaluation(executor.realized, executor.model)
    for stage in passing.stages:
        assert {**stage.layout.kept, **stage.layout.cotangents, **stage.layout.accumulators} == {}
