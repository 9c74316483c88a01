"""A pipeline whose instructions wait a known time instead of computing.

The program, the state it moves and the copies between devices are those of a real plan; only the
executables are replaced. Each waits on the device's own thread, one after the other on a submesh, and
gives zeros where its results would lie. With `instant` nothing is waited for and nothing copied: what is
left is the executor's own time.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import optax

from launcher import models
from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import find_plan
from launcher.autopar.programs.simulator import Durations, simulate
from launcher.bench.device_wait import wait_on_device
from launcher.config import GptConfig
from launcher.models.optimizer import Optimizer
from launcher.runtime.compiled.stage_programs import Compiled
from launcher.runtime.steps.local_executor import LocalExecutor

SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb_h1", 1))
_SUBMESHES, _MICROBATCHES = 4, 8
_FORWARD_S = 0.02
_WAITS = {
    "forward": _FORWARD_S,
    "backward": 2 * _FORWARD_S,
    "forward_backward": 3 * _FORWARD_S,
    "backward_input": _FORWARD_S,
    "backward_weight": _FORWARD_S,
}


class WaitingPipeline:
    """Submeshes of one device; `timeline_s` is what the simulator says that a step takes."""

    def __init__(self, schedule: str, virtual_stages: int, *, instant: bool = False):
        self._executor = executor = _executor(schedule, virtual_stages)
        self._placed = executor.place(_batch(executor), 0)
        self._pipeline = executor.pipeline
        program = executor.realized.program
        self.num_instructions = sum(map(len, program.lists))
        self.timeline_s = simulate(program, _durations(program.num_stages)).step_s
        self._replace(lambda stage, name, real: _Remembering(real))
        self._pipeline.step(self._placed)
        if instant:
            _remember_messages(self._pipeline.links)
        else:
            homes = [_Lane(executor.stages[i].programs.whole) for i in range(_SUBMESHES)]
            lanes = [homes[submesh] for submesh in program.submesh_of]
            self._replace(
                lambda stage, name, known: _Waiting(known, lanes[stage], _WAITS.get(name, 0.0))
            )
        self.step_s()  # compiles what waits

    def _replace(self, make: Callable[[int, str, Callable], Callable]) -> None:
        """Replace the executables of all stages."""
        for stage in self._executor.stages:
            changed = {
                field.name: make(stage.index, field.name, real)
                for field in dataclasses.fields(Compiled)
                for real in [attrgetter(field.name)(stage.compiled)]
                if real is not None
            }
            stage.compiled = dataclasses.replace(stage.compiled, **changed)

    def step_s(self) -> float:
        """A step, from its first instruction until all is done."""
        start_s = time.perf_counter()
        self._pipeline.step(self._placed)
        jax.block_until_ready([(stage.params, stage.norm) for stage in self._executor.stages])
        return time.perf_counter() - start_s

    def dispatch_s(self) -> float:
        """The host's part of a step, which the devices need not have done by then."""
        start_s = time.perf_counter()
        self._pipeline.step(self._placed)
        dispatched_s = time.perf_counter() - start_s
        jax.block_until_ready([(stage.params, stage.norm) for stage in self._executor.stages])
        return dispatched_s


class _Remembering:
    """Calls what it stands for once, and gives the same result ever after."""

    def __init__(self, real: Callable):
        self._real = real
        self.result = None

    def __call__(self, *arguments):
        if self.result is None:
            self.result = self._real(*arguments)
        return self.result


class _Lane:
    """The order of a submesh: each wait begins when the one before it has ended."""

    def __init__(self, where: jax.sharding.Sharding):
        self.where = where
        self.token = jax.device_put(jnp.zeros((), jnp.int32), where)


class _Waiting:
    """Waits when all its arguments are there, then gives zeros where the known results lie."""

    def __init__(self, known: _Remembering, lane: _Lane, wait_s: float):
        self._lane, self._wait_s = lane, wait_s and wait_s - _late_s()
        leaves, self._structure = jax.tree.flatten(known.result)
        self._like = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        where = [leaf.sharding for leaf in leaves]
        self._program = jax.jit(self._wait, out_shardings=(lane.where, where), keep_unused=True)

    def __call__(self, *arguments):
        self._lane.token, made = self._program(self._lane.token, jax.tree.leaves(arguments))
        return jax.tree.unflatten(self._structure, made)

    def _wait(self, token: jax.Array, arguments: list[jax.Array]):
        del arguments
        if self._wait_s:
            token = _after(self._wait_s, token)
        return token, [jnp.zeros(like.shape, like.dtype) for like in self._like]


def _after(wait_s: float, token: jax.Array) -> jax.Array:
    """The token, after a wait on the device's own thread."""
    # What XLA takes for cheap it runs at once, in the thread that dispatches; this is not.
    busy = jnp.zeros((100, 100)) @ jnp.full((100, 100), token, jnp.float32)
    return wait_on_device(token + busy[0, 0].astype(token.dtype), wait_s)


@functools.cache
def _late_s() -> float:
    """By how much a wait ends late on this machine, for whatever reason, with nothing beside it."""
    program = jax.jit(functools.partial(_after, _FORWARD_S))
    token, taken_s = program(jnp.zeros((), jnp.int32)), []
    for _ in range(20):
        start_s = time.perf_counter()
        token = program(token).block_until_ready()
        taken_s.append(time.perf_counter() - start_s)
    return max(0.0, statistics.median(taken_s) - _FORWARD_S)


class _RememberingChannel:
    """A channel that copies only the first message."""

    def __init__(self, real):
        self.send, self.receive = _Remembering(real.send), _Remembering(real.receive)


def _remember_messages(links) -> None:
    for channels in (links.activations, links.cotangents, links.tied_gradients,
                     links.tied_parameters, links.norms):  # fmt: skip
        channels.update({edge: _RememberingChannel(real) for edge, real in channels.items()})


def _executor(schedule: str, virtual_stages: int) -> LocalExecutor:
    layers = 2 * _SUBMESHES * virtual_stages
    model = models.build(GptConfig(size="tiny", dtype="fp32", hidden=32, layers=layers, seq_len=32))
    machine = load_cluster("cpu8")
    machine = dataclasses.replace(machine, num_hosts=1, devices_per_host=_SUBMESHES)
    transform = optax.sgd(1e-3)
    options = PlanOptions(
        mode="manual", global_batch=_MICROBATCHES, num_microbatches=_MICROBATCHES, dp=1, tp=1,
        pp=_SUBMESHES, schedule=schedule, virtual_stages=virtual_stages, optimizer=transform,
    )  # fmt: skip
    planned = find_plan(model, machine, options, lambda text: None)
    optimizer = Optimizer(transform=transform, clip_norm=None, schedule=lambda step: 1e-3)
    grid = np.array(jax.devices()[:_SUBMESHES], dtype=object)[None]
    return LocalExecutor(planned.realized, model, optimizer, grid, seed=0)


def _batch(executor: LocalExecutor) -> dict[str, np.ndarray]:
    example = executor.model.example_batch(_MICROBATCHES)
    return {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in example.items()}


def _durations(num_stages: int) -> Durations:
    """What the instructions wait; what ends a step and all messages are free."""

    def all_stages(wait_s: float) -> tuple[float, ...]:
        return (wait_s,) * num_stages

    return Durations(
        forward_s=all_stages(_WAITS["forward"]),
        backward_s=all_stages(_WAITS["backward"]),
        backward_input_s=all_stages(_WAITS["backward_input"]),
        backward_weight_s=all_stages(_WAITS["backward_weight"]),
        synchronize_s=all_stages(0.0),
        update_s=all_stages(0.0),
    )
