"""Clusters from files, from a composed config, and from the devices at hand.

Files (docs/clusters.md) say for each figure what it is in its key's name; what comes out is in SI units
(`hosts`, `device`). Nothing here touches a device: the runtime counts what it finds and passes plain numbers
to `cluster_at_hand`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launcher.autopar.clusters.device import GIB, GIGA, Device, Link, read_device, read_link
from launcher.autopar.clusters.device_kinds import KNOWN_KINDS, MEMORY_BYTES_PER_S, has_bf16
from launcher.autopar.clusters.hosts import MOST_HOSTS, AnyCluster, Cluster, MixedCluster
from launcher.autopar.text.strict_reader import Node
from launcher.autopar.text.strict_yaml import load_yaml
from launcher.config import ClusterConfig, conf_dir
from launcher.errors import ConfigError

_MOST_DEVICES_PER_HOST = 1024
# What a file says of its hosts; of several kinds, each group says it.
_OF_HOSTS = ("hosts", "devices_per_host", "device", "intra_host")
# What else a file may say; how the cluster takes jobs matters to no plan.
_OTHERS = ("nominal", "sources", "slurm")


def load_cluster(name_or_path: str | Path) -> AnyCluster:
    """Load a packaged cluster by its name, or a YAML file of the same form by its path."""
    return _read(_open(name_or_path, "cluster"))


def cluster_from_config(config: ClusterConfig) -> AnyCluster:
    """Return the cluster that a composed config describes."""
    figures = dataclasses.asdict(config)
    del figures["slurm"]  # how it takes jobs, which no plan depends on
    given = {name: value for name, value in figures.items() if value is not None}
    return _read(Node(value=given, place="cluster"))


def _open(name_or_path: str | Path, key: str) -> Node:
    """The contents of a cluster file that `key` names."""
    text = str(name_or_path)
    folder = conf_dir() / "cluster"
    is_path = isinstance(name_or_path, Path) or "/" in text or text.endswith((".yaml", ".yml"))
    path = Path(text) if is_path else folder / f"{text}.yaml"
    if not is_path and not path.is_file():
        names = sorted(file.stem for file in folder.glob("*.yaml"))
        raise ConfigError(
            f"{key}={text} is unknown, the launcher has {len(names)}: "
            f"take one of {', '.join(names)}, or give the path of a YAML file"
        )
    return Node(value=load_yaml(path, key), place="", source=str(path))


def _read(top: Node) -> AnyCluster:
    found = top.entries()
    if "groups" in found and not found["groups"].is_null:
        return _read_groups(top)
    fields = top.fields(("name", *_OF_HOSTS, "inter_host"), ("groups", *_OTHERS))
    return _read_hosts(
        fields,
        name=fields["name"].text(),
        nominal=_is_nominal(fields["nominal"]),
        sources=_read_sources(fields["sources"]),
    )


def _read_hosts(fields: Mapping[str, Node], **others) -> Cluster:
    """Equal hosts, from the fields that say what they are."""
    intra_host = fields["intra_host"].fields(("gb_per_s", "latency_us"), ("collective_curve",))
    devices_per_host = fields["devices_per_host"].integer(1, _MOST_DEVICES_PER_HOST)
    return Cluster(
        num_hosts=fields["hosts"].integer(1, MOST_HOSTS),
        devices_per_host=devices_per_host,
        device=read_device(fields["device"]),
        intra_host=read_link(intra_host["gb_per_s"].positive() * GIGA, intra_host),
        inter_host=_read_network(fields["inter_host"], devices_per_host),
        **others,
    )


def _read_network(node: Node, devices_per_host: int) -> Link:
    """The link of a host with so many devices."""
    fields = node.fields(("gbit_per_s", "latency_us"), ("shared_by_host", "collective_curve"))
    shared = fields["shared_by_host"]
    links = 1 if shared.is_null or shared.boolean() else devices_per_host
    return read_link(fields["gbit_per_s"].positive() * GIGA / 8 * links, fields)


def _is_nominal(node: Node) -> bool:
    return False if node.is_null else node.boolean()


def _read_sources(node: Node) -> dict[str, str]:
    sources = {} if node.is_null else node.entries()
    return {figure: source.text() for figure, source in sources.items()}


def _read_groups(top: Node) -> AnyCluster:
    """Several kinds of hosts; a single one is a cluster of equal hosts."""
    for name in _OF_HOSTS:
        node = top.entries().get(name)
        if node is not None and not node.is_null:
            groups = top.entries()["groups"]
            node.fail(
                f"contradicts {groups.place}, which has that for each kind of hosts",
                "set it there, or start from a cluster that has groups (cluster=v100-a100)",
            )
    fields = top.fields(("name", "groups", "inter_host"), (*_OF_HOSTS, *_OTHERS))
    name, groups = fields["name"].text(), fields["groups"].items()
    if not groups:
        fields["groups"].fail("has no hosts", "list at least one kind of them, or drop the key")
    kinds = tuple(
        _read_group(group, fields["inter_host"], f"{name}.groups[{index}]")
        for index, group in enumerate(groups)
    )
    _check_alike(groups, kinds)
    nominal = _is_nominal(fields["nominal"]) or any(kind.nominal for kind in kinds)
    sources = _read_sources(fields["sources"])
    if len(kinds) == 1:
        return replace(
            kinds[0], name=name, nominal=nominal, sources={**kinds[0].sources, **sources}
        )
    of_kinds = {
        f"groups[{index}].{figure}": source
        for index, kind in enumerate(kinds)
        for figure, source in kind.sources.items()
    }
    return MixedCluster(
        name=name,
        kinds=kinds,
        inter_host=_read_network(fields["inter_host"], min(k.devices_per_host for k in kinds)),
        nominal=nominal,
        sources={**of_kinds, **sources},
    )


def _read_group(node: Node, network: Node, name: str) -> Cluster:
    """One kind of hosts: what the group says, else the file that it names, else the whole cluster."""
    own = node.fields((), ("cluster", *_OF_HOSTS, "inter_host"))
    fields = {"inter_host": network}
    if not own["cluster"].is_null:
        file = _open(own["cluster"].text(), own["cluster"].place)
        fields |= file.fields(("name", *_OF_HOSTS, "inter_host"), _OTHERS)
    fields |= {key: value for key, value in own.items() if key not in fields or not value.is_null}
    for key in _OF_HOSTS:
        if fields[key].is_null:
            fields[key].fail(
                "is missing", "add it, or name a cluster file that has it (cluster: NAME)"
            )
    absent = Node(value=None, place=node.place)
    return _read_hosts(
        fields,
        name=name,
        nominal=_is_nominal(fields.get("nominal", absent)),
        sources=_read_sources(fields.get("sources", absent)),
    )


def _check_alike(groups: Sequence[Node], kinds: Sequence[Cluster]) -> None:
    """Accelerators and slices of a CPU do not make one machine."""
    for node, kind in zip(groups, kinds, strict=True):
        if kind.has_accelerators != kinds[0].has_accelerators:
            node.child("device", None).child("accelerator", kind.has_accelerators).fail(
                f"is not {kinds[0].has_accelerators}, as in {groups[0].place}",
                "take accelerators in all groups, or in none",
            )


def cluster_at_hand(kind: str, count: int, memory_bytes: int | None) -> Cluster:
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


def _guess(kind: str) -> Cluster:
    """Figures for an accelerator nobody described: a small GPU on PCI Express, so as not to promise
    what it may not keep."""
    guess = "guess: the figures of a small GPU on PCI Express, because this kind is not known"
    computes_bf16 = has_bf16(kind)
    peaks = {"fp64": 0.2e12, "fp32": 8e12, "fp16": 30e12}
    peaks |= {"bf16": 30e12} if computes_bf16 else {}
    device = Device(
        kind=kind,
        memory_bytes=8 * GIB,
        reserved_bytes=GIB,
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
