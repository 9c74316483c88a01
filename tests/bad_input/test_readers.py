"""Whatever a plan, cluster or token file holds, its reader gives a sound object or one short line."""

import copy
import json
import pathlib
import struct
import zlib

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import plan_of, stage_of

from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.clusters.hosts import Cluster, MixedCluster
from launcher.autopar.plans.plan import Plan
from launcher.autopar.plans.plan_file import from_json, read_plan, to_json, write_plan
from launcher.config import conf_dir
from launcher.data.tokens import TokenFile, open_tokens, write_tokens
from launcher.errors import ConfigError, PlanError

MANY = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from([10**18, -1, 0, 1e308, float("nan"), "\u202e", "${x}", "../../x", "_target_"]),
)  # fmt: skip
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)
PLAN = plan_of(
    stage_of((0, 3), mesh=(2, 2), params={"blocks/0/mlp/up/kernel": (None, "tensor")}),
    stage_of((3, 6), mesh=(4, 1), host=1, zero=2, recompute="layer"),
    num_layers=6,
)
CLUSTERS = [
    yaml.safe_load(path.read_text()) for path in sorted((conf_dir() / "cluster").glob("*.yaml"))
]


def places(tree: object, path: tuple = ()) -> list[tuple]:
    """The path of every value in a tree."""
    inside = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    return [path, *(place for key, value in inside for place in places(value, (*path, key)))]


@st.composite
def mutations(draw, tree: object):
    """The tree with one value replaced, dropped, or joined by another of any name."""
    found = copy.deepcopy(tree)
    *parents, last = draw(st.sampled_from(places(found)[1:]))
    node = found
    for key in parents:
        node = node[key]
    how = draw(st.sampled_from(["replace", "drop", "add"]))
    if how == "drop":
        del node[last]
    elif how == "add" and isinstance(node, dict):
        node[draw(st.text(max_size=6))] = draw(TREES)
    else:
        node[last] = draw(TREES)
    return found


def refused(error: ConfigError, kind: type[ConfigError]) -> None:
    assert type(error) is kind
    text = str(error)
    assert len(text) < 1000
    assert text.count("\n") == 0


def check_plan(text: str) -> None:
    try:
        plan = from_json(text)
    except PlanError as error:
        refused(error, PlanError)
        return
    assert isinstance(plan, Plan)
    assert from_json(to_json(plan)) == plan


@MANY
@given(st.text() | TREES.map(json.dumps))
def test_any_text_for_a_plan(text):
    check_plan(text)


@MANY
@given(mutations(json.loads(to_json(PLAN))))
def test_a_plan_with_one_change(tree):
    check_plan(json.dumps(tree))


@MANY
@given(data=st.binary(max_size=200))
def test_any_bytes_for_a_plan(data, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(data)
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    refused(caught.value, PlanError)


def test_the_plan_that_is_changed_is_read(tmp_path):
    write_plan(PLAN, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == PLAN


def check_cluster(path: pathlib.Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        cluster = load_cluster(path)
    except ConfigError as error:
        refused(error, ConfigError)
        return
    assert isinstance(cluster, Cluster | MixedCluster)
    assert cluster.num_devices >= 1
    assert cluster.memory_bytes >= 0
    assert cluster.describe().isprintable()


@MANY
@given(data=st.binary(max_size=200) | TREES.map(lambda tree: yaml.safe_dump(tree).encode()))
def test_any_bytes_or_yaml_for_a_cluster(data, tmp_path):
    check_cluster(tmp_path / "mine.yaml", data)


@MANY
@given(data=st.data())
def test_a_cluster_with_one_change(data, tmp_path):
    tree = data.draw(st.sampled_from(CLUSTERS).flatmap(mutations))
    check_cluster(tmp_path / "mine.yaml", yaml.safe_dump(tree).encode())


def check_tokens(path: pathlib.Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        file = open_tokens(path)
    except ConfigError as error:
        refused(error, ConfigError)
        return
    assert isinstance(file, TokenFile)
    assert 64 + file.ids.read().nbytes == len(data)
    assert 1 <= file.vocab_size <= 2**32


@MANY
@given(data=st.binary(max_size=200))
def test_any_bytes_for_tokens(data, tmp_path):
    check_tokens(tmp_path / "any", data)
    check_tokens(tmp_path / "magic", b"LAUNCHTK" + data)


@MANY
@given(
    place=st.integers(0, 83), byte=st.integers(0, 255), mends=st.booleans(), cut=st.integers(0, 84)
)
def test_a_token_file_with_one_change(place, byte, mends, cut, tmp_path):
    path = tmp_path / "whole"
    write_tokens(path, [np.arange(20)], 20)
    data = bytearray(path.read_bytes())
    data[place] = byte
    if mends:  # so that the checksum hides nothing
        data[60:64] = struct.pack("<I", zlib.crc32(data[:60]))
    check_tokens(tmp_path / "changed", bytes(data))
    check_tokens(tmp_path / "cut", bytes(data[:cut]))
