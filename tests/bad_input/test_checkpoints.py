"""Checkpoints that somebody made to do harm, or that are none, given with `resume=PATH`."""

import hashlib
import json
import os

import pytest
from bad_inputs import Bad, bad

BODY = {
    "version": 1, "step": 4, "samples": 32, "eval_loss": None,
    "progress": {
        "loss": 2.5, "best_loss": 2.5, "eval_loss": None, "skipped_steps": 0,
        "skipped_in_a_row": 0, "step_s": 1.0, "left_out": [],
    },
    "run": {
        "model": {
            "name": "gpt", "size": "tiny", "dtype": "fp32", "fingerprint": "f", "overrides": {},
        },
        "seed": 0, "dataset": "a text", "global_batch": 8, "origin": None, "config": {}, "plan": "{}",
    },
    "arrays": {"params/x": {"dtype": "float32", "shape": [2], "checksum": "00"}}, "files": {},
}  # fmt: skip


def signed(*path: str, to: object) -> str:
    """A manifest in which one value is another, with a checksum that holds."""
    body = json.loads(json.dumps(BODY))
    place = body
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = to
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    checksum = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return json.dumps({"checksum": checksum, "manifest": body})


def damaged(name: str, manifest: str | bytes, says: str) -> Bad:
    return bad(
        "resume=x", says=f"the checkpoint is damaged at ... {says} ... resume=PATH",
        files={"x/manifest.json": manifest}, status=6, name=name,
    )  # fmt: skip


FILE = {"num_bytes": 1, "checksum": "00"}
HOSTILE = [
    damaged("empty", "", "it is no manifest"),
    damaged("binary", b"\x80\x04\x95", "can't decode"),
    damaged("a list", "[]", "it is no manifest"),
    damaged("deep", "[" * 100_000, "it is no manifest"),
    damaged("unsigned", json.dumps({"checksum": "0", "manifest": BODY}), "the checksum 0 that it"),
    damaged("of the future", signed("version", to=99), "has version 99, and this launcher reads 1"),
    damaged("step -1", signed("step", to=-1), "in place of a count"),
    damaged("step true", signed("step", to=True), "in place of a count"),
    damaged("step NaN", signed("step", to=float("nan")), "in place of a count"),
    damaged("loss of text", signed("progress", "loss", to="rm -rf"), "in place of a number"),
    damaged("left_out of texts", signed("progress", "left_out", to=["a"]), "in place of a count"),
    damaged("no left_out", signed("progress", "left_out", to=None), "it is no manifest"),
    damaged("a plan of numbers", signed("run", "plan", to=[1]), "in place of a text"),
    damaged("files above", signed("files", to={"../../secret": FILE}), "a path inside it"),
    damaged("files of others", signed("files", to={"/etc/passwd": FILE}), "a path inside it"),
    damaged(
        "arrays above",
        signed("arrays", to={"params/../../x": BODY["arrays"]["params/x"]}),
        "a path inside it",
    ),
    damaged("a file that is missing", signed("files", to={"arrays/a": FILE}), "No such file"),
    damaged("_target_", signed("run", to=BODY["run"] | {"_target_": "os.system"}), "it is no manifest"),
    damaged("no arrays on disk", signed("step", to=5), "arrays"),
    bad(
        "resume=x", says="the checkpoint is damaged at ... It is a pipe ... resume=PATH", status=6,
        make=lambda folder: ((folder / "x").mkdir(), os.mkfifo(folder / "x" / "manifest.json")),
        name="a pipe for a manifest",
    ),
    bad("resume=missing", says="resume=missing is no folder ... give a checkpoint"),
    bad("resume=/dev/zero", says="resume=/dev/zero is no folder ... give a checkpoint"),
    bad("resume=x", says="resume=x has no checkpoint ... give a checkpoint", files={"x/a": ""}),
    bad("resume=" + "x" * 5000, says="resume=x ... 5000 characters ... correct it"),
    bad("checkpoint.dir=''", says="checkpoint.dir='' ... give a path"),
    bad("checkpoint.keep=-1", says="checkpoint.keep=-1 is less than 1 ... checkpoint.keep=1 or more"),
    bad("checkpoint.every_minutes=nan", says="checkpoint.every_minutes=nan ... give one"),
    bad("checkpoint.every_steps=soon", says="checkpoint.every_steps=soon ... whole number"),
    bad("replan=perhaps", says="replan=perhaps ... true or false"),
    bad("train.nonfinite_steps=-1", says="train.nonfinite_steps=-1 is less than 0 ... or more"),
    bad("train.max_rollbacks=often", says="train.max_rollbacks=often ... whole number"),
]  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE, ids=str)
def test_it_is_refused(refuse, case):
    refuse(case)
