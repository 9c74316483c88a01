"""model.target: the one import that a config asks for, and what it may name."""

import sys

import pytest
from bad_inputs import Bad, bad

FORM = "is not of the form package.module:function: give the function that builds the model"
CORRECT = "correct it; debug=true shows where"


def target(text: str, says: str, source: str = "", *more: str) -> Bad:
    files = {"bad_input_model.py": source} if source else {}
    return bad("model=custom", f"model.target='{text}'", *more, files=files, says=says,
               name=f"{text} {source} {' '.join(more)}")  # fmt: skip


def module(source: str, says: str, *more: str) -> Bad:
    return target("bad_input_model:build", says, source, *more)


CASES = [
    bad("model=custom", says="model.target has no value: give model.target=my_package.my_module"),
    *(
        target(text, f"model.target={text} {FORM}")
        for text in ("os", "os:", "a/b:c", "os:a:b", "./a:b")
    ),
    target(
        "no_such_module:f", "no_such_module cannot be imported ... put its folder on PYTHONPATH"
    ),
    target("os:nope", "os has no nope (model.target=os:nope): name a function of it"),
    target("sys:modules", "sys:modules is a dict, not a function ... name a function build"),
    target(
        "os:system",
        f"building the module failed: TypeError ... (model.target=os:system ... {CORRECT}",
    ),
    target(
        "os:system", f"failed: TypeError ... {CORRECT}", "", "+model.args={command: touch pwned}"
    ),
    target("builtins:exit", f"failed: SystemExit ... model.target=builtins:exit ... {CORRECT}"),
    target("builtins:exec", f"failed: TypeError ... model.target=builtins:exec ... {CORRECT}"),
    target("builtins:print", "returned is a NoneType, not an nnx.Module ... return a Flax module"),
    module("1 / 0", "bad_input_model cannot be imported: ZeroDivisionError ... install it, or"),
    module("import sys; sys.exit(3)", "cannot be imported: SystemExit: 3 ... install it, or"),
    module("def build(:", "bad_input_model cannot be imported: SyntaxError ... install it, or"),
    module("build = 3", "is a int, not a function ... name a function build(rngs, **args)"),
    module("def build(rngs): raise ValueError('a\\nb')", f"failed: ValueError: a ... {CORRECT}"),
    module("def build(rngs): raise SystemExit", f"failed: SystemExit ... {CORRECT}"),
    module("def build(rngs): return 3", "is a int, not an nnx.Module ... return a Flax module"),
    module("def build(rngs): pass", f"TypeError ... {CORRECT}", "+model.args={x: 1}"),
]


@pytest.fixture(autouse=True)
def folder_on_path(tmp_path, monkeypatch):
    """Modules of the working folder can be imported, as with `python -m`; and each is a new one."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield
    sys.modules.pop("bad_input_model", None)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_target_that_builds_no_model_is_refused(case, refuse):
    refuse(case)
