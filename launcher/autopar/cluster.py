"""The physical machine as numbers: hosts, devices, memories, rates and links, all in SI units.

Cluster files (docs/clusters.md) say GiB, TFLOP/s and Gb/s in their key names; here they are bytes,
FLOP/s and bytes/s. Nothing here touches a device: the runtime counts what it finds and passes plain
numbers to `Cluster.local`. What communication costs on a logical mesh is in `mesh`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from launcher.autopar.curves import Curves, read_curve, read_curves
from launcher.autopar.device_kinds import KNOWN_KINDS, MEMORY_BYTES_PER_S, has_bf16, is_nvidia
from launcher.autopar.strict_reader import Node
from launcher.autopar.strict_yaml import load_yaml
from launcher.autopar.wording import count
from launcher.autopar.work import KINDS
from launcher.config import ClusterConfig, conf_dir
from launcher.errors import ConfigError

DTYPES = ("fp64", "fp32", "fp16", "bf16")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
_GIB, _TERA, _GIGA, _MEGA = 2**30, 1e12, 1e9, 1e6
_MICRO, _NANO = 1e-6, 1e-9
_CURVES = ("matmul_curve", "convolution_curve", "kernel_gradient_curve", "batched_matmul_curve")
_FEW_HOSTS = 16  # any number of which a stage may get
_MOST_HOSTS, _MOST_DEVICES_PER_HOST = 100_000, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device.

    Attributes:
        reserved_bytes: Of its memory, what the driver and communication libraries take.
        peak_flops_per_s: dtype (fp32, bf16, ...) -> dense peak rate.
        matmul_efficiency: dtype -> the share of the peak that large matrix products reach.
        accelerator: Whether it is one; a slice of a CPU is not.
        matmul_curve: dtype -> the share of the peak by the FLOPs of one product on one device; where it
            is missing, all products reach `matmul_efficiency`.
        convolution_curve: The same for convolutions; where it is missing, they are as products.
        kernel_gradient_curve: The same for convolutions that are the gradient of a kernel; where it is
            missing, they are as others.
        batched_matmul_curve: The same for products with a batch, by the FLOPs of one of them.
        element_s: Kind of op (`work.KINDS`) -> seconds per element, for devices on which other ops are
            bound by arithmetic; where it is empty, memory binds them.
        op_overhead_s: What each kernel takes beside its work.
        program_launch_s: What starting each program of a step takes.
        array_launch_s: What each array adds to it that the program takes or makes.
        concurrency: (devices of a machine that compute at once, how many times slower each of them is).
    """

    kind: str
    memory_bytes: int
    peak_flops_per_s: Mapping[str, float]
    matmul_efficiency: Mapping[str, float]
    memory_bytes_per_s: float
    has_bf16: bool
    accelerator: bool
    reserved_bytes: int = 0
    matmul_curve: Curves = field(default_factory=dict)
    convolution_curve: Curves = field(default_factory=dict)
    kernel_gradient_curve: Curves = field(default_factory=dict)
    batched_matmul_curve: Curves = field(default_factory=dict)
    element_s: Mapping[str, float] = field(default_factory=dict)
    op_overhead_s: float = 0.0
    program_launch_s: float = 0.0
    array_launch_s: float = 0.0
    concurrency: tuple[tuple[float, float], ...] = ((1.0, 1.0),)

    @property
    def usable_bytes(self) -> int:
        """Return the memory that a plan may fill."""
        return self.memory_bytes - self.reserved_bytes

    @property
    def has_cudnn_attention(self) -> bool:
        """Return whether cuDNN's fused attention runs on it.

        It needs compute capability 8.0, and those are NVIDIA's GPUs with bf16.
        """
        return self.accelerator and self.has_bf16 and is_nvidia(self.kind)

    def slowdown(self, at_once: int | None) -> float:
        """Return how many times slower it is while so many devices of its machine compute.

        None stands for all of them: the last point of `concurrency`.
        """
        counts, factors = zip(*self.concurrency, strict=True)
        return float(np.interp(counts[-1] if at_once is None else at_once, counts, factors))


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What a message costs: `latency_s`, and its bytes over `bytes_per_s`, one direction.

    Attributes:
        curves: collective, or "send" -> bytes per second by the bytes that each device sends, as measured
            with all that they take: where there is one, nothing else is charged.
    """

    bytes_per_s: float
    latency_s: float
    curves: Curves = field(default_factory=dict)

    def send_s(self, num_bytes: float) -> float:
        """Return how long a message takes."""
        if "send" in self.curves:
            return float(self.curves["send"].seconds(num_bytes))
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Submesh:
    """The shape of a rectangle of the cluster."""

    hosts: int
    devices: int

    @property
    def num_devices(self) -> int:
        return self.hosts * self.devices


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRef:
    """How a plan names the cluster that it was made for."""

    name: str
    hosts: int
    devices_per_host: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal hosts of equal devices.

    Attributes:
        intra_host: The links of one device to the others of its host.
        inter_host: The network link of one host, shared by its devices.
        nominal: The figures are round numbers or guesses, and no peak is known.
        sources: Figure -> where it comes from.
    """

    name: str
    num_hosts: int
    devices_per_host: int
    device: Device
    intra_host: Link
    inter_host: Link
    nominal: bool
    sources: Mapping[str, str]

    @property
    def num_devices(self) -> int:
        return self.num_hosts * self.devices_per_host

    @property
    def memory_bytes(self) -> int:
        """Return the memory of all devices together."""
        return self.num_devices * self.device.memory_bytes

    @property
    def default_dtype(self) -> str:
        """Return what `model.dtype=auto` computes in."""
        if self.device.has_bf16:
            return "bf16"
        return "fp16" if self.device.accelerator else "fp32"

    def peak_flops_per_s(self, dtype: str) -> float | None:
        """Return the peak that MFU refers to; None where it is not known: MFU is never a guess."""
        return None if self.nominal else self.device.peak_flops_per_s.get(dtype)

    def machine_of(self, host: int) -> int:
        """Return which machine a host is: itself, unless one machine emulates all of them."""
        return host if self.device.accelerator else 0

    def ref(self) -> ClusterRef:
        """Return the name and shape for a plan."""
        return ClusterRef(
            name=self.name, hosts=self.num_hosts, devices_per_host=self.devices_per_host
        )

    def describe(self) -> str:
        """Return the cluster in one line."""
        between = f", {self.inter_host.bytes_per_s * 8 / _GIGA:g} Gb/s between hosts"
        return (
            f"{self.name}: {count(self.num_hosts, 'host')} x {self.devices_per_host} "
            f"{self.device.kind} ({self.device.memory_bytes / _GIB:.4g} GiB each"
            f"{between if self.num_hosts > 1 else ''})"
            f"{'; its figures are nominal, not measured' if self.nominal else ''}"
        )

    def submeshes(self) -> tuple[Submesh, ...]:
        """Return the shapes that stages may get: parts of a host, or whole hosts.

        Parts are powers of two and divisors of a host's devices; of more than a few hosts those numbers are
        taken that are powers of two or divide them all.
        """
        few = self.num_hosts <= _FEW_HOSTS
        numbers = range(1, self.num_hosts + 1) if few else _round_numbers(self.num_hosts)
        slices = [n for n in _round_numbers(self.devices_per_host) if n < self.devices_per_host]
        return (
            *(Submesh(hosts=1, devices=width) for width in slices),
            *(Submesh(hosts=hosts, devices=self.devices_per_host) for hosts in numbers),
        )

    def replace(self, *, hosts: int) -> "Cluster":
        """Return the same kind of cluster with another number of hosts."""
        number = Node(value=hosts, place="cluster.hosts").integer(1, _MOST_HOSTS)
        return replace(self, num_hosts=number)

    @classmethod
    def from_config(cls, config: ClusterConfig) -> "Cluster":
        """Return the cluster that a composed config describes."""
        return _read(Node(value=dataclasses.asdict(config), place="cluster"))

    @classmethod
    def local(cls, *, kind: str, count: int, memory_bytes: int | None) -> "Cluster":
        """Return the devices at hand as a cluster: one host of accelerators, or the emulated CPU.

        Args:
            kind: As JAX reports it.
            count: Of accelerators; 0 if there is none.
            memory_bytes: Of one of them, as JAX may use it; None if it does not say.
        """
        if count == 0:
            return load_cluster("cpu8")
        model = kind.removeprefix("NVIDIA ").removeprefix("Tesla ")
        known = model in KNOWN_KINDS
        base = load_cluster(KNOWN_KINDS[model]) if known else _guess(kind)
        device = replace(
            base.device,
            kind=kind,
            memory_bytes=memory_bytes or base.device.memory_bytes,
            # What JAX may use is its pool: the reserve lies outside it.
            reserved_bytes=0 if memory_bytes else base.device.reserved_bytes,
            memory_bytes_per_s=MEMORY_BYTES_PER_S.get(model, base.device.memory_bytes_per_s),
        )
        reported = {"device.memory_gib": "what JAX may use of it"} if memory_bytes else {}
        return replace(
            base,
            name="local",
            num_hosts=1,
            devices_per_host=count,
            device=device,
            sources={**base.sources, **reported},
        )


def _round_numbers(most: int) -> list[int]:
    """The powers of two up to a number, and its divisors."""
    return [n for n in range(1, most + 1) if most % n == 0 or n & (n - 1) == 0]


def load_cluster(name_or_path: str | Path) -> Cluster:
    """Load a packaged cluster by its name, or a YAML file of the same form by its path."""
    text = str(name_or_path)
    folder = conf_dir() / "cluster"
    is_path = isinstance(name_or_path, Path) or "/" in text or text.endswith((".yaml", ".yml"))
    path = Path(text) if is_path else folder / f"{text}.yaml"
    if not is_path and not path.is_file():
        names = sorted(file.stem for file in folder.glob("*.yaml"))
        raise ConfigError(
            f"cluster={text} is unknown, the launcher has {len(names)}: "
            f"take one of {', '.join(names)}, or give the path of a YAML file"
        )
    return _read(Node(value=load_yaml(path), place="", source=str(path)))


def _read(top: Node) -> Cluster:
    fields = top.fields(
        ("name", "hosts", "devices_per_host", "device", "intra_host", "inter_host"),
        ("nominal", "sources"),
    )
    intra_host = fields["intra_host"].fields(("gb_per_s", "latency_us"), ("collective_curve",))
    inter_host = fields["inter_host"].fields(
        ("gbit_per_s", "latency_us"), ("shared_by_host", "collective_curve")
    )
    devices_per_host = fields["devices_per_host"].integer(1, _MOST_DEVICES_PER_HOST)
    shared = inter_host["shared_by_host"]
    links = 1 if shared.is_null or shared.boolean() else devices_per_host
    sources = {} if fields["sources"].is_null else fields["sources"].entries()
    return Cluster(
        name=fields["name"].text(),
        num_hosts=fields["hosts"].integer(1, _MOST_HOSTS),
        devices_per_host=devices_per_host,
        device=_read_device(fields["device"]),
        intra_host=_link(intra_host["gb_per_s"].positive() * _GIGA, intra_host),
        inter_host=_link(inter_host["gbit_per_s"].positive() * _GIGA / 8 * links, inter_host),
        nominal=False if fields["nominal"].is_null else fields["nominal"].boolean(),
        sources={figure: source.text() for figure, source in sources.items()},
    )


def _link(bytes_per_s: float, fields: Mapping[str, Node]) -> Link:
    return Link(
        bytes_per_s=bytes_per_s,
        latency_s=fields["latency_us"].number() * _MICRO,
        curves=read_curves(
            fields["collective_curve"], COLLECTIVES, size_unit=_MEGA, rate_unit=_GIGA
        ),
    )


def _read_device(node: Node) -> Device:
    fields = node.fields(
        (
            "kind", "memory_gib", "peak_tflops", "memory_gb_per_s", "matmul_efficiency", "has_bf16",
            "accelerator",
        ),
        (
            "reserved_gib", "matmul_curve", "convolution_curve", "kernel_gradient_curve",
            "batched_matmul_curve", "element_ns", "op_overhead_us",
            "program_launch_us", "array_launch_us", "concurrency",
        ),
    )  # fmt: skip
    peaks = fields["peak_tflops"].fields(("fp32",), [name for name in DTYPES if name != "fp32"])
    known = {dtype: peak for dtype, peak in peaks.items() if not peak.is_null}
    efficiency = fields["matmul_efficiency"].fields(tuple(known))
    memory_gib = fields["memory_gib"].positive()
    curves = {
        name: read_curves(fields[name], known, size_unit=_GIGA, rate_unit=1.0, maximum=1.0)
        for name in _CURVES
    }
    return Device(
        kind=fields["kind"].text(),
        memory_bytes=int(memory_gib * _GIB),
        reserved_bytes=int(_or_zero(fields["reserved_gib"], maximum=memory_gib) * _GIB),
        peak_flops_per_s={dtype: peak.positive() * _TERA for dtype, peak in known.items()},
        matmul_efficiency={
            dtype: share.positive(maximum=1.0) for dtype, share in efficiency.items()
        },
        memory_bytes_per_s=fields["memory_gb_per_s"].positive() * _GIGA,
        has_bf16=fields["has_bf16"].boolean(),
        accelerator=fields["accelerator"].boolean(),
        op_overhead_s=_or_zero(fields["op_overhead_us"]) * _MICRO,
        program_launch_s=_or_zero(fields["program_launch_us"]) * _MICRO,
        array_launch_s=_or_zero(fields["array_launch_us"]) * _MICRO,
        concurrency=_read_concurrency(fields["concurrency"]),
        element_s=_read_elements(fields["element_ns"]),
        **curves,
    )


def _read_elements(node: Node) -> dict[str, float]:
    """All kinds of ops or none, or some would be free."""
    kinds = {} if node.is_null or not node.entries() else node.fields(KINDS)
    return {kind: value.positive() * _NANO for kind, value in kinds.items()}


def _or_zero(node: Node, **limits: float) -> float:
    return 0.0 if node.is_null else node.number(**limits)


def _read_concurrency(node: Node) -> tuple[tuple[float, float], ...]:
    """Points (devices at once, slowdown); a list that is left out or empty slows nothing down."""
    if node.is_null or not node.items():
        return ((1.0, 1.0),)
    return read_curve(node, size_unit=1.0, rate_unit=1.0).points


def _guess(kind: str) -> Cluster:
    """Figures for an accelerator nobody described: a small GPU on PCI Express, so as not to promise
    what it may not keep."""
    guess = "guess: the figures of a small GPU on PCI Express, because this kind is not known"
    computes_bf16 = has_bf16(kind)
    peaks = {"fp64": 0.2e12, "fp32": 8e12, "fp16": 30e12}
    peaks |= {"bf16": 30e12} if computes_bf16 else {}
    device = Device(
        kind=kind,
        memory_bytes=8 * _GIB,
        reserved_bytes=_GIB,
        peak_flops_per_s=peaks,
        matmul_efficiency=dict.fromkeys(peaks, 0.5),
        memory_bytes_per_s=300e9,
        has_bf16=computes_bf16,
        accelerator=True,
    )
    return Cluster(
        name="local",
        num_hosts=1,
        devices_per_host=1,
        device=device,
        intra_host=Link(bytes_per_s=10e9, latency_s=20e-6),
        inter_host=Link(bytes_per_s=1.25e9, latency_s=50e-6),
        nominal=True,
        sources={"device": guess, "intra_host": guess, "inter_host": guess},
    )
