"""What a job asks of Slurm: the settings of the cluster, those of the sweep over them, checked.

Whether the cluster has such a partition, and grants what is asked for, only Slurm knows (`submission`).
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.config import ClusterConfig, Config
from launcher.errors import ConfigError
from launcher.secrets import check_no_secret, is_secret_name
from launcher.slurm_config import SlurmConfig

CLUSTER_KEY, SWEEP_KEY = "cluster.slurm", "hydra.launcher"

# hours:minutes:seconds, minutes:seconds, days-hours and so on. No bare number: it would be minutes, and YAML
# reads 4:00:00 without quotes as the number 14400.
_TIME = re.compile(r"(\d+-)?\d{1,3}(:\d{2}){1,2}|\d+-\d{1,2}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")

# Options that a key of ours sets, or that a job depends on.
_OWN_OPTIONS: Mapping[str, str] = {
    **{name: name for name in ("partition", "account", "qos", "time", "nodes", "constraint", "exclusive")},
    "gpus-per-node": "gpus_per_node",
    "gres": "gpus_per_node",
    "cpus-per-task": "cpus_per_task",
    "mem": "mem_gb",
    "signal": "warn_s",
    "export": "env",
}  # fmt: skip
_FIXED_OPTIONS = (
    "array", "chdir", "error", "job-name", "no-requeue", "ntasks", "ntasks-per-node", "open-mode",
    "output", "requeue", "wrap",
)  # fmt: skip
_SMALLEST: Mapping[str, int] = {
    "nodes": 1, "gpus_per_node": 0, "cpus_per_task": 1, "warn_s": 0, "max_restarts": 0,
}  # fmt: skip
_MOST, _MOST_S = 100_000, 65_535  # of --signal


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """What a job asks for; None where Slurm decides.

    Attributes:
        keys: Name of a field -> the config key that set it.
        setup, srun: Lines of bash before the run, and arguments of srun.
        python: A command; None: the interpreter that submits.
        warn_s: So long before its time is up the run is told.
        max_restarts: After a process or a node died without a word.
    """

    partition: str | None
    account: str | None
    qos: str | None
    time: str | None
    nodes: int
    gpus_per_node: int
    cpus_per_task: int | None
    mem_gb: float | None
    exclusive: bool | None
    constraint: str | None
    sbatch: Mapping[str, object]
    srun: tuple[str, ...]
    setup: tuple[str, ...]
    env: Mapping[str, str]
    python: str | None
    warn_s: int
    max_restarts: int
    keys: Mapping[str, str]


FIELDS = tuple(field.name for field in dataclasses.fields(SlurmConfig))


def job_request(config: Config, over: Mapping[str, object] | None = None) -> JobRequest:
    """Return what a job of this run asks for.

    Args:
        over: What a sweep sets itself; None in it: as the cluster says.

    Raises:
        ConfigError: a setting that Slurm cannot be asked for.
    """
    cluster = config.cluster
    own = {name: value for name, value in (over or {}).items() if value is not None}
    settings = dataclasses.replace(cluster.slurm, **own)
    keys = {name: f"{SWEEP_KEY if name in own else CLUSTER_KEY}.{name}" for name in FIELDS}
    hosts, devices = _extent(cluster, emulated=config.runtime.name == "emulate")
    given = dataclasses.asdict(settings)
    values = {name: value for name, value in given.items() if value is not None}
    request = JobRequest(
        **{
            **dict.fromkeys(FIELDS),
            "nodes": hosts,
            "gpus_per_node": devices,
            **values,
            "srun": tuple(settings.srun),
            "setup": tuple(settings.setup),
            "keys": keys,
        }
    )
    _check(request)
    return request


def _extent(cluster: ClusterConfig, *, emulated: bool) -> tuple[int, int]:
    """How many nodes, and how many GPUs of each, a run on this cluster takes."""
    if cluster.groups is not None:
        return _extent_of_groups(cluster)
    if emulated or cluster.name == "local" or not (cluster.device and cluster.device.accelerator):
        return 1, 0
    return cluster.hosts or 1, cluster.devices_per_host or 0


def _extent_of_groups(cluster: ClusterConfig) -> tuple[int, int]:
    """Of several kinds of hosts; how many GPUs each has, one number does not say."""
    given = cluster.slurm
    if given.nodes is None or given.gpus_per_node is None:
        raise ConfigError(
            f"cluster={cluster.name} has several kinds of hosts (cluster.groups), and a job asks for nodes "
            f"of one shape: give {CLUSTER_KEY}.nodes and {CLUSTER_KEY}.gpus_per_node, or take a cluster of "
            f"one kind"
        )
    return given.nodes, given.gpus_per_node


def _check(request: JobRequest) -> None:
    for name in FIELDS:
        key, value = request.keys[name], dataclasses.asdict(request)[name]
        _check_texts(key, value)
        if name in _SMALLEST and value is not None:
            _check_number(key, value, _SMALLEST[name], _MOST_S if name == "warn_s" else _MOST)
    if request.mem_gb is not None and not 0 < request.mem_gb < 1e6:
        raise ConfigError(
            f"{request.keys['mem_gb']}={request.mem_gb} is no size of a node's memory in GB: give a number "
            f"above 0 and below 1000000, such as 64"
        )
    _check_time(request)
    _check_env(request)
    _check_options(request)


def _check_texts(key: str, value: object) -> None:
    """Every text becomes part of a line of the batch script."""
    parts = value.values() if isinstance(value, Mapping) else value
    texts = parts if not isinstance(parts, str) and isinstance(value, Mapping | tuple) else (value,)
    for text in texts:
        if not isinstance(text, str):
            continue
        check_no_secret(key, text)
        if not text.strip():
            raise ConfigError(f"{key}='' is empty: give a value, or leave it out")
        if not text.isprintable():
            raise ConfigError(
                f"{key}={text!r} has a character that no line of a batch script has: take it out, and "
                f"write each line by itself"
            )


def _check_number(key: str, value: int, smallest: int, most: int) -> None:
    if not smallest <= value <= most:
        raise ConfigError(f"{key}={value} is not in {smallest}..{most}: correct it")


def _check_time(request: JobRequest) -> None:
    if request.time is not None and not _TIME.fullmatch(request.time):
        raise ConfigError(
            f"{request.keys['time']}={request.time} is no time of Slurm with a unit that can be told: write "
            f"hours:minutes:seconds or days-hours, in YAML in quotes, such as '4:00:00'"
        )


def _check_env(request: JobRequest) -> None:
    for name in request.env:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(
                f"{request.keys['env']} has {name!r}, which is no name of a variable: write letters, digits "
                f"and _, such as NCCL_DEBUG"
            )
        if is_secret_name(name):
            raise ConfigError(
                f"{request.keys['env']}.{name} would write a secret to the run's files: leave it out, and "
                f"set {name} where you submit; jobs have that environment"
            )


def _check_options(request: JobRequest) -> None:
    place = request.keys["sbatch"]
    for name, value in request.sbatch.items():
        given = f"{place}.{name}={value}"
        option = name.replace("_", "-") if isinstance(name, str) else ""
        if option in _OWN_OPTIONS:
            own = request.keys[_OWN_OPTIONS[option]]
            raise ConfigError(f"{given} has a key of its own: give {own}")
        if option in _FIXED_OPTIONS:
            raise ConfigError(f"{given} is set by the launcher, which depends on it: leave it out")
        if not _OPTION.fullmatch(option) or not isinstance(value, str | int | float | bool):
            raise ConfigError(
                f"{given} is no option of sbatch: write its long name and a value, such as "
                f"+{place}.nice=100, or true for one without a value"
            )
