"""Plan files: there and back, what may be left out, and that nothing malformed gets through."""

import copy
import dataclasses
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.autopar.plans import plan_file
from launcher.autopar.plans.plan import Plan
from launcher.autopar.plans.plan_checks import check_without_model
from launcher.autopar.plans.plan_file import from_json, read_plan, to_json, write_plan
from launcher.errors import PlanError, StorageError

BY_HAND = {
    "version": 1,
    "model": {"name": "gpt", "size": "tiny"},
    "cluster": {"name": "cpu8", "hosts": 2, "devices_per_host": 4},
    "global_batch": 32,
    "num_microbatches": 8,
    "schedule": "1f1b",
    "stages": [
        {"layers": [0, 2], "hosts": [0], "devices": [0, 1, 2, 3], "mesh": {"tensor": 4}},
        {"layers": [2, 4], "hosts": [1], "devices": [0, 1, 2, 3], "mesh": {"tensor": 2, "data": 2}},
    ],
}
REUSED_FIXTURES = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150
)


def changed(path: str, value: object) -> str:
    """The hand-written plan with one value replaced, as JSON; a path is of keys and numbers."""
    tree = copy.deepcopy(BY_HAND)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    node = tree
    for key in parents:
        node = node[key]
    node[last] = value
    return json.dumps(tree)


def test_a_plan_comes_back_as_it_went(plan, tmp_path):
    path = tmp_path / "plan.json"
    write_plan(plan, path)
    assert read_plan(path) == plan
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("key", ["overlap", "scatter"])
def test_what_few_stages_do_is_written_where_they_do_it(plan, key):
    first, second = plan.stages
    assert key not in to_json(plan)
    changed_plan = dataclasses.replace(
        plan, stages=(first, dataclasses.replace(second, **{key: True}))
    )
    text = to_json(changed_plan)
    assert [stage.get(key) for stage in json.loads(text)["stages"]] == [None, True]
    assert from_json(text) == changed_plan


def test_the_layout_is_stable_and_readable(plan, golden):
    golden("plans/two_stages.json", to_json(plan))


def test_a_plan_by_hand_leaves_out_what_the_solver_knows(cpu8):
    plan = from_json(json.dumps(BY_HAND))
    check_without_model(plan, None, cpu8)
    assert (plan.num_layers, plan.predicted, plan.virtual_stages) == (4, None, 1)
    assert (plan.model.fingerprint, plan.model.dtype) == (None, None)
    assert plan.stages[0].params == {}
    assert plan.stages[0].mesh == (("data", 1), ("tensor", 4))
    assert plan.stages[1].mesh == (("data", 2), ("tensor", 2))


MISTAKES = [
    ("version", 2, "version=2 is not 1, the one that this launcher reads"),
    ("version", None, "version=null is no integer"),
    ("versoin", 1, "versoin=1 is unknown: correct or drop it; the file has version, model"),
    ("global_batch", True, "global_batch=True is no integer"),
    ("global_batch", 32.0, "global_batch=32.0 is no integer"),
    ("global_batch", 0, "global_batch=0 is not in 1.."),
    ("schedule", 1, "schedule=1 is no text"),
    ("schedule", "1f1b\n", "cannot be printed"),
    ("stages", {}, "stages=an object of 0 is no list"),
    ("stages.1.mesh", {"data": 4, "model": 1}, "stages[1].mesh.model=1 is unknown"),
    ("stages.1.mesh", [4, 1], "stages[1].mesh=a list of 2 is no object"),
    ("stages.1.mesh.data", 0, "stages[1].mesh.data=0 is not in 1.."),
    ("stages.0.layers", [0, 1, 2], "stages[0].layers=a list of 3 is no pair"),
    ("stages.0.hosts", [-1], "stages[0].hosts[0]=-1 is not in 0.."),
    ("stages.0.params", {"a": [1]}, "stages[0].params.a[0]=1 is no text"),
    ("stages.0.params", {"": []}, "has a key that is no text"),
    ("stages.0.strategies", {"a": "b"}, "stages[0].strategies.a='b' is no list"),
    ("predicted", {}, "predicted.step_s=null is missing: add it"),
    ("model", {"name": "gpt"}, "model.size=null is missing"),
    ("search", {"wall_s": "1"}, "search.ilp_solved=null is missing"),
    ("search", {"wall_s": -1, "ilp_solved": 0, "candidates": 0}, "search.wall_s=-1 is not in 0.."),
]


@pytest.mark.parametrize(("path", "value", "message"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_a_mistake_is_named_with_its_place(path, value, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        from_json(changed(path, value), source="my.json")


TEXTS = [
    ('{"version": 1, "version": 1}', "my.json: the key 'version' stands there twice"),
    ('{"version": NaN}', "NaN is no number of JSON"),
    ('{"version": -Infinity}', "-Infinity is no number of JSON"),
    ("{", "this is no JSON"),
    ("[]", "a list of 0 is no object"),
    ("{}", "version=null is missing: add it, this launcher reads 1"),
    ('{"version": ' + "9" * 5000 + "}", "this is no JSON"),
    ("[" * 100_000, "this is no JSON"),
    (changed("predicted", None).replace("32", "1e999", 1), "global_batch=inf is no integer"),
]


@pytest.mark.parametrize(("text", "message"), TEXTS, ids=range(len(TEXTS)))
def test_malformed_text_is_refused(text, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        from_json(text, source="my.json")


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    missing = tmp_path / "none.json"
    with pytest.raises(PlanError) as caught:
        read_plan(missing)
    assert str(caught.value) == (
        f"there is no plan file {missing} (parallel.path={missing}): give the path of the plan.json "
        f"that a run wrote"
    )
    assert caught.value.exit_status == 2
    with pytest.raises(
        PlanError, match=r"cannot read the plan, .*parallel\.path=.*correct the path"
    ):
        read_plan(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"version": "\xe9"}')
    with pytest.raises(PlanError, match="no UTF-8 text"):
        read_plan(tmp_path / "latin.json")
    monkeypatch.setattr(plan_file, "LARGEST_FILE_BYTES", 10)
    (tmp_path / "large.json").write_text(json.dumps(BY_HAND))
    with pytest.raises(PlanError, match="more than 10 bytes"):
        read_plan(tmp_path / "large.json")


def test_a_plan_that_cannot_be_written_leaves_the_old_one(plan, tmp_path):
    with pytest.raises(StorageError, match="cannot write .*hydra.run.dir="):
        write_plan(plan, tmp_path / "none" / "plan.json")
    path = tmp_path / "plan.json"
    path.mkdir()  # nothing can be renamed over a folder
    with pytest.raises(StorageError, match="cannot write"):
        write_plan(plan, path)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def places(tree: object, prefix: tuple = ()) -> list[tuple]:
    """All places of a tree that hold a value."""
    members = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, value in members:
        found.append((*prefix, key))
        if isinstance(value, dict | list):
            found += places(value, (*prefix, key))
    return found


@REUSED_FIXTURES
@given(data=st.data())
def test_a_damaged_plan_is_a_plan_or_a_plan_error(plan, cpu8, data):
    tree = json.loads(to_json(plan))
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(places(tree)))
        node = tree
        for key in parents:
            node = node[key]
        node[last] = data.draw(VALUES)
    try:
        read = from_json(json.dumps(tree))
        assert isinstance(read, Plan)
        assert from_json(to_json(read)) == read
        check_without_model(read, 4, cpu8)
    except PlanError as error:
        assert "\n" not in str(error)  # noqa: PT017 both outcomes are right


@settings(max_examples=100)
@given(st.text() | VALUES.map(json.dumps) | st.text(alphabet='{}[]":,0e-N\\u'))
def test_any_text_is_a_plan_error(text):
    with pytest.raises(PlanError):
        from_json(text)
