"""Command lines that cannot be read, name what is not there, or lead where they should not."""

import pathlib

import pytest
from bad_inputs import Bad, bad

QUOTES = "cannot be read ... needs quotes inside the shell's, such as"
LONG = "x" * 100_000


def unreadable(argument: str, **rest) -> Bad:
    return bad(argument, says=QUOTES, **rest)


SYNTAX = [
    bad("", says="'' names no key: write key=value"),
    bad(" ", says="' ' names no key: write key=value"),
    bad("=1", says="'=1' names no key: write key=value"),
    bad("++=1", says="'++=1' names no key: write key=value"),
    bad("~", says="'~' names no key: write key=value"),
    bad(".", says=". has no value: write .=<value>"),
    bad("train.steps", says="train.steps has no value: write train.steps=<value>"),
    bad("--nope", says="unrecognized arguments: --nope ... takes key=value"),
    bad("-x", "seed=1", says="unrecognized arguments ... takes key=value"),
    bad("--cfg", says="argument --cfg/-c: expected one argument ... (see --help)"),
    *map(unreadable, ("..=1", "train..steps=1", "seed={", "seed=]", "seed='", "data.path=a=b")),
    bad("seed=" + "[" * 3000, says="seed=[[ ... cannot be read", name="3000 brackets"),
    bad(
        "plan.why_not=" + "[" * 300 + "]" * 300,
        says="plan.why_not=[[ ... brackets inside one another: write fewer",
    ),
    bad("seed=" + "9" * 100_000, says="value has 100000 digits ... correct it there"),
    bad("seed=int('x')", says="seed=int('x') cannot be read ... needs quotes"),
    bad("seed=1,2", says="seed=1,2 has several values: add --multirun to sweep over them"),
    bad("seed=choice(1,2)", says="seed=choice(1,2) has several values: add --multirun"),
]

UNKNOWN = [
    bad("model.hiden=3", says="there is no key model.hiden: did you mean model.hidden?"),
    bad("modle=gpt", says="modle=gpt: there is no key modle: did you mean mode or model?"),
    bad("zzz=1", says="zzz=1: there is no key zzz: see all keys with --cfg job"),
    bad("+zzz=1", says="+zzz=1: there is no key zzz: see all keys"),
    bad("++train.foo=1", says="++train.foo=1: there is no key train.foo: train has steps"),
    bad("~zzz", says="~zzz is not there with that value: leave it out"),
    bad("~train.steps", says="~train.steps cannot be taken out: give it a value"),
    bad("+train.steps=1", says="+train.steps=1 is there already: write train.steps=1"),
    bad(
        "model.experts=4", says="model.experts=4 is a key of model=moe only: leave it out, or take"
    ),
    bad("model=gptt", says="model=gptt is unknown: did you mean model=gpt?"),
    bad("cluster=8xp33", says="cluster=8xp33 is unknown: did you mean cluster=8xp3?"),
    bad("cluster=''", says="cluster= is unknown: take one of 1xp3, 8xp3"),
    bad("model=", says="model= is unknown: take one of custom, gpt"),
    bad("cluster=/etc/passwd", says="cluster=/etc/passwd is unknown: take one of 1xp3"),
    bad("model=../../secret", says="model=../../secret leads out of the folders ... --config-dir="),
    bad("cluster=../cluster/local", says="leads out of the folders ... give an option of cluster"),
    bad("resume=../nope", "mode=plan", says="resume=../nope"),
    bad("model=[gpt,moe]", says="moe and gpt are options of one group ... choose one of them"),
    bad("model@cluster=gpt", says="model@cluster ... append to your default list"),
    bad("logger=null", says="logger=null): correct it there"),
    bad("checkpoint.evry=1", "mode=plan", says="checkpoint.evry=1"),
    bad("mode=tune", says="mode=tune is unknown: take mode=train or plan"),
    bad("model.dtype=", says="model.dtype= is unknown: take model.dtype=auto or fp32"),
    bad("model.size=9b", says="no size '9b' (model.size=9b): choose one of tiny"),
]

TEXTS = [
    bad("mode='tr\nain'", says="mode=tr ain is unknown: take mode=train or plan"),
    bad("model.size='\u202eabc'", says="model.size=\\u202eabc): choose one of tiny"),
    bad("mode=\u202etrain", says="mode=\\u202etrain cannot be read ... needs quotes"),
    bad("\U0001f600=1", says="\U0001f600=1 cannot be read ... needs quotes"),
    bad("model.size='\x1b[31m'", says="model.size=\\x1b[31m): choose one of tiny"),
    bad(f"model.size='{LONG}'", says="more characters ... or auto"),
    bad(LONG, says="more characters ... has no value: write", name="a long word"),
    bad(f"{LONG}=1", says="File name too long ... correct it there", name="a long key"),
    bad(
        f"model={'x' * 300}",
        says="more characters ... is unknown: take one of",
        name="a long option",
    ),
    bad("data.path=''", says="data.path='' is empty and names no file: give a path"),
    bad("parallel.path=''", "parallel=from_file", says="parallel.path='' is empty ... give a path"),
    bad("model.weights=''", says="model.weights='' is empty ... give a path, or leave it out"),
    bad("plan.compare=''", says="plan.compare='' is empty ... give a path, or leave it out"),
    bad(f"data.path={LONG}", says="data.path=xxx ... has 100000 characters ... correct it"),
    bad(f"data.path={'x' * 300}", says="cannot look up data.path=xxx ... correct the path"),
    bad(f"model.weights={'x' * 300}", says="model.weights=xxx ... File name too long ... give a"),
    bad("runtime.compilation_cache=''", says="(runtime.compilation_cache=): give another, auto"),
    bad(
        "runtime.compilation_cache=/dev/null/x",
        says="(runtime.compilation_cache=/dev/null/x): give",
    ),
]

CANNOT = "cannot be resolved ... correct the name in ${...}, or write the value"
INTERPOLATIONS = [
    bad(argument, *more, says=f"{argument} {CANNOT}")
    for argument, *more in (
        ("train.steps=${nope}",),
        ("train.steps=${train.steps}",),
        ("train.steps=${train.eval_every}", "train.eval_every=${train.steps}"),
        ("model.size=${model}",),
        ("logger.project=${train}",),
        ("seed=${nope:1}",),
        ("seed=${eval:1+1}",),
        ("seed=${oc.decode:'[1'}",),
        ("model.size=${hydra:nope}",),
        ("train.steps=${oc.env:LAUNCHER_NO_SUCH_VARIABLE}",),
        ("train.steps=${oc.env:PATH}",),
    )
]


def a_file(folder: pathlib.Path) -> None:
    (folder / "file").write_text("in the way")


ANOTHER = "take another hydra.run.dir=<folder>"
HYDRA = [
    bad("hydra.run.dir=file", make=a_file, status=6, says=f"/file' ... {ANOTHER}"),
    bad("hydra.run.dir=file/in", make=a_file, status=6, says=f"file/in' ... {ANOTHER}"),
    bad("hydra.run.dir=/proc/x", status=6, says=f"'/proc/x' ... {ANOTHER}"),
    bad(f"hydra.run.dir={'x' * 300}", status=6, says=f"File name too long ... {ANOTHER}"),
    bad("hydra.run.dir=''", says="hydra.run.dir='' names no folder: give one, or . for this one"),
    bad("hydra.run.dirr=x", says="hydra.run.dirr=x ... did you mean hydra.run.dir?"),
    bad("hydra.run.dir=${nope}", says=f"hydra.run.dir=${{nope}} {CANNOT}"),
    bad("+hydra.callbacks.x._target_=os.system", says="'os.system' is blocklisted ... correct it"),
    bad("--config-dir=nowhere", says="--config-dir=nowhere is no folder: correct the path"),
    bad("--config-dir=file", make=a_file, says="--config-dir=file is no folder: correct the path"),
    bad("--config-name=nowhere", says="Cannot find primary config 'nowhere' ... correct it there"),
    bad(
        "--config-name=cluster/local", says="the primary config does not start ... let its defaults"
    ),
    bad(
        "--multirun",
        "seed=range(0,-1)",
        says="seed=range(0,-1) stands for 0 values ... such as seed=",
    ),
    bad("--multirun", "model=glob(x*)", says="model=glob(x*) stands for 0 values ... give a list"),
    bad(
        "--multirun",
        "seed=interval(0,1)",
        says="seed=interval(0,1) is no list ... such as seed=1,2,3",
    ),
    bad(
        "--multirun", "train.steps=1,two", says="train.steps=two is of the wrong type: give a whole"
    ),
    bad(
        "--multirun",
        "seed=1,2",
        "model=gptt",
        says="model=gptt is unknown: did you mean model=gpt?",
    ),
]

CASES = [*SYNTAX, *UNKNOWN, *TEXTS, *INTERPOLATIONS, *HYDRA]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_command_line_that_cannot_be_meant_is_refused(case, refuse):
    refuse(case)
