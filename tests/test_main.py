"""The whole path through `main.run`, in this process, on the eight emulated devices of the tests."""

import json
import pathlib

import pytest

from launcher import main
from launcher.autopar.plans.plan_file import read_plan
from launcher.autopar.text.wording import size
from launcher.cli.compose import load
from launcher.errors import ClusterError, ConfigError, InfeasiblePlanError, PlanError
from launcher.inputs import find_cluster

GOLDEN = pathlib.Path(__file__).parent / "golden" / "plans"
QUICK = ("logger=jsonl", "train.steps=2", "train.eval_batches=1", "parallel.num_microbatches=2")


pytestmark = pytest.mark.usefixtures("no_new_backend")


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir):
    return [row["loss"] for row in rows_of(run_dir) if "loss" in row]


def test_a_run_writes_what_the_interface_lists(tmp_path):
    watched = ("train.profile_steps=[1]", "train.trace_steps=[2]")
    given = [*QUICK, *watched, "parallel=manual", "parallel.tp=2", "parallel.pp=2"]
    assert main.run(load(given), tmp_path) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "plan.json", "plan.html", "metrics.jsonl", "summary.json", "trace.json", "trace.html", "profile",
    } <= names  # fmt: skip
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["timed_steps"] == 0  # both were watched
    assert summary["measured_peak_bytes_per_stage"] is None  # CPU devices do not count
    assert len(summary["predicted_peak_bytes_per_stage"]) == 2
    row = rows_of(tmp_path)[0]
    assert {
        "step", "loss", "learning_rate", "grad_norm", "step_s", "tokens_per_s", "tflops_per_device",
        "mfu", "predicted_step_s", "peak_bytes_per_device",
    } <= row.keys()  # fmt: skip
    assert row["mfu"] is None
    assert "eval_loss" in rows_of(tmp_path)[-1]


def test_a_plan_file_replays_the_run_it_came_from(tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    first.mkdir()
    again.mkdir()
    main.run(load([*QUICK, "parallel=manual", "parallel.dp=2", "parallel.tp=4"]), first)
    path = first / "plan.json"
    replay = [key for key in QUICK if not key.startswith("parallel.")]
    main.run(load([*replay, "parallel=from_file", f"parallel.path={path}"]), again)
    assert losses(again) == losses(first)


def test_a_hand_written_plan_is_completed_and_runs(tmp_path):
    stage = {"hosts": [0], "devices": [0, 1], "mesh": {"data": 1, "tensor": 2}}
    plan = {
        "version": 1,
        "model": {"name": "gpt", "size": "tiny"},
        "cluster": {"name": "cpu8", "hosts": 2, "devices_per_host": 4},
        "global_batch": 32,
        "num_microbatches": 4,
        "schedule": "gpipe",
        "stages": [
            {**stage, "layers": [0, 3], "recompute": "full", "zero": 0},
            {
                **stage,
                "layers": [3, 4],
                "hosts": [1],
                "mesh": {"data": 2},
                "recompute": "none",
                "zero": 2,
            },
        ],
    }
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    out = tmp_path / "run"
    out.mkdir()
    quick = [key for key in QUICK if not key.startswith("parallel.")]
    assert main.run(load([*quick, "parallel=from_file", f"parallel.path={path}"]), out) == 0
    completed = json.loads((out / "plan.json").read_text())
    assert completed["stages"][0]["params"]
    assert completed["stages"][1]["strategies"]


def test_a_plan_of_another_family_is_refused(tmp_path):
    plan = json.loads((GOLDEN / "two_stages.json").read_text())
    plan["model"] = {"name": "moe", "size": "tiny"}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    with pytest.raises(PlanError, match="the plan is for model=moe, and .* is model=gpt"):
        main.run(load(["mode=plan", "parallel=from_file", f"parallel.path={path}"]), tmp_path)


def spoiled(text, how):
    """A plan file that is not what it should be."""
    tree = json.loads(text)
    match how:
        case "version":
            return json.dumps(tree | {"version": 2})
        case "size":
            return json.dumps(tree | {"model": tree["model"] | {"fingerprint": "0" * 16}})
        case "truncated":
            return text[: len(text) // 2]
        case "NaN":
            return text.replace('"global_batch": 32', '"global_batch": NaN')
        case "shape":
            tree["stages"][0]["params"] = {"embedding/token": [None]}
            return json.dumps(tree)
        case "layers":
            tree["stages"][0]["layers"] = [0, 4000]
            return json.dumps(tree)


BAD_FILES = {
    "version": r"version=2 is not 1, the one that this launcher reads",
    "size": r"model\.fingerprint=0{16} is not .*, or plan again",
    "truncated": r"this is no JSON, .* correct it there",
    "NaN": r"NaN is no number of JSON",
    "shape": r"has 1 entry, and the tensor has 2 dims",
    "layers": r"num_layers=|stages\[0\]\.layers",
}


@pytest.fixture(scope="module")
def plan_text(tmp_path_factory):
    """The plan.json of a run."""
    folder = tmp_path_factory.mktemp("planned")
    main.run(load([*QUICK, "mode=plan", "cluster=cpu8", "parallel=data"]), folder)
    return (folder / "plan.json").read_text()


@pytest.mark.parametrize("key", ["parallel.path", "plan.compare"])
@pytest.mark.parametrize("how", BAD_FILES)
def test_a_bad_plan_file_is_a_user_error_of_one_line(how, key, plan_text, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(spoiled(plan_text, how))
    source = ["parallel=from_file"] if key == "parallel.path" else ["parallel=data"]
    given = ["mode=plan", "logger=jsonl", "cluster=cpu8", *source, f"{key}={path}"]
    with pytest.raises(ConfigError, match=BAD_FILES[how]) as caught:
        main.run(load(given), tmp_path)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.json"]


def test_a_plan_answers_what_it_is_asked(plan_text, tmp_path, caplog):
    caplog.set_level("INFO", "launcher")
    path = tmp_path / "other.json"
    path.write_text(plan_text)
    overrides = [
        *QUICK, "mode=plan", "cluster=cpu8", "parallel=manual", "parallel.tp=2", f"plan.compare={path}",
        "plan.why_not=[{pp: 2, tp: 4}, {tp: 3}]", "train.tokens=1e6",
    ]  # fmt: skip
    assert main.run(load(overrides), tmp_path) == 0
    page = (tmp_path / "plan.html").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    predicted = json.loads((tmp_path / "plan.json").read_text())["predicted"]
    steps = -(-1_000_000 // (32 * 64))
    assert summary["status"] == "planned"
    assert summary["budget_steps"] == steps
    assert summary["budget_s"] == pytest.approx(steps * predicted["step_s"])
    for text in (
        f"1 million tokens are {steps:,} steps of 2,048 tokens: ",
        "times slower than this plan",
        "pp=2 tp=4",
        "parallel.tp=3 cannot share out",
    ):
        assert text in " ".join(caplog.text.split()), text
        assert text in page, text


def test_a_plan_file_brings_its_size_to_another_cluster(plan_text, tmp_path):
    """Left to the cluster, `auto` would be the largest size that fits."""
    path = tmp_path / "given.json"
    path.write_text(plan_text)
    given = ["mode=plan", "logger=jsonl", "cluster=8xp3", "parallel=from_file"]
    assert main.run(load([*given, f"parallel.path={path}"]), tmp_path) == 0
    replayed = json.loads((tmp_path / "plan.json").read_text())
    assert replayed["model"]["size"] == "tiny"
    assert replayed["cluster"] == {"name": "8xp3", "hosts": 8, "devices_per_host": 8}
    with pytest.raises(
        PlanError, match="is for model.size=tiny, and the model to train is model.size=125m"
    ):
        main.run(load([*given, f"parallel.path={path}", "model.size=125m"]), tmp_path)


def test_tokens_of_images_are_refused(tmp_path):
    given = ["mode=plan", "model=wrn", "logger=jsonl", "train.tokens=1e9"]
    with pytest.raises(ConfigError, match=r"train\.tokens=1e\+09 .* model=wrn .*train\.steps"):
        main.run(load(given), tmp_path)


def test_planning_alone_needs_no_device_and_no_data(tmp_path, monkeypatch):
    monkeypatch.setattr(main.devices, "acquire", None)
    monkeypatch.setattr(main.data, "build", None)
    overrides = ["mode=plan", "cluster=1xp3", "model.size=350m", "parallel=data", "logger=jsonl"]
    assert main.run(load(overrides), tmp_path) == 0
    assert json.loads((tmp_path / "plan.json").read_text())["model"]["size"] == "350m"


def test_a_cluster_that_is_not_there_ends_with_the_ways_on(tmp_path):
    overrides = ["cluster=1xp3", "model.size=tiny", "parallel=data", "logger=jsonl"]
    with pytest.raises(ClusterError, match=r"needs 1 x 8 V100.*runtime=emulate"):
        main.run(load(overrides), tmp_path)
    assert (tmp_path / "plan.json").is_file()


def test_emulation_runs_any_cluster(tmp_path, caplog):
    caplog.set_level("INFO", "launcher")
    overrides = [*QUICK, "cluster=1xp3", "runtime=emulate", "model.size=tiny", "parallel=zero"]
    assert main.run(load(overrides), tmp_path) == 0
    assert rows_of(tmp_path)[0]["mfu"] is None
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["measured_over_predicted_step_s"] is None
    assert "not to be compared, and no MFU: CPU devices stand for V100" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["parallel=manual", "parallel.tp=3"], ConfigError, "parallel.tp=3"),
        (["parallel.num_microbatches=5"], ConfigError, "parallel.num_microbatches=5"),
        (["model.heads=7"], ConfigError, "model.heads=7"),
        (["parallel.tp=3"], ConfigError, "parallel.tp=1, 2 or 4"),
        (["parallel.ep=2"], ConfigError, "parallel.ep=2 splits experts, and the model has none"),
        (["parallel=manual", "parallel.tp=8"], ConfigError, "parallel.tp=8"),
        (["parallel=from_file", "parallel.path=/nowhere.json"], PlanError, "nowhere"),
        (["model.size=6.7b", "parallel=data", "train.global_batch=8"], InfeasiblePlanError, "GiB"),
    ],
)
def test_what_the_user_got_wrong_is_said_in_one_line(tmp_path, overrides, error, words):
    with pytest.raises(error, match=words) as caught:
        main.run(load(["logger=jsonl", "mode=plan", *overrides]), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (["cluster=cpu8"], 8),
        (["cluster=8xp3", "runtime=emulate"], 64),
        (["cluster=8xp3", "mode=plan", "plan.audit=true"], 64),
        (["cluster=8xp3", "mode=plan"], None),
    ],
)
def test_cpu_devices_stand_in_where_no_accelerator_is_wanted(monkeypatch, given, count):
    asked: list[int] = []
    monkeypatch.setattr(main.devices, "emulate", asked.append)
    find_cluster(load(given))
    assert asked == ([] if count is None else [count])


@pytest.mark.parametrize(("free_gib", "is_told"), [(0.0001, True), (1000, False), (None, False)])
def test_more_than_the_machine_has_is_told_before_compiling(
    tmp_path, monkeypatch, caplog, free_gib, is_told
):
    class BegunError(Exception):
        """Compiling would begin."""

    def begin(*arguments, **named):
        raise BegunError

    free_bytes = None if free_gib is None else int(free_gib * 2**30)
    monkeypatch.setattr(main, "free_memory_bytes", lambda: free_bytes)
    monkeypatch.setattr(main, "LocalExecutor", begin)
    given = [*QUICK, "parallel=manual", "parallel.tp=2", "parallel.pp=2", "runtime=emulate"]
    with pytest.raises(BegunError):
        main.run(load(given), tmp_path)
    plan = read_plan(tmp_path / "plan.json")
    needed_bytes = 4 * sum(plan.predicted.peak_bytes_per_device)
    told = [
        r.getMessage() for r in caplog.records if "share this machine's memory" in r.getMessage()
    ]
    assert len(told) == is_told
    if told:
        assert told[0].startswith(f"the plan needs {size(needed_bytes)} on 8 CPU devices together")
        assert "and 105 KiB are free of it (model.size=tiny, cluster=" in told[0]
        assert "mode=plan" in told[0]
