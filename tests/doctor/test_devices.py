"""GPUs as the driver sees them, and devices as JAX does; both by commands that only pretend."""

import pytest
from doctor_fakes import HANGS, answers, devices, only, says, statuses

from launcher.doctor.devices import check_devices, check_emulated
from launcher.doctor.findings import Status
from launcher.doctor.gpus import check_gpus

GPU = "NVIDIA H100 80GB HBM3, {driver}, 81559, {used}\n"
TWO_GPUS = says(2 * GPU.format(driver="550.54.15", used=4))
SEEN = {"platform": "gpu", "kind": "NVIDIA H100", "memory_bytes": 80 << 30}


def gpus(outcome, *, on_login_node: bool = False):
    table = {} if outcome is None else {"nvidia-smi": outcome}
    return list(check_gpus(answers(table), on_login_node=on_login_node))


def jax(probe, *, driver=None, environment=()):
    table = {"probe_devices": probe} | ({"nvidia-smi": driver} if driver else {})
    return list(check_devices(answers(table), dict(environment)))


def test_no_driver_is_no_failure():
    assert only(gpus(None)).status is Status.ABSENT


def test_gpus_that_are_free():
    finding = only(gpus(TWO_GPUS))
    assert finding.status is Status.OK
    assert finding.what == "NVIDIA driver 550.54.15, 2 x NVIDIA H100 80GB HBM3, 79.6 GiB each"


def test_a_driver_that_is_too_old():
    finding = only(gpus(says(GPU.format(driver="470.82.01", used=0))))
    assert finding.status is Status.FAILED
    assert "CUDA 12 needs driver 525 or later" in finding.what


def test_a_gpu_that_someone_else_uses():
    driver, finding = gpus(says(GPU.format(driver="550.1", used=40000)))
    assert driver.status is Status.OK
    assert finding.status is Status.WARNING
    assert finding.what == "GPU 0 has 39.1 GiB of 79.6 GiB in use"


def test_a_driver_that_hangs():
    finding = only(gpus(HANGS))
    assert finding.status is Status.FAILED
    assert "did not answer within 15 s" in finding.what
    assert "dmesg" in finding.cure


def test_tools_without_a_gpu():
    outcome = says("No devices were found\n", status=6)
    assert only(gpus(outcome)).status is Status.FAILED
    assert "No devices were found" in only(gpus(outcome)).what
    assert only(gpus(outcome, on_login_node=True)).status is Status.ABSENT


def test_devices_that_compute():
    assert only(jax(devices())).status is Status.OK
    finding = only(jax(devices(count=2, sum=3, **SEEN), driver=TWO_GPUS))
    assert finding.what.startswith("JAX has 2 x NVIDIA H100 (gpu, 80.0 GiB each for JAX)")


def test_gpus_that_jax_does_not_see():
    ours, finding = jax(devices(), driver=TWO_GPUS)
    assert ours.status is Status.OK
    assert finding.status is Status.FAILED
    assert finding.what.startswith("the machine has 2 GPUs, and JAX computes on the CPU")
    assert finding.cure == 'pip install "jax-launcher[cuda]"'


@pytest.mark.parametrize("setting", [("JAX_PLATFORMS", "cpu"), ("CUDA_VISIBLE_DEVICES", "")])
def test_gpus_that_jax_is_told_not_to_see(setting):
    _, finding = jax(devices(), driver=TWO_GPUS, environment=[setting])
    assert finding.status is Status.WARNING
    assert f"{setting[0]}={setting[1]} is set" in finding.what


def test_some_gpus_that_do_not_start():
    _, finding = jax(devices(**SEEN), driver=TWO_GPUS)
    assert finding.status is Status.WARNING
    assert finding.what == "the machine has 2 GPUs, and JAX uses 1"


def test_wrong_numbers():
    assert "wrong products of matrices on cuda:1" in only(jax(devices(wrong=["cuda:1"]))).what
    finding = only(jax(devices(count=4, sum=9)))
    assert finding.status is Status.FAILED
    assert "their sum over devices is 9, and 10 is right" in finding.what


def test_jax_that_hangs_or_does_not_start():
    assert "did not compute anything within 60 s" in only(jax(HANGS)).what
    broken = says(status=1, stderr="Traceback\nImportError: no jaxlib\n")
    finding = only(jax(broken, environment=[("JAX_PLATFORMS", "cuda")]))
    assert finding.status is Status.FAILED
    assert finding.what == "JAX does not start: ImportError: no jaxlib (JAX_PLATFORMS=cuda is set)"


def test_emulated_devices():
    assert statuses(check_emulated(answers({"probe_devices 8": devices(count=8, sum=36)}))) == [
        "ok"
    ]
    finding = only(check_emulated(answers({"probe_devices 8": devices(count=1)})))
    assert finding.status is Status.FAILED
    assert "8 emulated CPU devices: 1 came up" in finding.what
    assert "none came up (no answer)" in only(check_emulated(answers({"probe": HANGS}))).what
