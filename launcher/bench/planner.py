"""`python -m launcher.bench planner`: how long planning takes.

By itself, the intra-operator planner, on three functions, forward and backward: `layer`, a transformer layer
on a 2-D mesh of 8 devices, with nothing held to any axis; `gpt`, a whole training step of GPT-39B (48 layers,
AdamW) on 8 devices; `thousand`, a model of 1,000 layers. Each is traced, posed, solved and written out from
nothing. Then, for each, what the solver was given and what the exact reductions left of it.

From command to plan.json (`planner_commands`): `gpt-39b`, `moe-70b` and `wrn-13b` on the Alpa paper's
cluster, `gpt-1t` on 3,072 A100s. And as a picture, over `layers` and over `hosts`.

    cases   which, as in layer,gpt-39b; default: all
    layers  of the models of the first picture, as in 8,16
    hosts   of the clusters of the second, of 8 devices each
    out     the folder of images/, for the pictures; default: docs
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from launcher import autopar, models
from launcher.autopar.solver.problem import ProblemSize
from launcher.autopar.solver.solve import simplify
from launcher.autopar.text.atomic_file import write_atomically
from launcher.bench.planner_commands import COMMANDS, SERIES, report_command, report_series
from launcher.bench.settings import check_keys, chosen, whole_numbers
from launcher.config import GptConfig

_MESH = autopar.LogicalMesh(shape=(2, 4), alpha=(1e-5, 1e-6), beta=(1e-10, 1e-11))
_BAR_S = {"layer": 1.0, "gpt": 20.0, "thousand": 60.0}


@dataclass(frozen=True, slots=True)
class Case:
    """A function and its abstract arguments."""

    title: str
    step: Callable
    arguments: tuple


def run(settings: Mapping[str, str]) -> int:
    """Print what each case takes; status 1 if one misses its bar."""
    check_keys("planner", settings, ("cases", *SERIES, "out"))
    wanted = chosen(settings, "cases", (*_CASES, *COMMANDS, *SERIES))
    numbers = {name: whole_numbers(settings, name, SERIES[name].numbers) for name in SERIES}
    missed = 0
    for name in wanted:
        if name in _CASES:
            missed += _report_function(name)
        elif name in COMMANDS:
            missed += report_command(COMMANDS[name])
        else:
            picture = report_series(SERIES[name], numbers[name])
            folder = Path(settings.get("out", "docs")) / "images"
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / f"planner-{name}.svg", picture)
    return 1 if missed else 0


def _report_function(name: str) -> bool:
    """Print a row, then the sizes of its problem; says whether the bar was missed."""
    case = _CASES[name]()
    began_s = time.perf_counter()
    sharded = autopar.auto_shard(case.step, *case.arguments, mesh=_MESH)
    took_s = time.perf_counter() - began_s
    _report(case, sharded, took_s, _BAR_S[name])
    return took_s > _BAR_S[name]


def _report(case: Case, sharded: autopar.ShardedFunction, took_s: float, bar_s: float) -> None:
    ops = len(sharded.problem.region.graph.ops)
    sys.stdout.write(
        f"{case.title}: {took_s:.2f} s (bar {bar_s:g} s), {ops:,} ops, "
        f"gap {100 * sharded.gap_fraction:.2g} %\n"
    )
    pairwise, _ = sharded.problem.problem.pairwise()
    for stage in simplify(pairwise).stages:
        sys.stdout.write(f"    {stage.name:<20}{_size(stage.size)}\n")
    sys.stdout.flush()


def _size(size: ProblemSize) -> str:
    return (
        f"{size.nodes:>7,} nodes {size.strategies:>9,} strategies {size.edges:>7,} edges "
        f"{size.edge_entries:>11,} edge entries"
    )


def _shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.bfloat16)


def _gradients(loss: Callable) -> Callable:
    """A step of gradient descent."""

    def step(params, batch):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    return step


def _transformer_layer() -> Case:
    hidden, heads, length, samples = 8192, 64, 1024, 8

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    def loss(params, x):
        qkv = norm(x) @ params["qkv"]
        qkv = qkv.reshape(samples, length, heads, 3, hidden // heads)
        q, k, v = (qkv[:, :, :, i] for i in range(3))
        weights = jax.nn.softmax(jnp.einsum("bshd,bthd->bhst", q, k), -1)
        mixed = jnp.einsum("bhst,bthd->bshd", weights, v).reshape(x.shape)
        x = x + mixed @ params["out"]
        x = x + jax.nn.gelu(norm(x) @ params["up"]) @ params["down"]
        return jnp.mean(x.astype(jnp.float32) ** 2)

    shapes = {"qkv": 3, "out": 1, "up": 4}
    params = {name: _shape(hidden, times * hidden) for name, times in shapes.items()}
    params["down"] = _shape(4 * hidden, hidden)
    batch = _shape(samples, length, hidden)
    return Case("a transformer layer on 2 x 4", _gradients(loss), (params, batch))


def _gpt() -> Case:
    model = models.build(GptConfig(size="39b", dtype="fp16"))
    optimizer = optax.adamw(1e-4)

    def step(params, optimizer_state, state, batch, key):
        def loss(params):
            value, _ = model.loss(params, state, batch, key)
            return value

        value, gradients = jax.value_and_grad(loss)(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, value

    params, key = model.abstract_params, jax.ShapeDtypeStruct((2,), jnp.uint32)
    states = (jax.eval_shape(optimizer.init, params), model.abstract_state)
    arguments = (params, *states, model.example_batch(8), key)
    return Case("a training step of GPT-39B on 2 x 4", step, arguments)


def _thousand_layers() -> Case:
    width, samples = 1024, 4096

    def loss(params, x):
        for layer in params:
            x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
        return jnp.mean(x.astype(jnp.float32) ** 2)

    params = [{"w": _shape(width, width), "b": _shape(width)}] * 1000
    return Case(
        "a model of 1,000 layers on 2 x 4", _gradients(loss), (params, _shape(samples, width))
    )


_CASES: Mapping[str, Callable[[], Case]] = {
    "layer": _transformer_layer,
    "gpt": _gpt,
    "thousand": _thousand_layers,
}
