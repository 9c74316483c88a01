"""`mode=profile`: measure the devices at hand, and write a cluster file with what was found.

What is measured is in `profile_compute` and `profile_links`. What is not (a device's memory, the peak of a
kind that is known, a network that this process does not reach) is taken over from the cluster that was
asked for, with its source.
"""

import datetime
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import yaml

from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.clusters.device import Link
from launcher.autopar.clusters.hosts import Cluster
from launcher.config import ProfileConfig
from launcher.errors import ClusterError, ConfigError, StorageError
from launcher.runtime.profiling.profile_compute import ComputeFigures, measure_compute
from launcher.runtime.profiling.profile_links import LinkFigures, measure_links

_GIB, _TERA, _GIGA, _MEGA, _MICRO, _NANO = 2**30, 1e12, 1e9, 1e6, 1e-6, 1e-9
Progress = Callable[[str], None]
Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Everything that was measured; links are None where there are none within reach."""

    compute: ComputeFigures
    intra_host: LinkFigures | None
    inter_host: LinkFigures | None


def run_profile(
    cluster: Cluster, settings: ProfileConfig, run_dir: Path, progress: Progress
) -> str:
    """Measure a cluster, write its file, and say where it is and how it is used."""
    if len(cluster.kinds) > 1:
        raise ConfigError(
            f"mode=profile measures 1 kind of hosts, and cluster={cluster.name} has "
            f"{len(cluster.kinds)} (cluster.groups): profile a host of each, and name their files in groups"
        )
    name = settings.name or default_name(cluster)
    check_name(name)
    measured = measure(cluster, reachable(cluster), progress)
    folder = Path(settings.dir or run_dir).resolve()
    path = write_cluster(folder, name, as_file(cluster, measured, name))
    return f"written: {path}; to plan with it: {usage(folder, name)}"


def reachable(cluster: Cluster) -> np.ndarray:
    """The devices of the cluster that this process has, hosts by devices per host.

    Emulated hosts are all here; of real ones this one is, and has to be complete.
    """
    found = jax.devices()
    num_hosts = 1 if cluster.device.accelerator else cluster.num_hosts
    needed = num_hosts * cluster.devices_per_host
    if len(found) < needed or (found[0].platform == "cpu") == cluster.device.accelerator:
        raise ClusterError(
            f"cluster={cluster.name} has {cluster.devices_per_host} {cluster.device.kind} in a host, "
            f"and there are {len(found)} ({found[0].device_kind}) here to be measured: run mode=profile "
            f"on a host of that cluster, or take cluster=local for the devices at hand"
        )
    grid = np.array(found[:needed], dtype=object)
    return grid.reshape(num_hosts, cluster.devices_per_host)


def usage(folder: Path, name: str) -> str:
    """The command line that plans with the file."""
    return f"python -m launcher cluster={name} 'hydra.searchpath=[file://{folder}]'"


def measure(cluster: Cluster, grid: np.ndarray, progress: Progress) -> Measured:
    """Measure the devices of a grid, hosts by devices per host."""
    device = cluster.device
    intra_host, inter_host = measure_links(grid, accelerators=device.accelerator, progress=progress)
    compute = measure_compute(grid, device, progress)
    return Measured(compute=compute, intra_host=intra_host, inter_host=inter_host)


def default_name(cluster: Cluster) -> str:
    """The host's name, after that of the cluster if one was asked for."""
    host = "".join(c if c.isalnum() else "-" for c in platform.node().split(".")[0]) or "host"
    return host if cluster.name == "local" else f"{cluster.name}-{host}"


def check_name(name: str) -> None:
    """Refuse what is no file name, or what Hydra would find elsewhere first."""
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(
            f"profile.name={name} is no name for a cluster file: use letters, digits, - and _"
        )
    try:
        load_cluster(name)
    except ConfigError:
        return
    raise ConfigError(
        f"profile.name={name} is a packaged cluster, which would be found before the file in "
        f"profile.dir: take another name, such as profile.name=my-{name}"
    )


def write_cluster(folder: Path, name: str, contents: Mapping[str, object]) -> Path:
    """Write the file where `hydra.searchpath=[file://FOLDER]` finds it, and return its path."""
    path = folder / "cluster" / f"{name}.yaml"
    figures = {key: value for key, value in contents.items() if key != "sources"}
    text = yaml.safe_dump(figures, sort_keys=False, default_flow_style=None, width=100)
    text += yaml.safe_dump({"sources": contents["sources"]}, sort_keys=False, width=100)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# Measured by mode=profile.\n{text}")
    except OSError as error:
        raise StorageError(
            f"cannot write {path}, {error.strerror} (profile.dir={folder}): give another folder"
        ) from error
    return path


def as_file(cluster: Cluster, measured: Measured, name: str) -> dict[str, object]:
    """What a cluster file says of the cluster, with the measured figures in place of the others."""
    device, compute = cluster.device, measured.compute
    today, kind = datetime.date.today().isoformat(), jax.devices()[0].device_kind
    source = f"measured by mode=profile on {today}, {kind}, jax {jax.__version__}"
    peaks = _peaks(cluster, compute)
    figures = {
        "peak_tflops": {dtype: _rounded(peak / _TERA) for dtype, peak in peaks.items()},
        "memory_gb_per_s": _rounded(compute.memory_bytes_per_s / _GIGA),
        "matmul_efficiency": {
            dtype: _efficiency(dtype, peaks, cluster, compute) for dtype in peaks
        },
        "matmul_curve": _shares(compute.products, peaks),
        "batched_matmul_curve": _shares(compute.batched, peaks),
        "convolution_curve": _shares(compute.convolutions, peaks),
        "kernel_gradient_curve": _shares(compute.kernel_gradients, peaks),
        "op_overhead_us": _rounded(compute.op_overhead_s / _MICRO),
        "program_launch_us": _rounded(compute.program_launch_s / _MICRO),
        "array_launch_us": _rounded(compute.array_launch_s / _MICRO),
        "concurrency": [[int(count), _rounded(factor)] for count, factor in compute.concurrency],
    }
    if compute.crowding:
        figures["crowding"] = {work: _rounded(factor) for work, factor in compute.crowding.items()}
    if compute.element_s:
        figures["element_ns"] = {k: _rounded(v / _NANO) for k, v in compute.element_s.items()}
    intra_host, inter_host = _links(cluster, measured)
    return {
        "name": name,
        "hosts": cluster.num_hosts,
        "devices_per_host": cluster.devices_per_host,
        "device": {
            "kind": device.kind,
            "memory_gib": device.memory_bytes / _GIB,
            "reserved_gib": device.reserved_bytes / _GIB,
            "has_bf16": device.has_bf16,
            "accelerator": device.accelerator,
            "overlaps_collectives": device.overlaps_collectives,
            **figures,
        },
        "intra_host": intra_host,
        "inter_host": inter_host,
        "nominal": False,
        "sources": _sources(cluster, measured, figures, source),
    }


def _peaks(cluster: Cluster, compute: ComputeFigures) -> dict[str, float]:
    """The datasheet's, where the kind is known; elsewhere the best that was measured."""
    peaks = dict(cluster.device.peak_flops_per_s)
    if cluster.nominal:
        for dtype in compute.products:
            peaks[dtype] = max(
                rate
                for curves in (compute.products, compute.batched, compute.convolutions)
                for _, rate in curves[dtype]
            )
        if "fp64" in peaks:
            peaks["fp64"] = peaks["fp32"] / 2
    return peaks


def _efficiency(dtype: str, peaks, cluster: Cluster, compute: ComputeFigures) -> float:
    """Of the largest product; as before for what was not measured."""
    if dtype not in compute.products:
        return cluster.device.matmul_efficiency[dtype]
    return _share(compute.products[dtype][-1][1], peaks[dtype])


def _shares(curves: Mapping[str, Points], peaks: Mapping[str, float]) -> dict[str, list]:
    return {
        dtype: [[_rounded(flops / _GIGA), _share(rate, peaks[dtype])] for flops, rate in points]
        for dtype, points in curves.items()
    }


def _share(rate: float, peak: float) -> float:
    """A device that runs faster than its datasheet says reaches all of its peak."""
    return _rounded(min(1.0, rate / peak))


def _links(cluster: Cluster, measured: Measured) -> tuple[dict, dict]:
    inside = _gb_per_s(cluster.intra_host, measured.intra_host)
    between = _gb_per_s(cluster.inter_host, measured.inter_host)
    return (
        {"gb_per_s": inside, **_link(cluster.intra_host, measured.intra_host)},
        {
            "gbit_per_s": 8 * between,
            "shared_by_host": True,
            **_link(cluster.inter_host, measured.inter_host),
        },
    )


def _gb_per_s(link: Link, measured: LinkFigures | None) -> float:
    return _rounded((measured.bytes_per_s if measured else link.bytes_per_s) / _GIGA)


def _link(link: Link, measured: LinkFigures | None) -> dict[str, object]:
    curves = (
        measured.curves if measured else {kind: curve.points for kind, curve in link.curves.items()}
    )
    return {
        "latency_us": _rounded((measured.latency_s if measured else link.latency_s) / _MICRO),
        "collective_curve": {
            kind: [[_rounded(size / _MEGA), _rounded(rate / _GIGA)] for size, rate in points]
            for kind, points in curves.items()
        },
    }


def _sources(
    cluster: Cluster, measured: Measured, figures: Mapping[str, object], source: str
) -> dict[str, str]:
    """Where each figure comes from; those that were taken over keep their source."""
    found = dict(cluster.sources)
    found |= {f"device.{key}": source for key in figures if key != "peak_tflops"}
    if cluster.nominal:
        best = "the best rate of any product or convolution"
        found["device.peak_tflops"] = f"{source}: {best}; fp64 is taken to be half of fp32"
    for key, rate, link in (
        ("intra_host", "gb_per_s", measured.intra_host),
        ("inter_host", "gbit_per_s", measured.inter_host),
    ):
        if link is not None:
            found |= {f"{key}.{name}": source for name in (rate, "latency_us", "collective_curve")}
    return found


def _rounded(figure: float) -> float:
    """Four digits: more than any measurement has."""
    return float(f"{figure:.4g}")
