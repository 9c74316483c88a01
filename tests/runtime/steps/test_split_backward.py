"""The halves of the backward pass, on every stage: together they give what one device computes.

Here is no executor: a microbatch goes forward through the stages, back through all first halves, and only
then through the second ones, so whatever a first half hands on was made without them.
"""

import functools
import itertools
from collections import Counter, defaultdict
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from batches import draw_batch
from flax import nnx

from launcher import models
from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.graphs.graph import Value
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import find_plan
from launcher.autopar.sharding.shards import ShardedValues
from launcher.autopar.sharding.spec import partial_axes
from launcher.config import GptConfig, MoeConfig, WrnConfig
from launcher.models.layers import PRECISIONS
from launcher.models.model import make_model
from launcher.models.optimizer import Optimizer
from launcher.runtime.compiled.build_programs import build_programs
from launcher.runtime.compiled.microbatch_programs import MicrobatchPrograms

BATCH, SEED, WORDS, WIDTH = 8, 3, 12, 16
KEY = np.array([SEED, 5], np.uint32)


class Foreign(nnx.Module):
    """Integers and truth values that cross stages, a tied table, a skip over all layers, running
    statistics that are read and written, dropout, and parameters that no gradient reaches."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Param(rngs.normal((WORDS, WIDTH)))
        self.inner = nnx.data([nnx.Param(0.3 * rngs.normal((WIDTH, WIDTH))) for _ in range(5)])
        self.frozen = nnx.Param(1.0 + rngs.uniform((WIDTH,)))
        self.gain = nnx.Param(rngs.normal(()))
        self.unread = nnx.Param(rngs.normal((3, 5)))
        self.mean = nnx.BatchStat(rngs.normal((WIDTH,)))
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def loss(self, batch):
        first = x = self.table[...][batch["words"]]
        chosen, big = batch["words"] + 1, jnp.sum(x, axis=1, keepdims=True) > 0.0
        x = x - self.mean[...][None] * x**2
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * jax.lax.stop_gradient(jnp.mean(x, axis=0))
        for weight in self.inner:
            x = (
                self.dropout(jnp.tanh(x @ weight[...]))
                * jax.lax.stop_gradient(self.frozen[...])[None]
            )
        x = jnp.where(big, x, 0.5 * x) * chosen[:, None] + first
        logits = self.gain[...] * x @ self.table[...].T
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(losses), {"right": jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])}

    def example_batch(self, batch_size):
        whole_number = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        return {"words": whole_number, "label": whole_number}


def foreign():
    return make_model(
        Foreign, precision=PRECISIONS["fp64"], casts=True, name="foreign", size="tiny",
        dtype="fp64", sample_unit="samples", units_per_sample=1, vocab_size=WORDS,
        default_global_batch=BATCH, fingerprint="foreign",
    )  # fmt: skip


MODELS = {
    "gpt": lambda: models.build(
        GptConfig(size="tiny", dtype="fp64", dropout=0.1, layers=3, hidden=32, heads=4, seq_len=16)
    ),
    "moe": lambda: models.build(MoeConfig(size="tiny", dtype="fp64", second_expert="random")),
    "wrn": lambda: models.build(WrnConfig(size="tiny", dtype="fp64")),
    "foreign": foreign,
}
MESHES = {(1, 1): 3, (2, 1): 3, (2, 2): 2}  # (data, tensor): as many stages as eight devices allow
CASES = [
    ("gpt", (1, 1), "none", 0), ("gpt", (2, 1), "layer", 2), ("gpt", (2, 2), "full", 3),
    ("gpt", (2, 2), "none", 1), ("moe", (2, 2), "layer", 0), ("moe", (2, 1), "none", 3),
    ("wrn", (2, 1), "full", 1), ("wrn", (2, 2), "none", 2), ("foreign", (1, 1), "full", 0),
    ("foreign", (2, 1), "layer", 3), ("foreign", (2, 2), "none", 2),
    ("foreign", (2, 2), "full", 0),
]  # fmt: skip
SLOW = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(MODELS, MESHES, ("none", "layer", "full"), range(4))
    if case not in CASES
]


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def _quick_compilation():
    """Optimize little: dozens of programs run once each."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def model_of(family: str):
    return MODELS[family]()


@functools.cache
def reference(family: str):
    """Loss and gradients of a microbatch on one device."""
    model = model_of(family)
    params, state = model.init(SEED)
    run = jax.jit(jax.value_and_grad(model.loss, has_aux=True))
    (loss, _), gradients = run(params, state, draw_batch(model, BATCH), KEY)
    return float(loss), {path: np.asarray(gradient) for path, gradient in gradients.items()}


@functools.cache
def realized_plan(family: str, mesh, recompute: str, zero: int):
    data, tensor = mesh
    pp = MESHES[mesh]
    machine = replace(load_cluster("cpu8"), num_hosts=1, devices_per_host=data * tensor * pp)
    options = PlanOptions(
        mode="manual", global_batch=2 * BATCH, num_microbatches=2, optimizer=optax.sgd(0.1),
        dp=data, tp=tensor, pp=pp, recompute=recompute, zero=zero,
    )  # fmt: skip
    return find_plan(model_of(family), machine, options, lambda text: None).realized


def stage_programs(family: str, *plan):
    realized, model = realized_plan(family, *plan), model_of(family)
    optimizer = Optimizer(transform=optax.sgd(0.1), clip_norm=None, schedule=lambda step: 0.1)
    grid = np.array(jax.devices()[: realized.plan.num_devices], dtype=object).reshape(1, -1)
    return list(build_programs(realized, model, optimizer, grid).values())


class Run:
    """One microbatch on all stages, driven by hand."""

    def __init__(self, family: str, programs, *, split: bool):
        self.model, self.stages = model_of(family), programs
        self.traced = programs[0].emitter.model.traced
        self.built = [MicrobatchPrograms(p, split=split, gathers=False) for p in programs]
        params, state = self.model.init(SEED)
        self.params = [self.placed(p, params, p.layout.params) for p in programs]
        self.state = [self.placed(p, state, p.layout.state) for p in programs]
        batch = draw_batch(self.model, BATCH)
        self.batch = [self.placed(p, batch, p.layout.batch) for p in programs]
        self.keys = [jax.device_put(KEY, p.whole) for p in programs]
        self.crossing, self.imports, self.kept, self.weight_kept = {}, [], [], {}
        self.back = defaultdict(list)
        self.sums = [self.zeros(p) for p in programs]

    def placed(self, programs, arrays, specs):
        return {
            name: jax.device_put(arrays[name], programs.sharding(spec, np.ndim(arrays[name])))
            for name, spec in specs.items()
        }

    def zeros(self, programs):
        shapes = programs.abstracts(programs.layout.accumulators, programs.avals.params)
        return {
            p: jax.device_put(jnp.zeros(s.shape, s.dtype), s.sharding) for p, s in shapes.items()
        }

    def forward(self):
        for k, (programs, built) in enumerate(zip(self.stages, self.built, strict=True)):
            self.imports.append(self.placed(programs, self.crossing, programs.layout.imports))
            exports, new_state, kept = built.compile_forward()(
                self.params[k], self.state[k], self.batch[k], self.keys[k], self.imports[k]
            )
            self.crossing |= exports
            self.kept.append(kept)
            self.state[k] = self.state[k] | new_state

    def cotangents(self, k: int):
        programs = self.stages[k]
        avals, found = programs.avals.values, {self.traced.loss: 1.0}
        for value in programs.layout.cotangents:
            if value != self.traced.loss:
                parts = [np.asarray(part) for part in self.back[value]]
                found[value] = sum(parts, start=np.zeros(avals[value].shape))
        arrays = {v: np.asarray(found[v], avals[v].dtype) for v in programs.layout.cotangents}
        return self.placed(programs, arrays, programs.layout.cotangents)

    def inputs(self, k: int):
        return self.params[k], self.batch[k], self.keys[k], self.imports[k]

    def send_back(self, returns):
        for value, array in returns.items():
            self.back[value].append(array)

    def backward(self):
        for k in reversed(range(len(self.stages))):
            self.sums[k], returns = self.built[k].compile_backward()(
                *self.inputs(k), *self.kept[k], self.cotangents(k), self.sums[k]
            )
            self.send_back(returns)

    def backward_input(self):
        for k in reversed(range(len(self.stages))):
            self.weight_kept[k], returns = self.built[k].compile_backward_input()(
                *self.inputs(k), *self.kept[k], self.cotangents(k)
            )
            self.send_back(returns)

    def backward_weight(self):
        """With no more of the microbatch than the layout says."""
        for k, built in enumerate(self.built):
            params, batch, key, imports = self.inputs(k)
            batch = {name: leaf for name, leaf in batch.items() if name in built.split.batch}
            imports = {v: array for v, array in imports.items() if v in built.split.imports}
            self.sums[k] = built.compile_backward_weight()(
                params, batch, key, imports, self.kept[k][-1], self.weight_kept[k], self.sums[k]
            )

    def gradients(self):
        """Whole sums: a partial one has a leading dim per partial axis; tied ones add up."""
        found = {path: np.zeros(leaf.shape) for path, leaf in self.model.abstract_params.items()}
        for programs, sums in zip(self.stages, self.sums, strict=True):
            for path, packed in sums.items():
                leading = range(len(partial_axes(programs.layout.accumulators[path])))
                found[path] = found[path] + np.asarray(packed).sum(axis=tuple(leading))
        return found


def assert_same(found, wanted, bound: float = 1e-9):
    """By the largest entry of a tensor."""
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        scale = max(np.abs(array).max(), 1e-30)
        assert np.abs(found[name] - array).max() <= bound * scale, name


@pytest.mark.parametrize(("family", "mesh", "recompute", "zero"), [*CASES, *SLOW])
def test_gradients_of_the_halves_are_those_of_one_device(family, mesh, recompute, zero):
    run = Run(family, stage_programs(family, mesh, recompute, zero), split=True)
    run.forward()
    run.backward_input()
    run.backward_weight()
    loss, gradients = reference(family)
    assert float(run.crossing[run.traced.loss]) == pytest.approx(loss, rel=1e-9)
    assert_same(run.gradients(), gradients)


@pytest.mark.parametrize("recompute", ["none", "layer", "full"])
def test_halves_and_whole_differ_by_rounding(recompute):
    plan = ("foreign", (2, 1), recompute, 0)
    programs = stage_programs(*plan)
    halves, whole = (Run("foreign", programs, split=split) for split in (True, False))
    for run in (halves, whole):
        run.forward()
    halves.backward_input()
    halves.backward_weight()
    whole.backward()
    returned = (
        {v: np.asarray(parts[0]) for v, parts in run.back.items()} for run in (halves, whole)
    )
    assert_same(*returned, bound=1e-13)
    assert_same(halves.gradients(), whole.gradients(), bound=1e-13)


@pytest.mark.parametrize("recompute", ["none", "layer", "full"])
@pytest.mark.parametrize("family", ["gpt", "foreign"])
def test_each_half_computes_its_own_ops_and_no_others(family, recompute, monkeypatch):
    """Ops are counted as they are written; what is recomputed is recomputed in the first half."""
    written: Counter = Counter()
    compute = ShardedValues._computed

    def counted(self, op, strategy, operands):
        written[id(op)] += 1
        return compute(self, op, strategy, operands)

    monkeypatch.setattr(ShardedValues, "_computed", counted)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: lowered)
    for programs in stage_programs(family, (2, 1), recompute, 0):
        built = MicrobatchPrograms(programs, split=True, gathers=False)
        emitter, layout = programs.emitter, programs.layout
        classes = [layer.cls for layer in emitter.model.layers[layout.first : layout.last]]
        built.compile_backward_weight()
        assert written == Counter(id(op) for cls in classes for op in cls.weight_ops)
        written.clear()
        built.compile_backward_input()
        first = Counter(id(op) for cls in classes for op in cls.input_ops)
        forward = {id(op) for cls in classes for op in cls.forward_ops}
        again = written - first
        assert written - again == first
        assert again.keys() <= forward
        assert bool(again) == (recompute != "none")
        assert max(again.values(), default=0) <= max(Counter(classes).values())
        written.clear()


def ancestors(ops, wanted):
    """The ops that some wanted values depend on, walking back value by value."""
    made_by = {result: op for op in ops for result in op.results}
    found, left = set(), list(wanted)
    while left:
        op = made_by.get(left.pop())
        if op is not None and id(op) not in found:
            found.add(id(op))
            left += op.values
    return found


@pytest.mark.parametrize("family", MODELS)
def test_the_first_half_is_what_the_gradients_of_activations_need(family):
    layered = realized_plan(family, (2, 1), "none", 0).planner.model
    for cls in layered.classes:
        handed_on = [
            value
            for slot, value in cls.gradients.items()
            if cls.slots[slot].role is None and isinstance(value, Value)
        ]
        backward = [op for op in cls.joint.ops if id(op) in set(map(id, cls.backward_ops))]
        needed = ancestors(backward, handed_on)
        assert {id(op) for op in cls.input_ops} == needed
        assert {id(op) for op in cls.weight_ops} == {id(op) for op in backward} - needed
    first, *_ = layered.layers
    assert not first.cls.input_ops
    assert first.cls.weight_ops


def test_what_is_let_go_between_the_halves_is_read_by_the_first_alone():
    run = Run("gpt", stage_programs("gpt", (1, 1), "none", 0), split=True)
    run.forward()
    for built, kept in zip(run.built, run.kept, strict=True):
        assert built.split.kept == kept[-1].keys()
        assert {*kept[0], *kept[1]}.isdisjoint(kept[-1])
    assert any(run.kept[1][0])
    state = run.state
    run.backward_input()
    for donated, released, remaining in run.kept:
        assert all(array.is_deleted() for array in donated.values())
        assert not any(array.is_deleted() for array in (released | remaining).values())
    assert not any(array.is_deleted() for held in state for array in held.values())


def test_state_outlives_the_donation_of_what_a_microbatch_kept_of_it():
    run = Run("foreign", stage_programs("foreign", (2, 1), "full", 0), split=False)
    run.forward()
    first_state = run.state[0]
    run.backward()
    assert any(run.kept[0])
    assert all(np.isfinite(np.asarray(array)).all() for array in first_state.values())


@pytest.mark.parametrize(("mesh", "recompute"), [((1, 1), "layer"), ((2, 1), "none")])
def test_forward_and_backward_in_one_program_are_the_two(mesh, recompute):
    programs = stage_programs("foreign", mesh, recompute, 0)
    run = Run("foreign", programs, split=False)
    run.forward()
    k = len(programs) - 1
    params, batch, key, imports = run.inputs(k)
    _, state = run.model.init(SEED)
    before = run.placed(programs[k], state, programs[k].layout.state)
    exports, new_state, sums, returns = run.built[k].compile_forward_backward()(
        params, before, batch, key, imports, run.cotangents(k), run.zeros(programs[k])
    )
    wanted_sums, wanted = run.built[k].compile_backward()(
        *run.inputs(k), *run.kept[k], run.cotangents(k), run.sums[k]
    )
    for found, expected in ((sums, wanted_sums), (returns, wanted)):
        assert_same(
            *(jax.tree.map(np.asarray, arrays) for arrays in (found, expected)), bound=1e-12
        )
    assert new_state.keys() == set(programs[k].layout.new_state)
    loss, _ = reference("foreign")
    assert float(exports[run.traced.loss]) == pytest.approx(loss, rel=1e-9)
