"""A sample of bad inputs through the real commands: what a user's shell sees."""

import json
import os
import pathlib
import resource
import subprocess
import sys

import pytest
from bad_inputs import LIMIT_S, Bad, Ending, assert_refused, bad, everything_in

ROOT = pathlib.Path(__file__).parents[2]

LAUNCHES = [
    bad("train.steps=-1", says="train.steps=-1 is less than 1: give train.steps=1 or more"),
    bad("model.hiden=3", says="there is no key model.hiden: did you mean model.hidden?"),
    bad("seed=${seed}", says="seed=${seed} cannot be resolved ... or write the value"),
    bad("model.size='\u202ex'", says="(model.size=\\u202ex): choose one of tiny"),
    bad("hydra.run.dir=f/g", files={"f": ""}, status=6, says="take another hydra.run.dir=<folder>"),
    bad("data.path=nowhere", says="data.path=nowhere is no file ... correct the path"),
    bad(
        "model.weights=w",
        make=lambda f: os.mkfifo(f / "w"),
        says="It is a pipe ... give a safetensors",
    ),
    bad(
        "parallel=from_file",
        "parallel.path=p",
        files={"p": "{"},
        says="this is no JSON ... correct it",
    ),
    bad(
        "--config-dir=c", "cluster=x", files={"c/cluster/x.yaml": "a: &a [*a]"}, says="write it out"
    ),
    bad(
        "model=custom", "model.target=os:nope", says="(model.target=os:nope): name a function of it"
    ),
    bad("--multirun", "seed=0,x", says="seed=x is of the wrong type: give a whole number"),
    bad(
        "cluster=8xp3",
        "cluster.device.memory_gib=nan",
        says="memory_gib=nan is not a finite number",
    ),
]


def run(module: str, case: Bad, folder: pathlib.Path) -> Ending:
    """The command in a process of its own, with the CPU time that it took."""
    case.lay_out(folder)
    before_s = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", module, *case.arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    after_s = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after_s.ru_utime - before_s.ru_utime + after_s.ru_stime - before_s.ru_stime
    return Ending(status=done.returncode, stderr=done.stderr, cpu_s=cpu_s)


@pytest.mark.parametrize("case", LAUNCHES, ids=str)
def test_the_launcher_refuses_in_one_line(case, tmp_path):
    ending = run("launcher", case, tmp_path)
    assert_refused(case, ending)
    assert everything_in(tmp_path).keys() <= case.files.keys() | {"c", "c/cluster", "w"}


EMPTY = {"name": "x", "nodes": {"intervals": [], "costs": [], "usages": []},
         "edges": {"nodes": [], "costs": []}}  # fmt: skip
TOOLS = [
    ("launcher.bench", bad(says="no benchmark was named: give one of")),
    ("launcher.bench", bad("speed", says="no benchmark is called 'speed': give one of")),
    ("launcher.bench", bad("paper", "quickly", says="'quickly' is not key=value: write for example")),
    ("launcher.bench", bad("gpu", "zzz=1", says="zzz")),
    ("launcher.bench", bad("contest", "data=nowhere", says="nowhere/reference.csv ... set data=")),
    ("launcher.autopar.solve", bad(says="required: INSTANCE ... --help")),
    ("launcher.autopar.solve", bad("nowhere.json", says="cannot read nowhere.json ... give the path")),
    ("launcher.autopar.solve", bad("/dev/zero", says="cannot read /dev/zero ... give the path")),
    ("launcher.autopar.solve", bad("x.json", "--time-limit=nan", says="--time-limit=nan ... give sec")),
    ("launcher.autopar.solve", bad("x.json", "--method=magic", says="--method: invalid choice")),
    ("launcher.autopar.solve", bad("x", "--out=no/x", status=6, says="--out=no/x ... make it first")),
    ("launcher.autopar.solve", bad("x.json", files={"x.json": "[" * 9999}, says="is not JSON ... give")),
    ("launcher.autopar.solve", bad("x.gz", files={"x.gz": b"no"}, says="cannot read x.gz ... give the")),
    ("launcher.autopar.solve", bad("x.json", says="x.json",
                                   files={"x.json": json.dumps({"problem": {**EMPTY, "nodes": 3}})})),
]  # fmt: skip


@pytest.mark.parametrize(("module", "case"), TOOLS, ids=str)
def test_the_other_commands_refuse_in_one_line(module, case, tmp_path):
    ending = run(module, case, tmp_path)
    assert "Traceback" not in ending.stderr
    assert ending.stderr.count("\n") == 1
    assert ending.status == case.status
    place = 0
    for part in case.says:
        assert part in ending.stderr[place:]
        place = ending.stderr.index(part, place)
    assert ending.cpu_s < LIMIT_S
    assert everything_in(tmp_path).keys() == case.files.keys()
