"""Traced steps: that they compute what others compute, and that their clock is right."""

import dataclasses
import functools
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launcher import models
from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import adopt_plan, find_plan
from launcher.autopar.programs.communication import add_communication
from launcher.autopar.programs.instructions import RECEIVE_OF_READER
from launcher.autopar.programs.launches import launches
from launcher.autopar.programs.program import Program, Wiring
from launcher.autopar.programs.schedules import schedule_by_name
from launcher.autopar.programs.simulator import Durations, simulate
from launcher.config import GptConfig
from launcher.errors import TrainingError
from launcher.models.optimizer import Optimizer
from launcher.runtime.steps.local_executor import LocalExecutor
from launcher.runtime.steps.mailbox import Mailbox
from launcher.runtime.steps.tracing import _Play, read_late
from launcher.runtime.traces.comparison import compare
from launcher.runtime.traces.recording import Recording

PLANS = {
    "1f1b": {"pp": 2, "dp": 2, "tp": 1, "schedule": "1f1b"},
    "one program": {"pp": 1, "dp": 2, "tp": 2},
    "1f1b, overlapping": {"pp": 2, "dp": 2, "tp": 1, "schedule": "1f1b"},
}
PATIENCE_S = 120


@functools.cache
def executor_for(plan: str) -> LocalExecutor:
    """Four devices, tied embeddings, dropout, clipping, in double precision."""
    with jax.enable_x64(True):
        model = models.build(
            GptConfig(
                size="tiny", dtype="fp64", hidden=32, heads=2, layers=2, seq_len=16, dropout=0.1
            )
        )
        machine = dataclasses.replace(load_cluster("cpu8"), num_hosts=1, devices_per_host=4)
        transform = optax.adam(0.1)
        options = PlanOptions(
            mode="manual", global_batch=8, num_microbatches=4, optimizer=transform, **PLANS[plan]
        )
        planned = find_plan(model, machine, options, lambda text: None)
        if plan.endswith("overlapping"):
            stages = (dataclasses.replace(s, overlap=True) for s in planned.plan.stages)
            changed = dataclasses.replace(planned.plan, stages=tuple(stages))
            planned = adopt_plan(changed, model, machine, options)
        optimizer = Optimizer(transform=transform, clip_norm=0.5, schedule=lambda step: 0.1)
        grid = np.array(jax.devices()[:4], dtype=object)[None]
        return LocalExecutor(planned.realized, model, optimizer, grid, seed=3)


def batch_of(executor: LocalExecutor) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    example = executor.model.example_batch(8)
    return {n: rng.integers(0, 256, leaf.shape).astype(leaf.dtype) for n, leaf in example.items()}


def held(executor: LocalExecutor) -> list:
    """Copies, since a step takes what it updates."""
    kept = [(s.params, s.state, s.optimizer_state) for s in executor.stages]
    return jax.tree.map(jnp.copy, kept)


def put_back(executor: LocalExecutor, kept: list) -> None:
    for stage, (params, state, optimizer_state) in zip(executor.stages, kept, strict=True):
        stage.params, stage.state, stage.optimizer_state = params, state, optimizer_state


@pytest.mark.parametrize("plan", PLANS)
def test_a_traced_step_computes_what_another_computes_to_the_bit(plan):
    executor = executor_for(plan)
    with jax.enable_x64(True):
        before = held(executor)
        plain = executor.step(executor.place(batch_of(executor), 5))
        wanted = held(executor)
        put_back(executor, before)
        traced, recording = executor.traced_step(executor.place(batch_of(executor), 5))
        assert traced.loss.dtype == jnp.float64
        same = np.testing.assert_array_equal
        same(traced.loss, plain.loss)
        same(traced.grad_norm, plain.grad_norm)
        jax.tree.map(same, held(executor), wanted)
    assert recording.step == 6
    played = [entry for span in recording.spans for entry in span.launch.instructions]
    wanted = [entry for entries in recording.program.lists for entry in entries]
    assert sorted(map(str, played)) == sorted(map(str, wanted))
    assert recording.is_one_program == (plan == "one program")
    together = {str(span.launch) for span in recording.spans} & {"0B3+0S", "1F3+1B3+1S"}
    assert len(together) == (2 if plan == "1f1b, overlapping" else 0)


def test_nothing_begins_before_what_it_reads_is_there():
    executor = executor_for("1f1b")
    with jax.enable_x64(True):
        _, recording = executor.traced_step(executor.place(batch_of(executor), 0))
    ends_s = {
        entry: span.end_s
        for span in recording.spans
        if not span.launch.first.is_send  # whose end is the arrival
        for entry in span.launch.instructions
    }
    clocks_s = [0.0] * recording.program.num_submeshes
    for span in recording.spans:
        first = span.launch.first
        assert span.start_s >= clocks_s[span.launch.submesh]
        clocks_s[span.launch.submesh] = span.start_s if first.is_send else span.end_s
        if first.is_receive:
            assert span.end_s >= recording.sends[first.partner].start_s
            landing = recording.landing(span)
            assert span.start_s <= landing.start_s <= landing.end_s == span.end_s
    assert recording.step_s >= max(ends_s.values())
    assert 0 < recording.bubble_fraction < 1


def in_time(action):
    """Run an action that must not hang; gives what it raised."""
    raised = []

    def run():
        try:
            with jax.enable_x64(True):
                action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "the other threads wait for one that has failed"
    return raised[0]


@pytest.mark.parametrize("failing", ["0F2", "0SEND_F1>1", "1RECV_F1<0", "1B0", "0U"])
def test_an_error_in_one_thread_ends_the_step_with_that_error(failing):
    fake = FakePipeline(*program_of("gpipe", 2, 4), Durations(**dict.fromkeys(
        ("forward_s", "backward_s", "synchronize_s", "update_s"), (0.0, 0.0))))  # fmt: skip

    def fail():
        raise RuntimeError(f"{failing} is broken")

    fake.actions = [
        (launch, fail if str(launch) == failing else action) for launch, action in fake.actions
    ]
    error = in_time(lambda: _Play(fake, fake.program).run())
    assert type(error) is RuntimeError
    assert str(error) == f"{failing} is broken"


def test_memory_that_is_used_up_names_the_instruction(monkeypatch):
    executor = executor_for("1f1b")
    pipeline = executor.pipeline

    def exhaust():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    actions = [
        (launch, exhaust if str(launch) == "0B1" else action) for launch, action in pipeline.actions
    ]
    monkeypatch.setattr(pipeline, "actions", actions)
    mailbox = pipeline.links.transport.mailbox
    monkeypatch.setattr(mailbox, "_broken", False)
    monkeypatch.setattr(mailbox, "_posted", {})
    before = held(executor)
    error = in_time(lambda: executor.traced_step(executor.place(batch_of(executor), 0)))
    assert isinstance(error, TrainingError)
    assert "on stage 0 of 2, in the instruction 0B1" in str(error)
    put_back(executor, before)
    for stage in executor.stages:
        for buffers in (*stage.microbatch_buffers, stage.tied_gradients, stage.norms):
            buffers.clear()


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb_h1"])
def test_receives_are_played_where_they_are_read(schedule):
    program, wiring = program_of(schedule, 4, 8)
    order = launches(program, wiring)
    late = read_late(order)
    assert sorted(map(str, late)) == sorted(map(str, order))
    for submesh in range(4):
        own, before = ([x for x in some if x.submesh == submesh] for some in (late, order))
        assert [x for x in own if not x.first.is_receive] == [
            x for x in before if not x.first.is_receive
        ]
        for index, launch in enumerate(own):
            if launch.first.is_receive:
                reader = next(x for x in own[index:] if not x.first.is_receive)
                received = [RECEIVE_OF_READER.get(entry.op) for entry in reader.instructions]
                assert launch.first.op in received
                assert reader.first.microbatch == launch.first.microbatch


class Arriving:
    """A message that is there a while after it was sent."""

    def __init__(self, delay_s: float):
        self.at_s = time.perf_counter() + delay_s

    def block_until_ready(self):
        time.sleep(max(0.0, self.at_s - time.perf_counter()))
        return self


class FakePipeline:
    """Plays a program whose instructions sleep as long as they are said to take."""

    def __init__(self, program: Program, wiring: Wiring, durations: Durations):
        self.program, self.durations, self.mailbox = program, durations, Mailbox()
        self.actions = [
            (launch, functools.partial(self._act, launch)) for launch in launches(program, wiring)
        ]
        self.realized = SimpleNamespace(plan=None)
        stage = SimpleNamespace(programs=SimpleNamespace(devices=()))
        self.stages = [stage] * program.num_stages

    def give_up(self):
        self.mailbox.give_up()

    def _act(self, launch):
        first = launch.first
        if first.is_send:
            delay_s = self.durations.transfer_s(first.op, first.stage, first.peer)
            self.mailbox.post(first, message := Arriving(delay_s))
            return message
        if first.is_receive:
            return self.mailbox.take(first.partner)
        for entry in launch.instructions:
            if entry.is_compute:
                time.sleep(self.durations.compute_s(entry.op)[entry.stage])
        return None


def program_of(schedule: str, num_stages: int, num_microbatches: int) -> tuple[Program, Wiring]:
    wiring = Wiring.chain(num_stages, with_norm=True)
    lists = schedule_by_name(schedule).build(num_stages, num_microbatches)
    return add_communication(lists, wiring), wiring


@pytest.mark.parametrize(
    ("schedule", "kinds"),
    [("gpipe", {"F", "B"}), ("1f1b", {"F", "B", "F+B"}), ("zb_h1", {"F", "I", "W"})],
)
def test_the_clock_finds_the_durations_that_instructions_have(schedule, kinds):
    program, wiring = program_of(schedule, 3, 4)
    durations = Durations(
        forward_s=(0.02, 0.03, 0.02),
        backward_s=(0.04, 0.06, 0.04),
        backward_input_s=(0.02, 0.03, 0.02),
        backward_weight_s=(0.01, 0.03, 0.02),
        synchronize_s=(0.01,) * 3,
        update_s=(0.02,) * 3,
        activation_s={(0, 1): 0.01, (1, 2): 0.01},
        cotangent_s={(1, 0): 0.01, (2, 1): 0.01},
        norm_s=0.005,
    )
    planned = simulate(program, durations)
    spans = _Play(FakePipeline(program, wiring, durations), program).run()
    recording = Recording(1, program, tuple(spans))
    # A thread that sleeps never wakes early; on a machine that is busy, it wakes late.
    assert planned.step_s <= recording.step_s <= 2 * planned.step_s
    assert recording.bubble_fraction == pytest.approx(planned.bubble_fraction, abs=0.15)
    found = {(row.kind, row.where): row for row in compare(planned, [recording])}
    assert {kind for kind, _ in found} == kinds | {"S", "U", "SEND_F", "SEND_B", "SEND_N"}
    for row in found.values():
        assert row.planned_s <= row.measured_s <= row.planned_s + 0.05
    assert found["F", "stage 1"].count == 4
    if "F+B" in kinds:
        assert found["F+B", "stage 2"].planned_s == pytest.approx(0.02 + 0.04)
