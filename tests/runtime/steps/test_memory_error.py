"""Device memory that is used up: the line says where, how much, and only the keys that would help."""

from dataclasses import replace

import jax
import numpy as np
import optax
import plans
import pytest
from plans import stage_of

from launcher import models
from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import find_plan
from launcher.autopar.plans.plan import ClusterRef, Prediction
from launcher.autopar.programs.instructions import Instruction, Op
from launcher.config import GptConfig
from launcher.errors import TrainingError
from launcher.models.optimizer import Optimizer
from launcher.runtime.compiled.stage_programs import StagePrograms
from launcher.runtime.steps.local_executor import LocalExecutor
from launcher.runtime.steps.memory_error import (
    Doing,
    bytes_asked_for,
    is_memory_error,
    memory_error,
    memory_errors,
)


class Device:
    """A device that counts its memory, or one that does not."""

    def __init__(self, in_use=None, limit=None):
        self.stats = None if in_use is None else {"bytes_in_use": in_use, "bytes_limit": limit}

    def memory_stats(self):
        return self.stats


def exhausted(text="Out of memory while trying to allocate 3221225472 bytes.\nA table"):
    return jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {text}")


def plan_of(num_stages=2, data=2, tensor=1, microbatches=4, batch=32, layers=4, **stage):
    count, each = data * tensor, layers // num_stages
    stages = [
        stage_of((i * each, (i + 1) * each), mesh=(data, tensor), first=i * count, **stage)
        for i in range(num_stages)
    ]
    per_stage = tuple([0.0] * num_stages)
    predicted = Prediction(
        step_s=1.0, bubble_fraction=0.0, tflops_per_device=0.0, tflops_convention="",
        peak_bytes_per_device=tuple(2.0**30 * (i + 1) for i in range(num_stages)),
        communicated_bytes=0.0, stage_forward_s=per_stage, stage_backward_s=per_stage,
        stage_sync_s=per_stage, stage_update_s=per_stage,
    )  # fmt: skip
    machine = ClusterRef(name="mine", hosts=1, devices_per_host=8)
    return plans.plan_of(
        *stages, cluster=machine, global_batch=batch, num_microbatches=microbatches,
        predicted=predicted,
    )  # fmt: skip


FORWARD = Instruction(op=Op.FORWARD, stage=1, microbatch=0)
UPDATE = Instruction(op=Op.UPDATE, stage=1)


def test_the_line_has_the_place_the_numbers_and_the_keys():
    devices = [Device(7 * 2**30, 8 * 2**30), Device(2**30, 8 * 2**30), Device()]
    error = memory_error(exhausted(), plan_of(), Doing.step(FORWARD), devices)
    assert isinstance(error, TrainingError)
    assert error.exit_status == 5
    assert str(error) == (
        "out of device memory on stage 1 of 2, in the instruction 1F0 (3 GiB asked for at once, "
        "7 GiB in use of the 8 GiB that a device gives, 2 GiB predicted as the peak): "
        "try parallel.num_microbatches=8 (now 4, of 8 samples), or train.global_batch=16 (now 32), "
        "or parallel.recompute=layer (now none), or parallel.zero=3 (now 0), "
        "or parallel.pp=4 (now 2)"
    )


def cures(plan, doing):
    return str(memory_error(exhausted(), plan, doing)).partition("): ")[2]


@pytest.mark.parametrize("doing", [Doing.step(UPDATE), Doing.placing(1)])
def test_microbatches_do_not_help_what_holds_parameters(doing):
    assert cures(plan_of(), doing) == "try parallel.zero=3 (now 0), or parallel.pp=4 (now 2)"


def test_what_is_at_its_end_already_is_not_named():
    # One sample on each device of the data axis, everything recomputed, all in shards, a layer a stage.
    plan = plan_of(microbatches=16, recompute="full", zero=3, layers=2)
    assert cures(plan, Doing.step(FORWARD)) == (
        "no parallel key would lower it on 4 devices: take a cluster with more of them or with more "
        "memory (cluster), or a smaller model.size"
    )


def test_zero_needs_a_data_axis_and_pipelines_need_devices():
    plan = plan_of(num_stages=4, data=1, batch=4, recompute="layer")
    assert cures(plan, Doing.step(FORWARD)) == "try parallel.recompute=full (now layer)"


def test_a_microbatch_keeps_a_sample_for_each_device_of_the_data_axis():
    # 12 samples: 2 microbatches of 6; 3 of 4 is the next that two devices can share.
    assert "num_microbatches=3 (now 2, of 6 samples)" in cures(
        plan_of(microbatches=2, batch=12), Doing.compiling(0)
    )


def test_without_an_instruction_all_stages_count():
    message = str(memory_error(exhausted("something"), plan_of(), None))
    assert message.startswith(
        "out of device memory in a step (2 GiB predicted as the peak): try parallel.num_micro"
    )


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("Out of memory while trying to allocate 123 bytes.", 123),
        ("Out of memory while trying to allocate 5.50GiB.", 5.5 * 2**30),
        ("Failed to allocate request for 640.0KiB (655360B) on device ordinal 0", 640 * 2**10),
        ("Out of memory allocating 1,024 bytes", 1024),
        ("no number", None),
    ],
)
def test_the_amount_is_read_from_xlas_message(text, asked):
    assert bytes_asked_for(f"RESOURCE_EXHAUSTED: {text}") == asked


def test_only_memory_errors_are_turned_into_ours():
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    assert not is_memory_error(other)
    assert not is_memory_error(ValueError("RESOURCE_EXHAUSTED"))
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        memory_errors(plan_of(), Doing.placing(0), ()),
    ):
        raise other
    with (
        pytest.raises(TrainingError, match="on stage 0 of 2, placing its weights"),
        memory_errors(plan_of(), Doing.placing(0), ()),
    ):
        raise exhausted()


def test_an_evaluation_names_its_stage(monkeypatch):
    executor = executor_of(pp=2)
    batch = {n: np.zeros(s.shape, s.dtype) for n, s in executor.model.example_batch(8).items()}
    assert np.isfinite(float(executor.evaluate(batch)))

    def fail(*arguments):
        raise exhausted()

    monkeypatch.setitem(executor._evaluator._executables, "evaluation:1", fail)
    with pytest.raises(TrainingError, match="on stage 1 of 2, in an evaluation .*try parallel"):
        executor.evaluate(batch)


def executor_of(**forced) -> LocalExecutor:
    model = models.build(GptConfig(size="tiny", dtype="fp32", layers=2))
    machine = replace(load_cluster("cpu8"), num_hosts=1, devices_per_host=forced["pp"])
    options = PlanOptions(mode="manual", global_batch=8, num_microbatches=2, **forced)
    realized = find_plan(model, machine, options, lambda text: None).realized
    optimizer = Optimizer(transform=optax.sgd(0.1), clip_norm=None, schedule=lambda step: 0.1)
    grid = np.array(jax.devices()[: forced["pp"]], dtype=object).reshape(1, -1)
    return LocalExecutor(realized, model, optimizer, grid, seed=0)


def step(executor: LocalExecutor):
    tokens = np.zeros((8, 64), np.int32)
    return executor.step(executor.place({"tokens": tokens, "targets": tokens}, 0))


def run_out(*arguments):
    del arguments
    raise exhausted()


@pytest.mark.parametrize(
    ("program", "stage", "said"),
    [
        ("zeros", 1, "making the accumulators of its gradients ("),
        ("forward", 0, "in the instruction 0F0 (3 GiB asked for at once, "),
        ("backward", 0, "in the instruction 0B0 ("),
        ("update", 1, "in the instruction 1U ("),
    ],
)
def test_a_program_that_runs_out_in_the_middle_of_a_step(program, stage, said):
    executor = executor_of(pp=2)
    held = executor.stages[stage]
    held.compiled = replace(held.compiled, **{program: run_out})
    with pytest.raises(TrainingError) as caught:
        step(executor)
    message = str(caught.value)
    assert message.startswith(f"out of device memory on stage {stage} of 2, {said}")
    of_samples = program in ("forward", "backward")
    assert ("parallel.num_microbatches=4 (now 2, of 4 samples)" in message) == of_samples
    assert "parallel.zero" not in message  # no data axis


def test_a_step_of_one_program_that_runs_out():
    executor = executor_of(pp=1)
    executor.steps.take(run_out)
    with pytest.raises(TrainingError, match="on stage 0 of 1, in its step, which is one program"):
        step(executor)


def test_weights_that_do_not_fit(monkeypatch):
    put, calls = jax.device_put, []

    def third_runs_out(*arguments, **options):
        calls.append(arguments)
        return run_out() if len(calls) == 3 else put(*arguments, **options)

    monkeypatch.setattr(jax, "device_put", third_runs_out)
    with pytest.raises(TrainingError, match=r"on stage \d of 2, placing its weights and optimizer"):
        executor_of(pp=2)


@pytest.mark.parametrize("pp", [1, 2])
def test_programs_that_run_out_when_they_are_compiled(monkeypatch, pp):
    monkeypatch.setattr(jax.stages.Lowered, "compile", run_out)
    monkeypatch.setattr(StagePrograms, "init_optimizer", lambda programs, params: None)
    with pytest.raises(
        TrainingError, match=rf"on stage \d of {pp}, compiling its programs \(3 GiB"
    ):
        executor_of(pp=pp)
