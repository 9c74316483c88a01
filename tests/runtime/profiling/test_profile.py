"""mode=profile: what it measures, the file that it writes, and that the file is read back as meant."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from launcher import main
from launcher.autopar.clusters.cluster import cluster_from_config, load_cluster
from launcher.autopar.graphs.work import WORK
from launcher.cli.compose import load
from launcher.errors import ClusterError, ConfigError, StorageError
from launcher.runtime.profiling import profile, profile_compute, profile_links, profile_programs
from launcher.runtime.profiling.profile import Measured
from launcher.runtime.profiling.profile_compute import ComputeFigures
from launcher.runtime.profiling.profile_links import LinkFigures
from launcher.runtime.profiling.profile_timing import (
    EACH,
    Job,
    call_s,
    lower_quartile,
    prepared,
    round_s,
)

POINTS = ((1e6, 4e9), (1e9, 8e9))
COMPUTE = ComputeFigures(
    products={"fp32": POINTS}, batched={"fp32": ((1e6, 2e9),)}, convolutions={"fp32": ((1e6, 1e9),)},
    kernel_gradients={"fp32": ((1e6, 5e8),)},
    element_s=dict.fromkeys(
        ("arithmetic", "division", "transcendental", "reduction", "transposition"), 1e-10
    ),
    memory_bytes_per_s=5e9, op_overhead_s=2e-6, program_launch_s=3e-4, array_launch_s=1e-6,
    concurrency=((1.0, 1.0), (8.0, 4.0)), crowding={"product": 1.5, "reduction": 0.9},
)  # fmt: skip
LINK = LinkFigures(curves={"all_reduce": ((4096.0, 1e8),), "send": ((4096.0, 1e8), (1e6, 2e9))})
SMALL = profile_compute.Sizes(
    sides=(16, 32), lengths=(8,), batch=2, channels=(2,), images=(2, 4), elements=2**10,
    stream_bytes=2**12, blocks=(2, 4, 16), small_blocks=(1, 4, 16),
    programs=profile_programs.ProgramSizes(
        dense=((2, 4, 16),), experts=((1, 8, 16, 2),), residual=((2, 4, 2),)
    ),
)  # fmt: skip


def grid_of(cluster):
    shape = cluster.num_hosts, cluster.devices_per_host
    return np.array(jax.devices()[: cluster.num_devices], dtype=object).reshape(shape)


def written(cluster, measured, folder, name="mine"):
    return load_cluster(
        profile.write_cluster(folder, name, profile.as_file(cluster, measured, name))
    )


def test_the_file_says_what_was_measured(tmp_path):
    measured = Measured(compute=COMPUTE, intra_host=LINK, inter_host=LINK)
    read = written(load_cluster("cpu8"), measured, tmp_path)
    assert (tmp_path / "cluster" / "mine.yaml").is_file()
    device = read.device
    assert not read.nominal
    assert (read.name, read.num_hosts, read.devices_per_host) == ("mine", 2, 4)
    assert device.peak_flops_per_s == {"fp32": 8e9, "fp64": 4e9}
    assert device.matmul_curve["fp32"].seconds(1e6) == pytest.approx(1e6 / 0.5)
    assert device.kernel_gradient_curve["fp32"].points == ((1e6, 0.0625),)
    assert device.element_s == pytest.approx(COMPUTE.element_s)
    assert (device.op_overhead_s, device.program_launch_s) == pytest.approx((2e-6, 3e-4))
    assert device.concurrency == COMPUTE.concurrency
    assert device.crowding == COMPUTE.crowding
    assert read.inter_host.send_s(1e6) == pytest.approx(1e6 / 2e9)
    assert read.intra_host.latency_s == pytest.approx(4096 / 1e8, rel=1e-3)
    assert {key for key, source in read.sources.items() if "mode=profile" in source} >= {
        "device.matmul_curve", "device.peak_tflops", "device.concurrency", "inter_host.collective_curve",
    }  # fmt: skip
    assert jax.__version__ in read.sources["device.concurrency"]


def test_what_is_out_of_reach_is_taken_over_with_its_source(tmp_path):
    known = load_cluster("dgx-a100")
    compute = dataclasses.replace(
        COMPUTE, products={"bf16": ((1e9, 4e14),)}, batched={}, convolutions={}, kernel_gradients={},
        element_s={}, crowding={},
    )  # fmt: skip
    read = written(known, Measured(compute=compute, intra_host=None, inter_host=None), tmp_path)
    assert read.device.peak_flops_per_s == known.device.peak_flops_per_s
    assert read.device.matmul_efficiency["bf16"] == 1.0  # faster than its datasheet: all of it
    assert read.device.matmul_efficiency["fp32"] == known.device.matmul_efficiency["fp32"]
    assert read.inter_host.bytes_per_s == pytest.approx(known.inter_host.bytes_per_s)
    for figure in ("device.peak_tflops", "inter_host.gbit_per_s"):
        assert read.sources[figure] == known.sources[figure]


def test_everything_is_measured(monkeypatch):
    """With sizes that take no time; what comes out are times, and more for more work."""
    monkeypatch.setattr(profile_compute, "ON_CPU", SMALL)
    monkeypatch.setattr(profile_links, "ON_CPU_BYTES", (4096,))
    cluster, told = load_cluster("cpu8"), []
    measured = profile.measure(cluster, grid_of(cluster), told.append)
    compute = measured.compute
    assert [flops for flops, _ in compute.products["fp32"]] == [2 * 16**3, 2 * 32**3]
    rates = [
        rate
        for curves in (compute.products, compute.batched, compute.convolutions)
        for _, rate in curves["fp32"]
    ]
    assert min(*rates, *compute.element_s.values(), compute.memory_bytes_per_s) > 0
    assert [count for count, _ in compute.concurrency] == [1, 2, 4, 8]
    factors = [factor for _, factor in compute.concurrency]
    assert factors[0] == 1.0
    assert factors == sorted(factors)
    assert {"product", "batched_product", "convolution", "reduction"} <= compute.crowding.keys()
    assert compute.crowding.keys() <= set(WORK)
    for link in (measured.intra_host, measured.inter_host):
        assert set(link.curves) == {
            "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"
        }  # fmt: skip
    assert "launches" in told
    assert "all-reduce along the devices" in told


def test_factors_are_found_that_make_classes_add_up():
    """As long as there are enough programs; what none of them has stays as it is."""
    table = np.array([[3.0, 1.0, 0.0], [1.0, 2.0, 0.0], [1.0, 1.0, 0.0], [0.5, 4.0, 0.0]])
    found = profile_programs.fit_factors(table, table @ np.array([1.5, 0.7, 1.0]))
    assert found == pytest.approx([1.5, 0.7, 1.0], rel=0.03)


def test_without_reason_no_factor_is_far_from_one():
    """Two classes that no program tells apart share what is missing."""
    found = profile_programs.fit_factors(np.array([[1.0, 1.0]]), np.array([4.0]))
    assert found[0] == pytest.approx(found[1])
    assert found.sum() == pytest.approx(4.0, rel=0.02)


def test_a_program_unlike_the_others_bends_no_factor():
    table, factors = (
        np.array([[3.0, 1.0], [1.0, 2.0], [1.0, 1.0], [0.5, 4.0]] * 2),
        np.array([1.5, 0.7]),
    )
    measured = table @ factors
    measured[0] *= 3.0
    assert profile_programs.fit_factors(table, measured) == pytest.approx(factors, rel=0.1)


def test_what_kernels_take_is_told_from_their_work():
    """By programs of which some are small."""
    sizes = [(count, length, 32) for count in (1, 2, 8) for length in (8, 64)]
    jobs = [profile_programs.dense_job(*size) for size in sizes]
    rates = {"fp32": ((1.0, 8e9), (1e9, 8e9))}
    compute, slow = (
        profile_compute.compute_model(
            dataclasses.replace(COMPUTE, products=rates, batched=rates, op_overhead_s=overhead_s)
        )
        for overhead_s in (2e-6, 8e-6)
    )
    measured = [sum(profile_programs.seconds_by_class(job, slow, slow).values()) for job in jobs]
    found = profile_programs.in_programs(jobs, measured, compute, kernels_apart=True)
    assert found[profile_programs.KERNELS] == pytest.approx(4.0, rel=0.1)
    assert all(0.8 < f < 1.25 for work, f in found.items() if work != profile_programs.KERNELS)


def test_the_programs_give_back_all_that_they_take():
    """In the shapes that a loop hands on to its next round."""
    for job in profile_programs.program_jobs(SMALL.programs):
        held = tuple(jax.numpy.full(shape, job.value) for shape in job.shapes)
        assert [made.shape for made in job.body(held)] == list(job.shapes)


def test_programs_that_meet_compute_the_same():
    """On all devices at once, with collectives between their blocks."""
    devices = np.array(jax.devices()[:8], dtype=object)
    alone, together = (
        profile_programs.program_jobs(SMALL.programs, between)
        for between in (profile_programs.alone, profile_programs.meeting)
    )
    for number, (one, other) in enumerate(zip(alone, together, strict=True)):
        count = (1 + number % 2) * profile_programs.DEPTH  # forward alone, and with the gradients
        programs = [prepared(job, devices, (EACH,), rounds=1) for job in (one, other)]
        texts = [program.lower(*arrays).as_text() for program, arrays in programs]
        assert [text.count('"stablehlo.all_reduce"') for text in texts] == [0, count]
        turned = r"stablehlo.transpose %[0-9]+, dims = \[1, 0\]"  # of weights' gradients
        assert not re.search(turned, texts[0])
        expected, found = (program(*arrays) for program, arrays in programs)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_kernel_gradient_is_the_one_that_jax_finds():
    rng = np.random.default_rng(0)
    images, sums = rng.normal(size=(2, 2, 4, 4, 3)).astype(np.float32)
    kernel = np.ones((3, 3, 3, 3), np.float32)
    _, back = jax.vjp(lambda kernel: profile_programs.convolved(images, kernel), kernel)
    (expected,) = back(sums)
    found = profile_compute.gradient_of_kernel(images, sums)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_twice_the_rounds_of_work_take_longer_than_one():
    def body(held):
        return tuple(x @ x for x in held)

    one = Job(body=body, shapes=((256, 256),), guess_s=1e-3, value=1 / 256)
    eight = dataclasses.replace(one, shapes=((256, 256),) * 8)
    device = np.array(jax.devices()[:1], dtype=object)
    assert round_s(eight, device) > 2 * round_s(one, device)


def test_the_lower_quartile_is_the_median_of_the_faster_half():
    assert lower_quartile([9.0, 1.0, 2.0, 100.0, 3.0]) == 2.0
    assert lower_quartile([4.0]) == 4.0


def test_calls_that_take_long_are_repeated_less(monkeypatch):
    ticks = iter(np.arange(100) * 0.5)
    monkeypatch.setattr(
        "launcher.runtime.profiling.profile_timing.time.perf_counter", lambda: next(ticks)
    )
    calls = []
    assert call_s(lambda: calls.append(1)) == 0.5
    assert len(calls) == 1 + 5


def test_a_cluster_that_is_not_here_is_refused():
    with pytest.raises(ClusterError, match="cluster=dgx-a100 has 8 A100-SXM4-80GB in a host, and"):
        profile.reachable(load_cluster("dgx-a100"))
    assert profile.reachable(load_cluster("cpu8")).shape == (2, 4)


def test_names_of_files():
    assert profile.default_name(load_cluster("cpu8")).startswith("cpu8-")
    profile.check_name(profile.default_name(load_cluster("cpu8")))
    with pytest.raises(ConfigError, match="profile.name=cpu8 is a packaged cluster"):
        profile.check_name("cpu8")
    with pytest.raises(ConfigError, match="profile.name=a/b is no name for a cluster file"):
        profile.check_name("a/b")


def test_a_run_writes_a_file_that_the_command_line_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(
        profile, "measure",
        lambda cluster, grid, progress: Measured(compute=COMPUTE, intra_host=LINK, inter_host=LINK),
    )  # fmt: skip
    monkeypatch.setattr(main.devices, "emulate", lambda num_devices: None)  # the tests have done so
    config = load(["mode=profile", "cluster=cpu8", "profile.name=mine"])
    assert main.run(config, tmp_path) == 0
    found = load(["cluster=mine", f"hydra.searchpath=[file://{tmp_path}]"])
    cluster = cluster_from_config(found.cluster)
    assert cluster.device.program_launch_s == pytest.approx(3e-4)
    assert profile.usage(tmp_path, "mine") == (
        f"python -m launcher cluster=mine 'hydra.searchpath=[file://{tmp_path}]'"
    )


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="profile.dir="):
        profile.write_cluster(tmp_path / "file", "mine", {"sources": {}})
