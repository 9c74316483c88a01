"""Cluster files: what the packaged ones say, and that nothing malformed gets through."""

import copy
import dataclasses
import re

import pytest
from cluster_files import changed_at, write_cluster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.autopar.clusters.cluster import cluster_at_hand, cluster_from_config, load_cluster
from launcher.autopar.clusters.curves import Curve
from launcher.autopar.clusters.device import Link
from launcher.autopar.clusters.hosts import Submesh
from launcher.cli.compose import load
from launcher.config import conf_dir
from launcher.errors import ConfigError

PACKAGED = sorted(path.stem for path in (conf_dir() / "cluster").glob("*.yaml"))
FIGURES = {
    "device.memory_gib", "device.peak_tflops", "device.memory_gb_per_s", "device.matmul_efficiency",
    "intra_host.gb_per_s", "intra_host.latency_us", "inter_host.gbit_per_s", "inter_host.latency_us",
}  # fmt: skip
MINE = {
    "name": "mine",
    "hosts": 2,
    "devices_per_host": 4,
    "device": {
        "kind": "X1",
        "memory_gib": 16,
        "peak_tflops": {"fp32": 10, "bf16": 100.0},
        "memory_gb_per_s": 900,
        "matmul_efficiency": {"fp32": 0.5, "bf16": 0.6},
        "has_bf16": True,
        "accelerator": True,
    },
    "intra_host": {"gb_per_s": 100, "latency_us": 10},
    "inter_host": {"gbit_per_s": 80, "latency_us": 0},
}


def changed(path: str, value: object) -> dict:
    """MINE with one value replaced, or without it if the value is `...`."""
    return changed_at(MINE, path.split("."), value)


def test_what_is_packaged():
    of_equal_hosts = ["1xp3", "8xp3", "cpu8", "dgx-a100", "dgx-h100", "h200", "local"]
    assert [*of_equal_hosts, "v100-a100"] == PACKAGED


@pytest.mark.parametrize("name", PACKAGED[:-1])
def test_packaged_clusters_load_the_same_by_name_and_by_config(name):
    cluster = load_cluster(name)
    assert cluster.name == name
    assert not FIGURES - set(cluster.sources)
    assert (cluster.device.reserved_bytes > 0) == cluster.device.accelerator
    assert ("device.reserved_gib" in cluster.sources) == cluster.device.accelerator
    assert cluster_from_config(load([f"cluster={name}"]).cluster) == cluster


@pytest.mark.parametrize("name", PACKAGED[:-1])
def test_newer_gpus_have_cudnns_attention(name):
    wanted = name in ("dgx-a100", "dgx-h100", "h200")
    assert load_cluster(name).device.has_cudnn_attention == wanted


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("NVIDIA A10G", True), ("Tesla T4", False), ("NVIDIA GeForce RTX 2080 Ti", False),
        ("NVIDIA H100 80GB HBM3", True), ("TPU v5 lite", False), ("AMD Instinct MI300X", False),
    ],
)  # fmt: skip
def test_whether_a_device_that_is_found_has_cudnns_attention(kind, wanted):
    device = cluster_at_hand(kind=kind, count=1, memory_bytes=None).device
    assert device.has_cudnn_attention == wanted


@pytest.mark.parametrize("name", ["cpu8", "local"])
def test_figures_of_the_emulated_cpu_are_said_to_be_nominal(name):
    cluster = load_cluster(name)
    assert cluster.nominal
    assert all(source.startswith("nominal") for source in cluster.sources.values())
    assert "nominal" in cluster.describe()
    assert cluster.peak_flops_per_s("fp32") is None
    assert (cluster.num_hosts, cluster.devices_per_host) == (2, 4)
    assert cluster.inter_host.bytes_per_s < cluster.intra_host.bytes_per_s


def test_local_is_the_emulated_cpu_figure_by_figure():
    assert dataclasses.replace(load_cluster("local"), name="cpu8") == load_cluster("cpu8")


def test_the_cluster_of_the_paper():
    cluster = load_cluster("8xp3")
    assert (cluster.num_hosts, cluster.devices_per_host, cluster.num_devices) == (8, 8, 64)
    assert cluster.memory_bytes == 64 * 16 * 2**30
    assert cluster.device.memory_bytes_per_s == 900e9
    assert cluster.peak_flops_per_s("fp16") == 125e12
    assert cluster.peak_flops_per_s("bf16") is None
    assert cluster.inter_host == Link(bytes_per_s=25e9 / 8, latency_s=pytest.approx(50e-6))
    assert load_cluster("1xp3") == dataclasses.replace(
        cluster, name="1xp3", num_hosts=1, sources=load_cluster("1xp3").sources
    )


@pytest.mark.parametrize(
    ("name", "dtype"), [("8xp3", "fp16"), ("dgx-a100", "bf16"), ("h200", "bf16"), ("cpu8", "fp32")]
)
def test_the_dtype_follows_the_device(name, dtype):
    assert load_cluster(name).default_dtype == dtype


def test_units_become_si(tmp_path):
    cluster = load_cluster(write_cluster(tmp_path, MINE))
    assert cluster.device.memory_bytes == cluster.device.usable_bytes == 16 * 2**30
    assert cluster.device.peak_flops_per_s == {"fp32": 10e12, "bf16": 100e12}
    assert cluster.intra_host == Link(bytes_per_s=100e9, latency_s=pytest.approx(10e-6))
    assert cluster.inter_host == Link(bytes_per_s=10e9, latency_s=0.0)
    assert (cluster.nominal, cluster.sources) == (False, {})
    assert cluster.describe() == "mine: 2 hosts x 4 X1 (16 GiB each, 80 Gb/s between hosts)"
    assert load_cluster(str(tmp_path / "mine.yaml")) == cluster


def test_a_reserve_is_no_memory_to_fill(tmp_path):
    device = load_cluster(write_cluster(tmp_path, changed("device.reserved_gib", 1.5))).device
    assert (device.memory_bytes, device.usable_bytes) == (16 * 2**30, 14.5 * 2**30)


def test_a_link_for_each_device_adds_up_to_the_hosts(tmp_path):
    own = changed("inter_host", {"gbit_per_s": 80, "latency_us": 0, "shared_by_host": False})
    assert load_cluster(write_cluster(tmp_path, own)).inter_host.bytes_per_s == 40e9


def test_submeshes_are_those_of_the_paper():
    shapes = [(mesh.hosts, mesh.devices) for mesh in load_cluster("8xp3").submeshes()]
    assert shapes == [(1, 1), (1, 2), (1, 4), *((hosts, 8) for hosts in range(1, 9))]
    six = dataclasses.replace(load_cluster("1xp3"), devices_per_host=6)
    assert [mesh.devices for mesh in six.submeshes()] == [1, 2, 3, 4, 6]
    many = load_cluster("dgx-a100").replace(hosts=24).submeshes()
    assert [mesh.hosts for mesh in many[3:]] == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert load_cluster("h200").submeshes() == (Submesh(hosts=1, devices=1),)
    assert Submesh(hosts=2, devices=8).num_devices == 16


def test_hosts_are_replaced():
    cluster = load_cluster("dgx-a100").replace(hosts=384)
    assert (cluster.num_devices, cluster.ref().hosts) == (3072, 384)
    assert cluster_from_config(load(["cluster=dgx-a100", "cluster.hosts=384"]).cluster) == cluster
    with pytest.raises(ConfigError, match="cluster.hosts=0 is not in 1"):
        cluster.replace(hosts=0)


def test_local_without_a_gpu_is_cpu8():
    assert cluster_at_hand(kind="cpu", count=0, memory_bytes=None) == load_cluster("cpu8")


def test_local_with_known_gpus_has_their_figures():
    cluster = cluster_at_hand(kind="NVIDIA H100 80GB HBM3", count=4, memory_bytes=60 * 2**30)
    h100 = load_cluster("dgx-h100")
    assert (cluster.name, cluster.num_hosts, cluster.devices_per_host) == ("local", 1, 4)
    assert cluster.device.memory_bytes == 60 * 2**30
    assert cluster.device.kind == "NVIDIA H100 80GB HBM3"
    assert cluster.peak_flops_per_s("bf16") == h100.peak_flops_per_s("bf16")
    assert cluster.sources["device.memory_gib"] == "what JAX may use of it"
    v100 = cluster_at_hand(kind="Tesla V100-SXM2-16GB", count=8, memory_bytes=None)
    assert v100.device.memory_bytes == 16 * 2**30
    assert v100.device.usable_bytes == load_cluster("1xp3").device.usable_bytes < 16 * 2**30
    assert cluster.device.usable_bytes == 60 * 2**30  # the reserve lies outside of JAX's pool
    a100 = cluster_at_hand(kind="NVIDIA A100-SXM4-40GB", count=8, memory_bytes=30 * 2**30)
    assert a100.device.memory_bytes_per_s == 1.555e12


@pytest.mark.parametrize(
    ("kind", "dtype"), [("NVIDIA L4", "bf16"), ("NVIDIA H100 PCIe", "bf16"), ("Tesla T4", "fp16")]
)
def test_local_with_unknown_gpus_guesses_and_says_so(kind, dtype):
    cluster = cluster_at_hand(kind=kind, count=2, memory_bytes=None)
    assert cluster.nominal
    assert all(source.startswith("guess") for source in cluster.sources.values())
    assert cluster.peak_flops_per_s(dtype) is None
    assert (cluster.default_dtype, cluster.device.kind, cluster.num_devices) == (dtype, kind, 2)


MISTAKES = [
    ("hosts", 0, "hosts=0 is not in 1..100000: correct it"),
    ("hosts", "two", "hosts='two' is no integer: write a whole number from 1"),
    ("hosts", True, "hosts=True is no integer"),
    ("hosts", ..., "hosts=null is missing: add it"),
    ("host", 2, "host=2 is unknown: correct or drop it; the file has name, hosts,"),
    ("device.memory_gib", -16, "device.memory_gib=-16 is not above 0: write a positive number"),
    ("device.memory_gib", 0, "device.memory_gib=0 is not above 0"),
    ("device.reserved_gib", 17, "device.reserved_gib=17 is not in 0"),
    ("device.reserved_gib", -1, "device.reserved_gib=-1 is not in 0"),
    ("device.memory_gib", float("nan"), "device.memory_gib=nan is not finite"),
    ("device.memory_gib", 1e-12, "device.memory_gib=1e-12 is not in 1e-09"),
    ("device.memory_gb_per_s", float("inf"), "device.memory_gb_per_s=inf is not finite"),
    ("device.memory_gb_per_s", 10**400, "device.memory_gb_per_s=a huge number is not in"),
    ("device.has_bf16", "maybe", "device.has_bf16='maybe' is no boolean: write true or false"),
    ("device.peak_tflops", {"bf16": 1}, "device.peak_tflops.fp32=null is missing"),
    ("device.peak_tflops.fp8", 1, "device.peak_tflops.fp8=1 is unknown"),
    ("device.matmul_efficiency.fp32", 1.5, "device.matmul_efficiency.fp32=1.5 is not in"),
    ("device.matmul_efficiency.fp16", 0.5, "device.matmul_efficiency.fp16=0.5 is unknown"),
    ("device.matmul_efficiency.bf16", ..., "device.matmul_efficiency.bf16=null is missing"),
    ("device.kind", 5, "device.kind=5 is no text: write one in quotes"),
    ("device", [], "device=a list of 0 is no object"),
    ("device.matmul_curve", {"fp16": [[1, 1]]}, "device.matmul_curve.fp16=a list of 1 is unknown"),
    ("device.matmul_curve", {"fp32": [[1, 2]]}, "device.matmul_curve.fp32[0][1]=2 is not in"),
    ("device.convolution_curve", {"fp32": []}, "device.convolution_curve.fp32=a list of 0 has no"),
    ("device.op_overhead_us", -1, "device.op_overhead_us=-1 is not in 0.."),
    ("device.overlaps_collectives", 1, "device.overlaps_collectives=1 is no boolean"),
    ("device.program_launch_us", "x", "device.program_launch_us='x' is no number"),
    ("device.concurrency", [[2, 1], [1, 1]], "device.concurrency=a list of 2 does not ascend"),
    (
        "intra_host.collective_curve",
        {"gather": []},
        "intra_host.collective_curve.gather=a list of 0",
    ),
    ("intra_host.latency_us", -1, "intra_host.latency_us=-1 is not in 0.."),
    ("inter_host", {"gb_per_s": 1}, "inter_host.gb_per_s=1 is unknown"),
    ("sources", {1: "x"}, "sources.1='x' has a key that is no text"),
]


MEASURED = {
    "matmul_curve": {"fp32": [[0.5, 0.1], [8, 0.5]]},
    "convolution_curve": {"fp32": [[1, 0.2]]},
    "op_overhead_us": 3,
    "program_launch_us": 50,
    "concurrency": [[1, 1], [4, 2.5]],
}


def test_what_was_measured_by_size_is_read_in_si_units(tmp_path):
    tree = copy.deepcopy(MINE)
    tree["device"] |= MEASURED
    tree["intra_host"]["collective_curve"] = {"all_reduce": [[0.1, 2], [10, 4]], "send": [[1, 8]]}
    cluster = load_cluster(write_cluster(tmp_path, tree))
    device = cluster.device
    assert device.matmul_curve == {"fp32": Curve(((0.5e9, 0.1), (8e9, 0.5)))}
    assert device.convolution_curve == {"fp32": Curve(((1e9, 0.2),))}
    assert (device.op_overhead_s, device.program_launch_s) == pytest.approx((3e-6, 50e-6))
    assert [device.slowdown(n) for n in (1, 2.5, 4, 9, None)] == [1.0, 1.75, 2.5, 2.5, 2.5]
    assert cluster.intra_host.curves["all_reduce"] == Curve(((1e5, 2e9), (1e7, 4e9)))
    assert cluster.intra_host.send_s(4e6) == pytest.approx(4e6 / 8e9)
    assert cluster.inter_host.curves == {}
    assert cluster.inter_host.send_s(4e6) == pytest.approx(4e6 / 10e9)


def test_without_them_nothing_depends_on_size():
    device = load_cluster("cpu8").device
    assert (device.op_overhead_s, device.program_launch_s, device.slowdown(None)) == (0.0, 0.0, 1.0)
    assert device.convolution_curve == {}


@pytest.mark.parametrize("accelerator", [True, False])
def test_accelerators_communicate_beside_computing_unless_a_file_says_otherwise(
    tmp_path, accelerator
):
    tree = copy.deepcopy(MINE)
    tree["device"]["accelerator"] = accelerator
    device = load_cluster(write_cluster(tmp_path, tree)).device
    assert device.overlaps_collectives == accelerator
    tree["device"]["overlaps_collectives"] = not accelerator
    device = load_cluster(write_cluster(tmp_path, tree)).device
    assert device.overlaps_collectives != accelerator


def test_what_was_measured_can_be_set_on_the_command_line():
    config = load(["cluster=cpu8", "cluster.device.concurrency=[[1,1],[2,1.5]]"]).cluster
    assert cluster_from_config(config).device.slowdown(2) == 1.5


@pytest.mark.parametrize(("path", "value", "message"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_a_mistake_is_named_with_its_key(tmp_path, path, value, message):
    path = write_cluster(tmp_path, changed(path, value))
    with pytest.raises(ConfigError, match=re.escape(f"{path}: {message}")):
        load_cluster(path)


def test_a_mistake_on_the_command_line_is_named_by_its_key():
    config = load(["cluster=8xp3", "cluster.device.memory_gib=-1"]).cluster
    with pytest.raises(ConfigError, match=r"^cluster\.device\.memory_gib=-1\.0 is not above 0"):
        cluster_from_config(config)


def test_names_and_files_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cluster=9xp3 is unknown.*take one of 1xp3, 8xp3"):
        load_cluster("9xp3")
    with pytest.raises(ConfigError, match=r"cannot read .*none\.yaml, No such file"):
        load_cluster(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_cluster(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["a: [", "name: x\nname: y", "- !!python/name:os.system", "a: !!int ''", "\x00", "2001-99-99"],
)
def test_what_is_no_yaml_is_refused(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml is no YAML"):
        load_cluster(tmp_path / "mine.yaml")


def test_a_file_that_is_no_cluster_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("launcher.autopar.text.strict_yaml._LARGEST_FILE_BYTES", 10)
    with pytest.raises(ConfigError, match="more than 10 bytes"):
        load_cluster(write_cluster(tmp_path, MINE))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = [(key,) for key in MINE] + [
    (key, inner) for key, value in MINE.items() if isinstance(value, dict) for inner in value
]
REUSED_FIXTURES = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150
)


@REUSED_FIXTURES
@given(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=2), value=VALUES)
def test_a_damaged_file_is_a_cluster_or_a_config_error(tmp_path, keys, value):
    tree = copy.deepcopy(MINE)
    for *parents, last in keys:
        node = tree
        for key in parents:
            node = node[key] if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node[last] = value
    try:
        found = load_cluster(write_cluster(tmp_path, tree))
        assert found.describe()
        assert found.memory_bytes > 0
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017 both outcomes are right


@REUSED_FIXTURES
@given(data=st.binary(max_size=40) | st.text(alphabet="ab:{}[]&*!?|>-#'\"\n ,0.~").map(str.encode))
def test_any_bytes_are_a_config_error(tmp_path, data):
    path = tmp_path / "mine.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError):
        load_cluster(path)
