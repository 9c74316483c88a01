"""The GPU benchmark: its command line, a small run on the CPU, its table and bar, and PyTorch's model."""

import dataclasses
import json
import subprocess

import jax
import numpy as np
import pytest

from launcher import models
from launcher.autopar.clusters.cluster import cluster_at_hand
from launcher.autopar.make_plan import Planned
from launcher.bench import gpu, gpu_steps, torch_gpt
from launcher.bench.__main__ import main
from launcher.bench.gpu_steps import Task, Timed
from launcher.bench.plain_steps import draw_batch
from launcher.bench.step_timing import median_step_s
from launcher.config import GptConfig
from launcher.errors import InfeasiblePlanError
from launcher.models.model import Model
from launcher.models.sizes import gpt_size
from launcher.runtime.records.metrics import Meter

TASK = Task(size="1.3b", batch=8, seq_len=2048, steps=20)
TINY = GptConfig(size="tiny", dtype="fp32", layers=2, seq_len=16, dropout=0.0)


@pytest.fixture
def no_torch(monkeypatch):
    monkeypatch.setattr(gpu_steps.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=tiny"], "gpu has no key 'model': it has models, steps, batch"),
        (["models=39b"], "models='39b': choose from tiny, 350m, 1.3b"),
        (["peers=jax"], "peers='jax': choose from plain, torch"),
        (["attention=flash"], "attention='flash': choose from auto, plain, cudnn"),
        (["loss_chunks=3"], "loss_chunks='3': choose from 1, 2, 4, 8, 16"),
        (["recompute=some"], "recompute='some': choose from none, layer, full"),
        (["batch=0"], "batch='0' is no positive whole number: write for example batch=8"),
        (["microbatches=x"], "microbatches='x' is no positive whole number"),
    ],
)
def test_what_the_command_line_does_not_take(arguments, message, capsys):
    assert main(["gpu", *arguments]) == 2
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.slow  # it sets up the devices, and must be the first in its process to touch JAX
def test_without_a_gpu_only_tiny_runs(capsys):
    assert main(["gpu", "models=tiny,350m", "peers=plain"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("models=350m needs 1 GPU, and this machine has 0 (cpu): run it where")
    assert "models=tiny" in error


@pytest.mark.slow  # it sets up the devices, and must be the first in its process to touch JAX
@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize(
    ("recompute", "microbatches", "planned"),
    [
        ("none", 1, "1 microbatch, recomputation none"),
        pytest.param("layer", 2, "2 microbatches, recomputation layer", marks=pytest.mark.slow),
    ],
)
def test_a_small_run_on_the_cpu(recompute, microbatches, planned, tmp_path, capsys):
    choices = [f"recompute={recompute}", f"microbatches={microbatches}"]
    settings = ["models=tiny", "steps=2", "batch=4", "seq_len=16", f"profile={tmp_path}", *choices]
    assert main(["gpu", *settings]) == 0
    shown = capsys.readouterr().out
    assert f"jax {jax.__version__}\nthis is no GPU: the times say nothing of one" in shown
    assert f"computing in fp32; 4 x 16 tokens in {planned}, predicted" in shown
    rows = {line[:10].strip(): line for line in shown.splitlines()}
    assert "unknown" in rows["launcher"]  # the MFU
    assert rows["plain jit"].endswith("x as fast")
    assert "torch left out: torch is not installed" in shown
    assert "no bar for tiny at sequence 16" in shown
    assert list((tmp_path / "tiny" / "profile" / "step_1").rglob("*.xplane.pb"))


def best_on(memory_bytes: int, chunks=(1,), **changes) -> tuple[Model, Planned]:
    """The best of plans of one microbatch."""
    cluster = cluster_at_hand(kind="NVIDIA H100 80GB HBM3", count=1, memory_bytes=memory_bytes)
    task = dataclasses.replace(TASK, size="tiny", seq_len=512, **changes)
    variants = [gpu_steps.build_model(task, cluster, number) for number in chunks]
    assert {model.dtype for model in variants} == {"bf16"}
    return gpu_steps.best_plan(variants, cluster, 8, ["none", "layer"], 1)


def plan_on(memory_bytes: int) -> Planned:
    """A plan with plain attention: it takes 299 MiB, or 92 MiB with recomputation by layers."""
    return best_on(memory_bytes, attention="plain")[1]


def test_on_a_gpu_that_has_it_attention_is_cudnns():
    model, planned = best_on(2**30, chunks=(1, 8))
    assert (model.kernels.attention, model.kernels.loss_chunks) == ("cudnn", 1)
    assert planned.plan.stages[0].recompute == "none"


@pytest.mark.parametrize(("memory_bytes", "choice"), [(2**30, "none"), (2**27, "layer")])
def test_the_fastest_plan_that_fits_is_taken(memory_bytes, choice):
    assert plan_on(memory_bytes).plan.stages[0].recompute == choice


def test_a_model_that_does_not_fit_has_no_plan():
    needed = "92.5 MiB for layers 0-5 of 6 on a device that has 16 MiB"
    with pytest.raises(InfeasiblePlanError, match=needed):
        plan_on(2**24)


def test_a_plain_step_out_of_memory_is_left_out_and_other_errors_are_not(monkeypatch):
    planned, model = plan_on(2**30), models.build(TINY)

    def fail_with(text):
        def plain_step(*_, **__):
            raise jax.errors.JaxRuntimeError(text)

        monkeypatch.setattr(gpu_steps.plain_steps, "plain_step", plain_step)

    fail_with("RESOURCE_EXHAUSTED: Out of memory")
    left_out = Timed(who="plain jit", left_out="out of device memory")
    assert gpu_steps.time_plain(planned, model, steps=1) == left_out
    fail_with("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        gpu_steps.time_plain(planned, model, steps=1)


def test_a_table_has_throughput_mfu_and_ratios():
    meter = Meter(
        model_flops_per_step=1e14, num_devices=1, peak_flops_per_s=1e15, global_batch=8,
        units_per_sample=2048, sample_unit="tokens", predicted_step_s=None,
    )  # fmt: skip
    times = [
        Timed(who="launcher", step_s=0.2),
        Timed(who="plain jit", step_s=0.25),
        Timed(who="torch", left_out="torch is not installed"),
    ]
    head, ours, peer, left_out = gpu.table(meter, times)
    assert head.split()[:3] == ["step", "tokens/s", "TFLOP/s"]
    assert ours.split() == ["launcher", "200", "ms", "81,920", "500", "50.0", "%"]
    assert peer.split()[-4:] == ["1.25", "x", "as", "fast"]
    assert left_out == "torch left out: torch is not installed"


@pytest.mark.parametrize(
    ("task", "mfu", "passed", "verdict"),
    [
        (TASK, 0.51, True, "MFU 51.0 % (bar 50.0 %: kept)"),
        (TASK, 0.49, False, "MFU 49.0 % (bar 50.0 %: missed)"),
        (TASK, None, True, "bar 50.0 %: not judged, the peak of this device is not known"),
        (dataclasses.replace(TASK, seq_len=1024), 0.1, True, "no bar for 1.3b at sequence 1024"),
    ],
)
def test_the_bar_is_that_of_one_model_and_length(task, mfu, passed, verdict):
    assert gpu.judged(task, mfu) == (passed, verdict)


def test_a_group_of_steps_waits_once():
    waits = []
    step_s = median_step_s(lambda: len(waits), waits.append, steps=20)
    assert len(waits) == 3 + 5  # the warm-up, and 5 groups of 4
    assert 0 < step_s < 1


@pytest.mark.parametrize(
    ("status", "out", "err", "expected"),
    [
        (1, "", "Traceback\nRuntimeError: no", Timed(
            who="torch", left_out="its process ended with 1: RuntimeError: no")),
        (-9, "", "", Timed(who="torch", left_out="its process ended with -9: no message")),
        (0, '{"left_out": "out of device memory"}', "", Timed(
            who="torch", left_out="out of device memory")),
        (0, 'a warning\n{"step_s": 0.5, "num_microbatches": 2, "version": "2.9"}', "", Timed(
            who="torch 2.9, 2 microbatches", step_s=0.5)),
    ],
)  # fmt: skip
def test_what_the_torch_process_says_is_a_time_or_a_reason(status, out, err, expected, monkeypatch):
    requests = []

    def run(command, **_):
        requests.append(json.loads(command[-1]))
        return subprocess.CompletedProcess(command, status, out, err)

    monkeypatch.setattr(gpu_steps.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(gpu_steps.subprocess, "run", run)
    assert gpu_steps.time_torch(TASK) == expected
    assert requests[0]["size"]["hidden"] == requests[0]["size"]["seq_len"] == 2048


def test_torch_has_our_weights():
    shapes = torch_gpt.shapes(dataclasses.asdict(gpt_size(TINY)))
    ours = {path: leaf.shape for path, leaf in models.build(TINY).abstract_params.items()}
    assert shapes == ours


def test_torch_computes_our_loss_and_gradients():
    torch = pytest.importorskip("torch")
    model = models.build(TINY)
    params, state = model.init(0)
    batch = draw_batch(model, 2)
    key = np.zeros(2, np.uint32)
    ours, grads = jax.value_and_grad(lambda p: model.loss(p, state, batch, key)[0])(params)
    weights = {
        path: torch.tensor(np.asarray(value), requires_grad=True) for path, value in params.items()
    }
    tokens, targets = (torch.tensor(batch[name]).long() for name in ("tokens", "targets"))
    size = dataclasses.asdict(gpt_size(TINY))
    loss = torch_gpt.make_loss(size, torch.float32)(weights, tokens, targets)
    loss.backward()
    assert loss.item() == pytest.approx(float(ours), rel=1e-6)
    for path, weight in weights.items():
        np.testing.assert_allclose(weight.grad.numpy(), grads[path], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
# PyTorch's compiler imports parts of PyTorch that PyTorch deprecates.
@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_torch_trains_where_it_is_installed():
    pytest.importorskip("torch")
    size = dataclasses.asdict(gpt_size(TINY))
    answer = torch_gpt.measure(size, batch=2, steps=1, device="cpu")
    assert answer["num_microbatches"] == 1
    assert answer["step_s"] > 0
