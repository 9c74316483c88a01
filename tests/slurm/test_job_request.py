"""What a job asks for, from the cluster's file and the sweep over it; and what it cannot ask for."""

import dataclasses
import functools
import re

import pytest

from launcher.cli import compose
from launcher.errors import ConfigError
from launcher.slurm.commands import refused
from launcher.slurm.job_request import FIELDS, job_request

KEY = "cluster.slurm"


@functools.cache
def loaded(*overrides):
    return compose.load(overrides)


def config(*overrides, **slurm):
    found = loaded(*overrides)
    given = dataclasses.replace(found.cluster.slurm, **slurm)
    return dataclasses.replace(found, cluster=dataclasses.replace(found.cluster, slurm=given))


@pytest.mark.parametrize(
    ("overrides", "extent"),
    [
        (("cluster=8xp3",), (8, 8)),
        (("cluster=dgx-h100", "cluster.hosts=3"), (3, 8)),
        (("cluster=cpu8",), (1, 0)),
        (("cluster=local",), (1, 0)),
        (("cluster=8xp3", "runtime=emulate"), (1, 0)),
        (("cluster=v100-a100", "cluster.slurm.nodes=3", "cluster.slurm.gpus_per_node=8"), (3, 8)),
    ],
    ids=str,
)
def test_a_job_asks_for_the_hosts_of_its_cluster(overrides, extent):
    request = job_request(loaded(*overrides))
    assert (request.nodes, request.gpus_per_node) == extent


def test_a_sweep_goes_before_the_cluster_key_by_key():
    own = {"partition": "high", "nodes": None, "setup": ["module load a"], "max_restarts": 0}
    request = job_request(config("cluster=8xp3", partition="main", account="lab", nodes=2), own)
    assert (request.partition, request.account, request.nodes) == ("high", "lab", 2)
    assert (request.setup, request.max_restarts) == (("module load a",), 0)
    assert request.keys["partition"] == "hydra.launcher.partition"
    assert request.keys["account"] == "cluster.slurm.account"


def test_the_sweep_has_the_keys_of_the_cluster():
    from hydra_plugins.launcher_slurm.slurm_launcher import SlurmLauncherConf

    names = {field.name for field in dataclasses.fields(SlurmLauncherConf)}
    assert names == {*FIELDS, "_target_", "wait"}


@pytest.mark.parametrize("time", ["4:00:00", "1-12:00:00", "90:00", "2-0"])
def test_times_with_a_unit(time):
    assert job_request(config(time=time)).time == time


@pytest.mark.parametrize(
    ("slurm", "says"),
    [
        ({"nodes": 0}, f"{KEY}.nodes=0 is not in 1..100000: correct it"),
        ({"gpus_per_node": -1}, f"{KEY}.gpus_per_node=-1 is not in 0..100000: correct it"),
        ({"cpus_per_task": 0}, f"{KEY}.cpus_per_task=0 is not in 1..100000: correct it"),
        ({"warn_s": 99999}, f"{KEY}.warn_s=99999 is not in 0..65535: correct it"),
        ({"max_restarts": -1}, f"{KEY}.max_restarts=-1 is not in 0..100000: correct it"),
        ({"mem_gb": 0.0}, f"{KEY}.mem_gb=0.0 is no size of a node's memory in GB: give a number"),
        (
            {"time": "240"},
            f"{KEY}.time=240 is no time of Slurm with a unit that can be told: write",
        ),
        ({"time": "4h"}, f"{KEY}.time=4h is no time of Slurm"),
        ({"partition": ""}, f"{KEY}.partition='' is empty: give a value, or leave it out"),
        ({"qos": "a\nb"}, f"{KEY}.qos='a\\nb' has a character that no line of a batch script has"),
        ({"setup": ["a", "b\nrm c"]}, f"{KEY}.setup='b\\nrm c' has a character that no line"),
        ({"srun": [" "]}, f"{KEY}.srun='' is empty"),
        (
            {"env": {"2A": "b"}},
            f"{KEY}.env has '2A', which is no name of a variable: write letters",
        ),
        ({"env": {"MY_API_KEY": "b"}}, f"{KEY}.env.MY_API_KEY would write a secret to the run's"),
        ({"sbatch": {"time": 3}}, f"{KEY}.sbatch.time=3 has a key of its own: give {KEY}.time"),
        ({"sbatch": {"mem": 3}}, f"{KEY}.sbatch.mem=3 has a key of its own: give {KEY}.mem_gb"),
        ({"sbatch": {"array": 3}}, f"{KEY}.sbatch.array=3 is set by the launcher, which depends"),
        ({"sbatch": {"no_requeue": True}}, f"{KEY}.sbatch.no_requeue=True is set by the launcher"),
        ({"sbatch": {"-x": 3}}, f"{KEY}.sbatch.-x=3 is no option of sbatch: write its long name"),
        ({"sbatch": {"nice": [1]}}, f"{KEY}.sbatch.nice=[1] is no option of sbatch"),
    ],
    ids=str,
)
def test_what_no_job_can_ask_for(slurm, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        job_request(config(**slurm))


def test_kinds_of_hosts_have_no_one_shape():
    with pytest.raises(
        ConfigError, match=r"cluster=v100-a100 has several kinds.*cluster\.slurm\.nodes"
    ):
        job_request(config("cluster=v100-a100"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("invalid partition specified: gpu", f"({KEY}.partition=null): correct it; `sinfo` lists"),
        ("Invalid account or account/partition combination specified", f"({KEY}.account=null)"),
        ("Invalid qos specification", f"({KEY}.qos=null)"),
        ("Requested time limit is invalid", f"({KEY}.time=null)"),
        ("Memory specification can not be satisfied", f"({KEY}.mem_gb=null)"),
        ("Requested node configuration is not available", f"({KEY}.nodes=1)"),
        ("Invalid generic resource (gres) specification", f"({KEY}.gpus_per_node=0)"),
        ("Invalid feature specification", f"({KEY}.constraint=null)"),
        ("Unspecified error", ": correct cluster.slurm (see the batch script"),
    ],
)  # fmt: skip
def test_a_refusal_has_the_words_of_slurm_and_names_the_key(words, says):
    error = refused(f"sbatch: error: {words}\n", job_request(config()))
    assert str(error).startswith(f"sbatch refuses the job: {words}")
    assert says in str(error)
