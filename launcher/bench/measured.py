"""Measured step times of GPTs on real clusters, as the files of a folder list them.

    megatron_sc21_a100.csv        Megatron-LM's table in its SC'21 paper, on Selene
    vtrain_a100_multi_node.csv    what vTrain (MICRO 2024) was validated with, on 64 to 512 A100s
    vtrain_a100_single_node.csv   the same on the GPUs of one node

All are Megatron-LM in fp16 with all activations recomputed, under 1F1B or its interleaved form. A file may be
missing. Left out: files whose rows lack what a model needs (the sequence length of Sailor's GH200 runs).
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.autopar import Cluster, load_cluster
from launcher.errors import ConfigError

_SC21_LENGTH = 2048
_GBIT = 1e9 / 8
# By hidden, layers, tp, pp, dp, microbatch: rows of vTrain's many nodes that its other rows contradict.
_ARTEFACTS = {
    (3072, 30, 8, 1, 8, 64): "twice as slow as with microbatches of 32, for the same products",
    (
        3072,
        30,
        8,
        1,
        8,
        2,
    ): "58 % slower than with microbatches of 4, which cost 8 % over those of 8",
    (
        3072,
        30,
        4,
        1,
        16,
        2,
    ): "31 % slower than with microbatches of 4, which cost 3 % over those of 8",
    (
        6144,
        40,
        8,
        1,
        32,
        16,
    ): "9 % slower than with microbatches of 8; elsewhere larger ones are faster",
    (
        6144,
        40,
        4,
        2,
        32,
        4,
    ): "slower than with microbatches of 2 (shorter bubble) and of 8 (longer bubble)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A step of one plan of one model, and how long it took.

    Attributes:
        microbatch: samples of one replica.
        virtual: stages of each submesh.
    """

    hidden: int
    layers: int
    heads: int
    length: int
    tp: int
    pp: int
    dp: int
    microbatch: int
    virtual: int
    global_batch: int
    step_s: float

    @property
    def num_devices(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def num_microbatches(self) -> int:
        return self.global_batch // (self.dp * self.microbatch)

    @property
    def task(self) -> tuple[int, ...]:
        """What plans can be compared by: the model, its batch, the number of devices."""
        return (self.hidden, self.layers, self.length, self.global_batch, self.num_devices)

    @property
    def artefact(self) -> str | None:
        """Why the row is held to be an artefact of the measurement, if it is."""
        return _ARTEFACTS.get(
            (self.hidden, self.layers, self.tp, self.pp, self.dp, self.microbatch)
        )

    def __str__(self) -> str:
        virtual = f" v={self.virtual}" if self.virtual > 1 else ""
        return f"tp={self.tp} pp={self.pp} dp={self.dp} microbatch={self.microbatch}{virtual}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file of measurements, and what is asked of predictions for it.

    Attributes:
        most_error: the bar on the mean absolute error of the step time.
        ranks: whether the bars on ranking plans hold too.
        cluster: what the measurements ran on, for a number of devices.
        read: a row's measurement.
    """

    file: str
    title: str
    most_error: float | None
    ranks: bool
    cluster: Callable[[int], Cluster]
    read: Callable[[Mapping[str, str]], Measurement]

    def measurements(self, folder: Path) -> list[Measurement]:
        """All rows of the file; none if it is missing."""
        path = folder / self.file
        if not path.is_file():
            return []
        with path.open(newline="") as file:
            return list(self._rows(path, csv.DictReader(file)))

    def _rows(self, path: Path, rows) -> Iterator[Measurement]:
        for row in rows:
            try:
                found = self.read(row)
            except (KeyError, ValueError, TypeError) as error:
                raise ConfigError(
                    f"line {rows.line_num} of {path} lacks a column or a number ({error}): correct it, or "
                    f"give another folder as data="
                ) from error
            yield found


def _dgx(num_devices: int, gbit_per_s: float) -> Cluster:
    """DGX A100s with a network of their own."""
    cluster = load_cluster("dgx-a100").replace(hosts=max(1, num_devices // 8))
    return replace(
        cluster,
        devices_per_host=min(8, num_devices),
        inter_host=replace(cluster.inter_host, bytes_per_s=gbit_per_s * _GBIT),
    )


def _sc21(row: Mapping[str, str]) -> Measurement:
    number = {key: int(row[key]) for key in ("hidden", "layers", "heads", "tp", "pp", "dp")}
    return Measurement(
        **number,
        length=_SC21_LENGTH,
        microbatch=int(row["mbs"]),
        virtual=int(row["vpp_chunks"]),
        global_batch=int(row["gbs"]),
        step_s=float(row["derived_iter_s"]),
    )


def _vtrain(row: Mapping[str, str]) -> Measurement:
    return Measurement(
        hidden=int(row["hidden size"]),
        layers=int(row["# layers"]),
        heads=int(row["attention heads"]),
        length=int(row["sequence length"]),
        tp=int(row["tensor parallelism"]),
        pp=int(row["pipeline parallelism"]),
        dp=int(row["data parallelism"]),
        microbatch=int(row["micro batch"]),
        virtual=1,
        global_batch=int(row["global batch"]),
        step_s=float(row["iteration time (ms)"]) / 1e3,
    )


SOURCES: Sequence[Source] = (
    Source(
        file="megatron_sc21_a100.csv",
        title="Megatron-LM at SC'21: DGX A100s, 8 x 200 Gb/s per host",
        most_error=0.08,
        ranks=False,
        cluster=lambda num_devices: _dgx(num_devices, 1600),
        read=_sc21,
    ),
    Source(
        file="vtrain_a100_multi_node.csv",
        title="vTrain, many nodes: 8 A100s and 800 Gb/s per host",
        most_error=0.10,
        ranks=True,
        cluster=lambda num_devices: _dgx(num_devices, 800),
        read=_vtrain,
    ),
    Source(
        file="vtrain_a100_single_node.csv",
        title="vTrain, one node of A100s",
        most_error=None,
        ranks=False,
        cluster=lambda num_devices: _dgx(num_devices, 800),
        read=_vtrain,
    ),
)
