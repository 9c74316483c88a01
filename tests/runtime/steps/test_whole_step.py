"""A step as one program computes what its instructions compute, and what is to be recomputed is."""

import re

import jax
import numpy as np
import optax
import pytest

from launcher import models
from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import find_plan
from launcher.config import GptConfig, WrnConfig
from launcher.models.optimizer import Optimizer
from launcher.runtime.steps.local_executor import LocalExecutor
from launcher.runtime.steps.whole_step import WholeStep

BATCH = 8
CONFIGS = {
    "gpt": GptConfig(size="tiny", dtype="fp64", layers=1, hidden=32, heads=4, seq_len=16, dropout=0.1),
    "wrn": WrnConfig(size="tiny", dtype="fp64"),
}  # fmt: skip


def executor_for(family: str, **forced) -> LocalExecutor:
    machine = load_cluster("cpu8").replace(hosts=1)
    transform = optax.adamw(1e-2, eps=1e-3)
    options = PlanOptions(mode="manual", global_batch=BATCH, optimizer=transform, **forced)
    planned = find_plan(models.build(CONFIGS[family]), machine, options, lambda text: None)
    optimizer = Optimizer(transform=transform, clip_norm=0.1, schedule=lambda step: 1e-2)
    grid = np.array(jax.devices()[:4], dtype=object)[None]
    return LocalExecutor(planned.realized, models.build(CONFIGS[family]), optimizer, grid, seed=1)


def draw(executor: LocalExecutor, step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {
        name: rng.integers(0, 10, leaf.shape).astype(leaf.dtype)
        if np.issubdtype(leaf.dtype, np.integer)
        else rng.normal(size=leaf.shape).astype(leaf.dtype)
        for name, leaf in executor.model.example_batch(BATCH).items()
    }


@pytest.mark.parametrize(
    ("family", "forced"),
    [
        ("gpt", {"dp": 2, "tp": 2, "num_microbatches": 4, "zero": 2}),
        ("gpt", {"dp": 4, "num_microbatches": 2, "zero": 3, "recompute": "full"}),
        ("wrn", {"dp": 2, "tp": 2, "num_microbatches": 2}),
    ],
)
def test_one_program_computes_what_the_instructions_compute(family, forced):
    with jax.enable_x64(True):
        whole, steps = executor_for(family, **forced), executor_for(family, **forced)
        assert isinstance(whole.steps, WholeStep)
        for step in range(3):
            batch = draw(whole, step)
            ours = whole.step(whole.place(batch, step))
            wanted = steps.pipeline.step(steps.pipeline.place(batch, step))
            assert float(ours.loss) == pytest.approx(float(wanted.loss), rel=1e-12)
            assert float(ours.grad_norm) == pytest.approx(float(wanted.grad_norm), rel=1e-10)
            assert ours.metrics.keys() == wanted.metrics.keys()
        for found, expected in (
            (whole.params(), steps.params()), (whole.state(), steps.state()),
        ):  # fmt: skip
            assert found.keys() == expected.keys()
            for path, array in found.items():
                np.testing.assert_allclose(array, expected[path], rtol=1e-9, atol=1e-11)


def test_the_recomputation_is_not_optimised_away():
    flops = {}
    for recompute in ("none", "full"):
        with jax.enable_x64(True):
            executor = executor_for("gpt", dp=2, tp=2, num_microbatches=2, recompute=recompute)
        flops[recompute] = executor.compilation.executables["step"].cost_analysis()["flops"]
    # A third of the work is the forward pass; the embedding, the loss and the update are not repeated.
    assert flops["full"] > 1.15 * flops["none"]


COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all)\(")
DEFINED = re.compile(r"^\s*(?:ROOT )?(%[\w.-]+) = (.*)$", re.MULTILINE)
COMPUTATION = re.compile(r"^(?:ENTRY )?%[^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)


def communicating(body: str) -> list[tuple[str, bool, frozenset[str]]]:
    """The collectives and the layers' calls of a computation: name, whether a call, what it waits for."""
    waits, found = {}, []
    for name, text in DEFINED.findall(body):
        is_call = " call(" in text and "to_apply=%in_turn" in text
        read = [v for v in re.findall(r"%[\w.-]+", text.split(", metadata=")[0]) if v in waits]
        waits[name] = frozenset(read).union(*(waits[v] for v in read))
        if is_call or COLLECTIVE.search(text):
            found.append((name, is_call, waits[name]))
    return found


@pytest.mark.parametrize(
    ("family", "forced"),
    [
        ("wrn", {"dp": 2, "tp": 2, "zero": 3, "num_microbatches": 1}),
        ("wrn", {"dp": 4, "zero": 2, "recompute": "full", "num_microbatches": 1}),
        ("gpt", {"dp": 4, "num_microbatches": 1}),
        ("gpt", {"dp": 4, "num_microbatches": 2, "recompute": "layer"}),
        ("gpt", {"dp": 2, "pp": 2, "num_microbatches": 2, "zero": 3}),
    ],
)
def test_no_collective_runs_beside_the_call_of_a_layer(family, forced):
    """Or emulated devices mistake one for the other, or wait for each other (`autopar/realized/apart.py`).

    What is compiled must say so by its data: executables from the cache run in no other order.
    """
    with jax.enable_x64(True):
        executor = executor_for(family, **forced)
    num_calls = 0
    for executable in executor.compilation.executables.values():
        for body in COMPUTATION.findall(executable.as_text()):
            found = communicating(body)
            calls = [(name, waits) for name, is_call, waits in found if is_call]
            loose = {name for name, is_call, _ in found if not is_call}
            for index, (_, waits) in enumerate(calls):
                assert waits >= loose | {name for name, _ in calls[:index]}
            num_calls += len(calls)
    assert num_calls > 3
