"""Plan files that are none, or that no cluster and no model can carry out."""

import json
import os
import pickle

import pytest
from bad_inputs import Bad, bad
from cluster_files import changed_at

ARGUMENTS = ("mode=plan", "parallel=from_file", "parallel.path=p.json")
STAGE = {"hosts": [0], "devices": [0, 1, 2, 3], "layers": [0, 3], "mesh": {"data": 2, "tensor": 2}}
PLAN = {
    "version": 1,
    "model": {"name": "gpt", "size": "tiny"},
    "cluster": {"name": "cpu8", "hosts": 2, "devices_per_host": 4},
    "global_batch": 32,
    "num_microbatches": 4,
    "schedule": "1f1b",
    "stages": [STAGE, {**STAGE, "hosts": [1], "layers": [3, 6]}],
}
TEXT = json.dumps(PLAN)
PATH = "(parallel.path=p.json): correct the path"
KERNEL = "blocks/0/mlp/up/kernel"


def holding(contents: str | bytes, says: str, name: str) -> Bad:
    return bad(*ARGUMENTS, files={"p.json": contents}, says=says, name=name)


def changed(path: str, value: object, says: str) -> Bad:
    """The plan with one value replaced; `path` has dots, and numbers for places in lists."""
    keys = [int(key) if key.isdecimal() else key for key in path.split(".")]
    text = json.dumps(changed_at(PLAN, keys, value))
    return holding(text, says, f"{path}={value}")


NO_PLANS = [
    holding("", "p.json: this is no JSON ... correct it there", "empty"),
    holding("null", "p.json: null is no object: write key-value pairs", "null"),
    holding("[]", "p.json: a list of 0 is no object: write key-value pairs", "a list"),
    holding('"plan"', "p.json: 'plan' is no object: write key-value pairs", "a text"),
    holding(TEXT[:100], "p.json: this is no JSON ... correct it there", "cut short"),
    holding(TEXT.encode("utf-16"), "no UTF-8 text ... (parallel.path=p.json): save it", "utf-16"),
    holding(
        b"\xef\xbb\xbf" + TEXT.encode(), "p.json: this is no JSON ... correct it", "with a BOM"
    ),
    holding(bytes(range(256)), "no UTF-8 text ... (parallel.path=p.json): save it", "binary"),
    holding("[" * 100_000, "p.json: this is no JSON ... correct it there", "deep lists"),
    holding('{"a":' * 100_000, "p.json: this is no JSON ... correct it there", "deep objects"),
    holding('{"version": 1, "version": 1}', "the key 'version' stands there twice: drop", "twice"),
    holding('{"version": NaN}', "NaN is no number of JSON: write a finite number", "NaN"),
    holding('{"version": ' + "9" * 5000 + "}", "this is no JSON ... correct it", "5000 digits"),
    holding('{"version": 1, "\\ud800": 1}', "a key that is no text: write a name", "surrogate"),
    holding(pickle.dumps(PLAN), "no UTF-8 text ... (parallel.path=p.json): save it", "a pickle"),
    holding(" " * (64 * 2**20 + 1), "more than 67108864 bytes (parallel.path=p.json)", "64 MiB"),
]

FILES = [
    bad(*ARGUMENTS, says="there is no plan file p.json ... give the path of the plan.json"),
    bad(
        *ARGUMENTS, make=lambda f: (f / "p.json").mkdir(), says=f"Is a directory {PATH}", name="dir"
    ),
    bad(
        *ARGUMENTS,
        make=lambda f: os.mkfifo(f / "p.json"),
        says=f"It is a pipe ... {PATH}",
        name="fifo",
    ),
    bad(
        *ARGUMENTS,
        make=lambda f: (f / "p.json").symlink_to("/dev/zero"),
        says=f"a device ... {PATH}",
    ),
    bad(
        *ARGUMENTS,
        make=lambda f: (f / "p.json").symlink_to("p.json"),
        says=f"symbolic links {PATH}",
    ),
    bad(
        "mode=plan",
        "plan.compare=p.json",
        files={"p.json": "{}"},
        says="version=null is missing: add",
    ),
    bad(
        "mode=plan",
        "plan.compare=nowhere",
        says="no plan file nowhere ... (plan.compare=nowhere): g",
    ),
    bad("mode=plan", "plan.compare=/dev/zero", says="(plan.compare=/dev/zero): correct the path"),
]

SMALL_PRICES = {
    "step_s": 1, "bubble_fraction": 0, "tflops_per_device": 0, "tflops_convention": "x",
    "communicated_bytes": 0, "peak_bytes_per_device": [], "stage_forward_s": [],
    "stage_backward_s": [], "stage_sync_s": [], "stage_update_s": [],
}  # fmt: skip

WRONG = [
    changed("version", 2, "version=2 is not 1 ... plan again"),
    changed("_target_", "os.system", "_target_='os.system' is unknown: correct or drop it"),
    changed(
        "model._target_", "os.system", "model._target_='os.system' is unknown: correct or drop"
    ),
    changed("stages.0._target_", "x", "stages[0]._target_='x' is unknown: correct or drop it"),
    changed("model.name", "bert", "bert"),
    changed("model.name", "\u202e", "model.name='\\u202e' cannot be printed: keep to letters"),
    changed("model.size", "9b", "(model.size=9b): choose one of tiny"),
    changed("model.fingerprint", "zzz", "model.fingerprint=zzz is not ... or plan again"),
    changed("model.dtype", "fp8", "model.dtype='fp8' is unknown: take fp32 or bf16"),
    changed("model.attention", "x", "model.attention='x' is unknown: take plain or cudnn"),
    changed("model.loss_chunks", 0, "model.loss_chunks=0 is not in 1..1e+15: correct it"),
    changed(
        "cluster.hosts", 10**18, "cluster.hosts=1000000000000000000 is not in 1..1e+15: correct"
    ),
    changed("cluster.groups", [{}], "cluster.groups[0].hosts=null is missing: add it"),
    changed("global_batch", -1, "global_batch=-1 is not in 1..1e+07: correct it"),
    changed("global_batch", 10**14, "global_batch=100000000000000 is not in 1..1e+07: correct it"),
    changed("global_batch", "32", "global_batch='32' is no integer: write a whole number from 1"),
    changed(
        "num_microbatches", 10**18, "num_microbatches=1000000000000000000 ... 1..65536: correct"
    ),
    changed("num_microbatches", 3, "num_microbatches=3 does not divide ... choose a divisor"),
    changed("num_microbatches", True, "num_microbatches=True is no integer: write a whole number"),
    changed("schedule", "fast", "schedule=fast is unknown: take gpipe or 1f1b"),
    changed("schedule", "interleaved", "virtual_stages=1 is less than 2 ... write 2 or more"),
    changed("virtual_stages", 2, "virtual_stages=2 is not 1 ... write 1, or schedule=interleaved"),
    changed("stages", [], "stages"),
    changed("stages", [STAGE] * 20_000, "stages[1].layers=[0, 3] begins at 0 ... write [3, 3]"),
    changed("stages.0", None, "stages[0]=null is no object: write key-value pairs"),
    changed("stages.0.layers", [-1, 3], "stages[0].layers[0]=-1 is not in 0..1e+15: correct it"),
    changed("stages.0.layers", [0, 3, 4], "stages[0].layers=a list of 3 is no pair: write [first"),
    changed("stages.1.layers", [2, 6], "stages[1].layers=[2, 6] begins at 2 ... write [3, 6]"),
    changed("stages.1.layers", [4, 6], "stages[1].layers=[4, 6] begins at 4 ... write [3, 6]"),
    changed("stages.0.hosts", [], "stages[0].hosts=[] has 0 entries ... add one"),
    changed("stages.0.hosts", [9], "stages[0].hosts has 9, outside 0..1 ... (cluster.hosts=10)"),
    changed(
        "stages.0.hosts", [1], "stages[1].devices: device 0 ... give each stage its own devices"
    ),
    changed(
        "stages.0.devices", [0, 1, 2, 10**14], "stages[0].devices has 100000000000000 ... plan"
    ),
    changed(
        "stages.0.devices", [0, 0, 1, 2], "stages[0].devices=[0, 0, 1, 2] names an index twice"
    ),
    changed("stages.0.mesh", {"data": 4, "tensor": 4}, "stages[0].mesh ... change the mesh or the"),
    changed("stages.0.mesh", {"data": 0}, "stages[0].mesh.data=0 is not in 1..1e+15: correct it"),
    changed("stages.0.mesh", {"pipe": 2}, "stages[0].mesh.pipe=2 is unknown: correct or drop it"),
    changed(
        "stages.0.recompute", "some", "stages[0].recompute=some is unknown: take none or layer"
    ),
    changed("stages.0.zero", 7, "stages[0].zero=7 is not in 0..3: choose one of them"),
    changed(
        "stages.0.overlap", "yes", "stages[0].overlap='yes' is no boolean: write true or false"
    ),
    changed("stages.0.scatter", 1, "stages[0].scatter=1 is no boolean: write true or false"),
    changed("stages.0.scatter", True, "stages[0].scatter=true ... write zero 2 or 3, or false"),
    changed("stages.0.params", {"nope": [None]}, "params['nope'] ... drop it"),
    changed("stages.0.params", {KERNEL: ["tensor"]}, "has 1 entry ... write an entry per dim"),
    changed("stages.0.params", {KERNEL: ["x", None]}, "kernel']=x is unknown: take data or tensor"),
    changed("stages.0.params", {KERNEL: ["data"] * 2}, "splits by an axis twice ... drop one"),
    changed("stages.0.params", {"a\nb": []}, "has a key that is no text: write a name"),
    changed("stages.0.optimizer_state", {"nope": [None]}, "optimizer_state['nope'] ... drop it"),
    changed(
        "stages.0.strategies", {"0": ["x"]}, "names no node (stages[].strategies): write it as"
    ),
    changed("stages.0.strategies", {"0": ["9" * 5000 + ":x"]}, "names no node ... write it as"),
    changed("predicted", {**SMALL_PRICES, "step_s": -1}, "predicted.step_s=-1 ... correct it"),
    changed("predicted", SMALL_PRICES, "has 0 entries for 2 stages: drop `predicted`"),
    changed(
        "search", {"wall_s": -1, "ilp_solved": 0, "candidates": 0}, "search.wall_s=-1 ... correct"
    ),
    changed("runners_up", [{}], "runners_up[0].description=null is missing: add it"),
]


@pytest.mark.parametrize("case", [*NO_PLANS, *FILES, *WRONG], ids=str)
def test_a_bad_plan_is_refused(case, refuse):
    refuse(case)
