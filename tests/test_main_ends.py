"""What a run begins with and leaves behind, through `main.run`: weights, samples, Ctrl-C, fp16."""

import json
import math
import os
import signal

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from launcher import data, main, models
from launcher.cli.compose import load
from launcher.errors import ConfigError
from launcher.models import optimizer
from launcher.models.optimizer import LossScaling

PLAN = ("parallel=manual", "parallel.pp=2", "parallel.tp=2", "parallel.num_microbatches=2")
QUICK = ("logger=jsonl", "model.layers=2", "train.steps=2", "train.eval_batches=2", *PLAN)
ALONE = (
    "logger=jsonl",
    "model.layers=2",
    "train.steps=2",
    "train.eval_batches=0",
    "parallel=single",
)
ELSEWHERE = ("logger=jsonl", "model.layers=2", "parallel=data", "parallel.num_microbatches=1")


pytestmark = pytest.mark.usefixtures("no_new_backend")


@pytest.fixture
def launch(tmp_path):
    """Run a command line in a folder of its own, and give the folder."""

    def call(name: str, *overrides: str):
        run_dir = tmp_path / name
        run_dir.mkdir()
        assert main.run(load(overrides), run_dir) == 0
        return run_dir

    return call


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def summary_of(run_dir):
    return json.loads((run_dir / "summary.json").read_text())


def tiny(config):
    """The model and the data that a config means, on one device."""
    model = models.build(models.resolve(
        config.model, memory_bytes=0, has_accelerator=False, dtype="fp32"
    ))  # fmt: skip
    return model, data.build(config.data, model, config.seed)


def test_weights_are_written_evaluated_and_gone_on_from_under_any_plan(launch):
    first = launch("first", *QUICK, "train.export_weights=true")
    path = first / "weights.safetensors"
    eval_loss = rows_of(first)[-1]["eval_loss"]
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert (metadata["model"], metadata["size"], metadata["step"]) == ("gpt", "tiny", "2")
    assert metadata["overrides"] == "model.layers=2"
    assert "1f1b, 2 microbatches: layers 0-" in metadata["plan"]

    evaluation = launch(
        "eval", *ELSEWHERE, "mode=eval", f"model.weights={path}", "train.eval_batches=2"
    )
    (row,) = rows_of(evaluation)
    assert row == {"step": 2, "eval_loss": pytest.approx(eval_loss, rel=1e-5)}
    summary = summary_of(evaluation)
    assert (summary["status"], summary["eval_loss"]) == ("done", row["eval_loss"])
    assert (summary["steps"], summary["loss"]) == (2, None)

    second = launch(
        "second", *ELSEWHERE, f"model.weights={path}", "train.steps=1", "train.eval_batches=0"
    )
    model, dataset = tiny(load(ELSEWHERE))
    params, batch = load_file(path), dataset.batch(0, 32)
    loss, _ = model.loss(params, {}, batch, np.zeros(2, np.uint32))
    assert rows_of(second)[0]["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_without_weights_the_initial_ones_are_evaluated(launch, caplog):
    caplog.set_level("INFO", "launcher")
    run_dir = launch("eval", *QUICK, "mode=eval")
    assert "step 0/0  eval_loss" in caplog.text
    assert "model.weights is not given: these are the initial weights of seed=0" in caplog.text
    assert "done: evaluated after 0 steps" in caplog.text
    model, dataset = tiny(load(QUICK))
    params, state = model.init(0)
    losses = [
        float(model.eval_loss(params, state, dataset.batch(k, 32, "valid"))[0]) for k in range(2)
    ]
    (row,) = rows_of(run_dir)
    assert row == {"step": 0, "eval_loss": pytest.approx(np.mean(losses), rel=1e-5)}
    assert not (run_dir / "weights.safetensors").exists()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_weights_that_are_not_there_end_before_planning(tmp_path, mode):
    with pytest.raises(ConfigError, match="cannot read model.weights=.*/nowhere") as caught:
        main.run(load([*QUICK, f"mode={mode}", "model.weights=/nowhere"]), tmp_path)
    assert caught.value.exit_status == 2
    assert not list(tmp_path.iterdir())


def test_a_sample_is_written_at_the_end(launch):
    run_dir = launch("run", *ALONE, "train.sample_tokens=6", "train.sample_prompt='To be'")
    text = (run_dir / "sample.txt").read_bytes()
    assert text.startswith(b"To be")
    assert len(text) == 11


def test_what_cannot_be_sampled_is_said_before_planning(tmp_path):
    overrides = ["model=wrn", "logger=jsonl", "train.sample_tokens=5"]
    with pytest.raises(ConfigError, match="wants text of model=wrn, which writes none"):
        main.run(load(overrides), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mode=eval", "train.eval_batches=0"], "mode=eval has nothing to do with train.eval_ba"),
        (["mode=eval", "train.export_weights=true"], "would write the weights that mode=eval was"),
        (["train.sample_tokens=3", "train.sample_prompt=''"], "train.sample_prompt is empty"),
        (["train.sample_temperature=-1"], "train.sample_temperature=-1"),
        (["optimizer.loss_scale=fast", "mode=plan"], "optimizer.loss_scale=fast is neither auto"),
    ],
)
def test_contradictions_are_one_line(tmp_path, overrides, words):
    with pytest.raises(ConfigError, match=words):
        main.run(load(overrides), tmp_path)


def interrupt(*arguments):
    del arguments
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_training_leaves_the_weights_of_the_last_step(tmp_path, monkeypatch):
    step = main.LocalExecutor.step

    def interrupted(executor, placed):
        interrupt()
        return step(executor, placed)

    monkeypatch.setattr(main.LocalExecutor, "step", interrupted)
    overrides = [*ALONE, "train.steps=9", "train.export_weights=true", "train.sample_tokens=5"]
    with pytest.raises(KeyboardInterrupt):
        main.run(load(overrides), tmp_path)
    assert [row["step"] for row in rows_of(tmp_path)] == [1]
    assert (summary_of(tmp_path)["status"], summary_of(tmp_path)["steps"]) == ("interrupted", 1)
    with safe_open(tmp_path / "weights.safetensors", "numpy") as file:
        assert file.metadata()["step"] == "1"
    assert not (tmp_path / "sample.txt").exists()


def test_ctrl_c_in_an_evaluation_leaves_a_summary_without_a_loss(tmp_path, monkeypatch):
    evaluate = main.Evaluation.evaluate

    def interrupted(evaluation, batch):
        interrupt()
        return evaluate(evaluation, batch)

    monkeypatch.setattr(main.Evaluation, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main.run(load([*QUICK, "mode=eval"]), tmp_path)
    assert rows_of(tmp_path) == []
    summary = summary_of(tmp_path)
    assert (summary["status"], summary["eval_loss"]) == ("interrupted", None)


def test_ctrl_c_while_planning_leaves_no_plan(tmp_path, monkeypatch):
    find_plan = main.find_plan

    def interrupted(*arguments):
        interrupt()
        return find_plan(*arguments)

    monkeypatch.setattr(main, "find_plan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main.run(load(QUICK), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]  # what it was at


def test_fp16_finds_its_scale_and_trains(launch, monkeypatch, caplog):
    caplog.set_level("INFO", "launcher")
    # Far too large to begin with, so that the first steps are skipped.
    monkeypatch.setattr(optimizer, "DYNAMIC", LossScaling(scale=2.0**26, dynamic=True))
    run_dir = launch(
        "run", *QUICK, "model.dtype=fp16", "train.steps=14", "train.eval_batches=0",
        "optimizer.warmup_steps=0",
    )  # fmt: skip
    rows = rows_of(run_dir)
    skipped = rows[-1]["skipped_steps"]
    assert 0 < skipped < 10
    assert [row["grad_norm"] is None for row in rows[:skipped]] == [True] * skipped
    scales = [2.0 ** (26 - n) for n in range(1, skipped + 1)]
    assert [row["loss_scale"] for row in rows] == scales + [scales[-1]] * (14 - skipped)
    # Nothing moves before the first update, and then it learns.
    assert rows[skipped]["learning_rate"] == rows[0]["learning_rate"]
    assert rows[-1]["loss"] < rows[skipped]["loss"] - 0.05
    assert summary_of(run_dir)["skipped_steps"] == skipped
    assert f"{skipped} steps skipped, as gradients were not finite" in caplog.text


def test_the_first_good_step_in_fp16_has_the_gradients_of_one_device(launch):
    run_dir = launch("run", *QUICK, "model.dtype=fp16", "train.steps=1", "train.eval_batches=0")
    (row,) = rows_of(run_dir)
    assert row["loss_scale"] == 2.0**16
    model, dataset = tiny(load(QUICK))
    params, state = model.init(0)
    batch = dataset.batch(0, 32)
    gradients = jax.grad(lambda p: model.loss(p, state, batch, np.zeros(2, np.uint32))[0])(params)
    norm = math.sqrt(sum(float(np.sum(np.square(g))) for g in gradients.values()))
    assert row["grad_norm"] == pytest.approx(norm, rel=5e-3)  # fp16 has 11 bits
