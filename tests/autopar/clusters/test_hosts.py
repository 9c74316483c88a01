"""Clusters with several kinds of hosts: what files say of them, and what they answer."""

import dataclasses
import re

import pytest
import yaml
from cluster_files import changed_at, write_cluster

from launcher.autopar.clusters.cluster import cluster_from_config, load_cluster
from launcher.autopar.clusters.device import Link
from launcher.autopar.clusters.hosts import Cluster, ClusterRef, GroupRef, MixedCluster
from launcher.cli.compose import load
from launcher.errors import ConfigError, PlanError

DEVICE = {
    "kind": "X1",
    "memory_gib": 16,
    "peak_tflops": {"fp32": 10, "fp16": 100},
    "memory_gb_per_s": 900,
    "matmul_efficiency": {"fp32": 0.5, "fp16": 0.6},
    "has_bf16": False,
    "accelerator": True,
}
OWN = {
    "hosts": 2,
    "devices_per_host": 4,
    "device": DEVICE,
    "intra_host": {"gb_per_s": 100, "latency_us": 10},
}
MINE = {
    "name": "mine",
    "groups": [OWN, {"cluster": "dgx-a100", "hosts": 3}],
    "inter_host": {"gbit_per_s": 80, "latency_us": 7},
}


def changed(path, value):
    """MINE with one value replaced, or without it if the value is `...`."""
    return changed_at(MINE, path, value)


@pytest.fixture
def mine(tmp_path) -> MixedCluster:
    return load_cluster(write_cluster(tmp_path, MINE))


def test_a_group_says_what_its_hosts_are_or_names_a_file(mine):
    own, a100 = mine.kinds
    network = Link(bytes_per_s=10e9, latency_s=pytest.approx(7e-6))
    assert (own.num_hosts, own.devices_per_host, own.device.kind) == (2, 4, "X1")
    assert own.inter_host == mine.inter_host == network
    dgx = load_cluster("dgx-a100")
    assert dataclasses.replace(a100, name="dgx-a100", num_hosts=1) == dgx
    assert (mine.num_hosts, mine.num_devices) == (5, 32)
    assert mine.memory_bytes == (8 * 16 + 24 * 80) * 2**30
    assert mine.default_dtype == "fp16"  # what both can
    assert (own.without_cudnn, a100.without_cudnn, mine.without_cudnn) == ("X1", None, "X1")
    assert mine.links == (own.intra_host, own.inter_host, a100.intra_host, a100.inter_host, network)
    assert mine.sources["groups[1].device.memory_gib"] == dgx.sources["device.memory_gib"]


def test_what_a_group_says_goes_before_its_file(tmp_path):
    first = {"cluster": "1xp3", "hosts": 2, "inter_host": {"gbit_per_s": 8, "latency_us": 1}}
    tree = changed(("groups", 0), first)
    v100 = load_cluster(write_cluster(tmp_path, tree)).kinds[0]
    assert v100.device == load_cluster("1xp3").device
    assert v100.inter_host == Link(bytes_per_s=1e9, latency_s=pytest.approx(1e-6))
    path = write_cluster(tmp_path, {"name": "x", **OWN, "inter_host": MINE["inter_host"]})
    named = changed(("groups", 0), {"cluster": str(path)})
    (tmp_path / "named.yaml").write_text(yaml.safe_dump(named))
    assert load_cluster(tmp_path / "named.yaml").kinds[0].device.kind == "X1"


def test_links_of_devices_add_up_on_the_smaller_host(tmp_path):
    own = {"gbit_per_s": 80, "latency_us": 7, "shared_by_host": False}
    cluster = load_cluster(write_cluster(tmp_path, changed(("inter_host",), own)))
    assert cluster.kinds[0].inter_host.bytes_per_s == 4 * 10e9
    assert cluster.inter_host.bytes_per_s == 4 * 10e9  # 8 in the other kind


def test_one_group_is_a_cluster_of_equal_hosts(tmp_path):
    cluster = load_cluster(write_cluster(tmp_path, {**MINE, "groups": [OWN]}))
    plain = load_cluster(
        write_cluster(tmp_path, {"name": "mine", **OWN, "inter_host": MINE["inter_host"]})
    )
    assert isinstance(cluster, Cluster)
    assert cluster == plain


def test_figures_of_a_nominal_kind_are_nominal(tmp_path):
    groups = [{"cluster": "cpu8"}, {"cluster": "cpu8", "hosts": 1}]
    cluster = load_cluster(write_cluster(tmp_path, {**MINE, "groups": groups}))
    assert cluster.nominal
    assert not cluster.has_accelerators
    assert [cluster.machine_of(host) for host in range(3)] == [0, 0, 0]
    assert "nominal" in cluster.describe()


def test_the_packaged_one_reads_the_same_by_name_and_by_config():
    cluster = load_cluster("v100-a100")
    assert cluster_from_config(load(["cluster=v100-a100"]).cluster) == cluster
    assert [kind.device for kind in cluster.kinds] == [
        load_cluster(name).device for name in ("1xp3", "dgx-a100")
    ]
    assert {"inter_host.gbit_per_s", "inter_host.latency_us"} <= set(cluster.sources)
    groups = "cluster.groups=[{cluster: 1xp3, hosts: 4}, {cluster: h200}]"
    other = cluster_from_config(load(["cluster=v100-a100", groups]).cluster)
    assert [kind.num_hosts for kind in other.kinds] == [4, 1]


def test_hosts_are_numbered_one_kind_after_the_other(mine):
    own, a100 = mine.kinds
    assert mine.kind_of([0, 1]) is own
    assert mine.kind_of([2, 4]) is a100
    assert mine.link_between(0, 1) == own.inter_host
    assert mine.link_between(3, 4) == a100.inter_host
    assert mine.link_between(1, 2) == mine.link_between(2, 0) == mine.inter_host
    assert [mine.machine_of(host) for host in range(5)] == [0, 1, 2, 3, 4]
    assert mine.stage_link == mine.inter_host
    with pytest.raises(
        PlanError, match=r"hosts=\[1, 2\] are of 2 kinds, .* X1 on 0-1, A100.* on 2-4"
    ):
        mine.kind_of([2, 1])
    with pytest.raises(PlanError, match=r"stages\[0\]\.hosts has 5, outside 0\.\.4.*plan again"):
        mine.kind_of([4, 5], "stages[0].hosts")


def test_it_is_told_in_words(mine):
    assert mine.describe() == (
        "mine: 2 hosts x 4 X1 (16 GiB each, 80 Gb/s between hosts) and "
        "3 hosts x 8 A100-SXM4-80GB (80 GiB each, 1600 Gb/s between hosts), 80 Gb/s between them"
    )
    assert mine.shape_text == "2 hosts x 4 devices and 3 hosts x 8 devices"
    groups = (
        GroupRef(hosts=2, devices_per_host=4, device="X1"),
        GroupRef(hosts=3, devices_per_host=8, device="A100-SXM4-80GB"),
    )
    assert mine.ref() == ClusterRef(name="mine", hosts=5, devices_per_host=8, groups=groups)


def test_a_number_of_hosts_does_not_say_of_which_kind(mine):
    with pytest.raises(ConfigError, match=r"cluster.hosts=4 does not say of which of the 2 kinds"):
        mine.replace(hosts=4)
    given = load(["cluster=v100-a100", "cluster.hosts=4"]).cluster
    with pytest.raises(
        ConfigError, match=r"^cluster\.hosts=4 contradicts cluster\.groups, .* there"
    ):
        cluster_from_config(given)


MISTAKES = [
    (("groups",), [], "groups=a list of 0 has no hosts: list at least one kind"),
    (("groups",), {"hosts": 1}, "groups=an object of 1 is no list: write one in brackets"),
    (("groups", 0), 3, "groups[0]=3 is no object: write key-value pairs"),
    (("groups", 0), {"cluster": "dgx"}, "groups[0].cluster=dgx is unknown, the launcher has"),
    (("groups", 1, "cluster"), 3, "groups[1].cluster=3 is no text"),
    (("groups", 1, "cluster"), "v100-a100", "groups=a list of 2 is unknown"),
    (("groups", 0, "hosts"), 0, "groups[0].hosts=0 is not in 1"),
    (
        ("groups", 0, "hosts"),
        ...,
        "groups[0].hosts=null is missing: add it, or name a cluster file",
    ),
    (("groups", 0, "device"), ..., "groups[0].device=null is missing: add it, or name"),
    (("groups", 0, "host"), 2, "groups[0].host=2 is unknown: correct or drop it"),
    (("groups", 0, "device", "memory_gib"), -1, "groups[0].device.memory_gib=-1 is not above 0"),
    (("groups", 0, "inter_host"), {"gbit_per_s": 1}, "groups[0].inter_host.latency_us=null is"),
    (
        ("groups", 0, "device", "accelerator"),
        False,
        "groups[1].device.accelerator=True is not False",
    ),
    (("hosts",), 3, "hosts=3 contradicts groups, which has that for each kind of hosts: set it"),
    (("device",), DEVICE, "device=an object of 7 contradicts groups"),
    (("inter_host",), ..., "inter_host=null is missing: add it"),
    (("link",), 1, "link=1 is unknown"),
]


@pytest.mark.parametrize(("path", "value", "message"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_a_mistake_is_named_with_its_key(tmp_path, path, value, message):
    file = write_cluster(tmp_path, changed(path, value))
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load_cluster(file)
    assert "\n" not in str(error.value)
