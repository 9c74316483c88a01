"""The keys of runs over several hosts: what each may be, who reads it, and which runs go that way."""

import pytest

from launcher.autopar.clusters.cluster import load_cluster
from launcher.cli.compose import load
from launcher.errors import ConfigError
from launcher.inputs import runs_on_hosts
from launcher.on_hosts import emulating

REFUSED = [
    (["runtime=mesos"], "runtime=mesos is unknown: take one of auto, emulate, local, ray"),
    (["runtime.max_restarts=-1"], "runtime.max_restarts=-1 is less than 0"),
    (["runtime.heartbeat_s=0"], "runtime.heartbeat_s=0.0 is less than 0.1"),
    (["runtime.heartbeat_s=1e9"], "give at least 0.1 and less than 3601"),
    (
        ["runtime.address=head"],
        "runtime.address=head is not of the form host:port: give that of the",
    ),
    (["runtime.address=head:x"], "runtime.address=head:x is not of the form host:port"),
    (["runtime.address=head:99999"], "runtime.address=head:99999 is not of the form host:port"),
    (["runtime.address='ray://head:10001'"], "runtime.address=ray://head:10001 is not of the form"),
    (
        ["runtime=emulate", "runtime.address=head:6379"],
        "runtime.address=head:6379 contradicts runtime=emulate, which runs in this process: leave it",
    ),
    (["runtime=ray", "mode=eval"], "runtime=ray contradicts mode=eval, which runs in one process"),
    (["runtime=ray", "mode=profile"], "runtime=ray contradicts mode=profile"),
    (
        ["runtime=ray", "train.trace_steps=[2]"],
        "train.trace_steps=[2] contradicts runtime=ray, as only the steps of one process are watched",
    ),
    (["runtime=ray", "train.profile_steps=[2]"], "train.profile_steps=[2] contradicts runtime=ray"),
]


@pytest.mark.parametrize(("overrides", "says"), REFUSED)
def test_refused(overrides, says):
    with pytest.raises(ConfigError) as error:
        load(overrides)
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["auto", "local", "emulate", "ray"])
def test_every_key_is_there_under_every_choice(name):
    runtime = load([f"runtime={name}", "runtime.max_restarts=7", "runtime.heartbeat_s=2"]).runtime
    assert (runtime.name, runtime.max_restarts, runtime.heartbeat_s) == (name, 7, 2.0)
    assert runtime.address == "auto"


@pytest.mark.parametrize(
    "address", ["auto", "null", "10.0.0.1:6379", "[::1]:6379", "head.cluster:1"]
)
def test_addresses(address):
    config = load(
        [
            "runtime=ray",
            f"runtime.address='{address}'" if ":" in address else f"runtime.address={address}",
        ]
    )
    assert config.runtime.address == (None if address == "null" else address)


HEAD = "runtime.address=head:6379"


@pytest.mark.parametrize(
    ("overrides", "cluster", "goes"),
    [
        (["runtime=ray"], "cpu8", True),
        (["runtime=ray"], "1xp3", True),
        (["runtime=ray", "mode=plan"], "cpu8", False),
        ([], "8xp3", False),  # nobody said where the hosts are
        ([HEAD], "8xp3", True),
        ([HEAD], "1xp3", False),
        ([HEAD], "cpu8", False),
        ([HEAD], "v100-a100", True),
        ([HEAD, "mode=eval"], "8xp3", False),
        (["runtime=local"], "8xp3", False),
        (["runtime=emulate"], "8xp3", False),
    ],
)
def test_which_runs_are_over_hosts(overrides, cluster, goes, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert runs_on_hosts(load(overrides), load_cluster(cluster)) == goes


def test_the_address_of_the_environment_counts(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert runs_on_hosts(load([]), load_cluster("8xp3"))
    assert not runs_on_hosts(load(["runtime.address=null"]), load_cluster("8xp3"))


def test_the_environment_of_an_emulated_host():
    given = {"XLA_FLAGS": "--xla_dump_to=x --xla_force_host_platform_device_count=8", "NPROC": "3"}
    assert emulating(2, given) == {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_dump_to=x --xla_force_host_platform_device_count=2",
        "NPROC": "8",
    }
    assert emulating(4, {"NPROC": "64"})["NPROC"] == "64"
