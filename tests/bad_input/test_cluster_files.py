"""Cluster files that are none, that refer to themselves, or whose figures no machine has."""

import os
import pathlib

import pytest
import yaml
from bad_inputs import Bad, bad
from cluster_files import changed_at

from launcher.config import conf_dir

CPU8 = yaml.safe_load((conf_dir() / "cluster" / "cpu8.yaml").read_text())
ARGUMENTS = ("--config-dir=c", "cluster=mine", "mode=plan")
NETWORK = {"gbit_per_s": 8, "latency_us": 1}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{this}: &{this} [{', '.join([f'*{last}'] * 9)}]\n"
    for last, this in zip("abcdefgh", "bcdefghi", strict=True)
)


def holding(contents: object, says: str, name: str, **rest) -> Bad:
    """What `cluster=mine` finds."""
    if not isinstance(contents, str | bytes):
        contents = yaml.safe_dump(contents)
    files = {"c/cluster/mine.yaml": contents}
    return bad(*ARGUMENTS, files=files, says=says, name=name, **rest)


def referred(contents: str | bytes, says: str, name: str) -> Bad:
    """What a group of a cluster names as the file of its hosts."""
    top = {"name": "mine", "groups": [{"cluster": "m.yaml", "hosts": 1}], "inter_host": NETWORK}
    files = {"c/cluster/mine.yaml": yaml.safe_dump(top), "m.yaml": contents}
    return bad(*ARGUMENTS, files=files, says=says, name=f"a group's {name}")


def changed(path: str, value: object, says: str) -> Bad:
    return holding(changed_at(CPU8, path.split("."), value), says, f"{path}={value}")


def groups(entries: object, says: str, **rest) -> Bad:
    top = {"name": "mine", "groups": entries, "inter_host": NETWORK}
    return holding(top, says, f"groups={entries}", **rest)


THERE = "correct it there"
TAG = "!!python/object/apply:os.system ['touch pwned']"
NO_YAML = [
    holding(TAG, "could not determine a constructor ... c/cluster/mine.yaml ... correct it", "tag"),
]
NO_YAML += [
    holding(contents, f"c/cluster/mine.yaml ... {says}", name)
    for name, contents, says in (
        ("cycle", "a: &a [*a]", "has an alias inside what it stands for: write it out"),
        ("aliases", BOMB, "has 4.9e+08 values ... use fewer aliases"),
        ("utf-16", "name: a".encode("utf-16"), "is no YAML ... " + THERE),
        ("binary", bytes(range(256)), "is no YAML ... " + THERE),
        ("deep", "[" * 5000, "is no YAML ... " + THERE),
        ("cut short", "device: {memory_gib: ", "is no YAML ... " + THERE),
        ("null character", b"name: \0", "is no YAML ... " + THERE),
        ("2 MB", "x: " + "y" * 2_000_000, "has more than 1048576 bytes: choose a config"),
    )
]

NO_YAML_OF_GROUP = [
    referred(contents, f"m.yaml ... {says}", name)
    for name, contents, says in (
        ("tag", TAG, f"is no YAML ... {THERE}"),
        ("cycle", "&a {name: *a}", "is missing: add it"),
        ("twice", "name: a\nname: b", f"a key stands there twice ... {THERE}"),
        ("deep", "[" * 5000, f"is no YAML ... {THERE}"),
        ("5000 digits", "hosts: " + "9" * 5000, f"is no YAML ... {THERE}"),
        ("list", "- 1", "a list of 1 is no object: write key-value pairs"),
        ("nothing", "", "null is no object: write key-value pairs"),
        ("key", "1: 2", "has a key that is no text: write a name"),
        ("2 MB", "x: " + "y" * 2_000_000, "has more than 1048576 bytes ... give the path"),
    )
]

FIGURES = [
    changed("hosts", 0, "cluster.hosts=0 is less than 1: give cluster.hosts=1 or more"),
    changed("hosts", True, "cluster.hosts ... give a whole number or null"),
    changed("hosts", "many", "cluster.hosts ... give a whole number or null"),
    changed("hosts", None, "cluster.hosts=null is missing: add it"),
    changed("devices_per_host", 10**9, "devices_per_host=1000000000 is not in 1..1024: correct it"),
    changed("name", "a\u202eb", "cluster.name='a\\u202eb' cannot be printed: keep to letters"),
    changed("zzz", 1, "there is no key cluster.zzz"),
    changed("_target_", "os.system", "there is no key cluster._target_"),
    changed("device", None, "cluster.device=null is missing: add it"),
    changed("device", [], "cluster/mine.yaml: Cannot merge ... correct it there"),
    changed("inter_host", [], "mine.yaml: ... a subclass of InterHostConfig ... correct it there"),
    changed("sources", {"a": [1]}, "cluster.sources.a=a list of 1 is no text: write one in quotes"),
    changed("nominal", "perhaps", "cluster.nominal ... give true or false"),
    changed(
        "device.memory_gib", float("nan"), "device.memory_gib=nan is not a finite number: give"
    ),
    changed(
        "device.memory_gib", 0, "device.memory_gib=0.0 is not above 0: write a positive number"
    ),
    changed(
        "device.memory_gib", 10**400, "int too large to convert ... cluster=mine ... correct it"
    ),
    changed("device.peak_tflops", {}, "cluster.device.peak_tflops.fp32=null is missing: add it"),
    changed("device.peak_tflops", {"fp32": 1, "fp8": 1}, "fp8=1.0 is unknown: correct or drop it"),
    changed("device.matmul_efficiency", {"fp32": 0.5}, "efficiency.fp64=null is missing: add it"),
    changed("device.matmul_curve", {"fp32": []}, "matmul_curve.fp32 ... list at least one as"),
    changed("device.matmul_curve", {"fp32": [[2, 0.5], [1, 0.6]]}, "does not ascend: order its"),
    changed("device.matmul_curve", {"fp32": [[1]]}, "fp32[0]=a list of 1 is no pair: write [size"),
    changed("device.element_ns", {"add": 1}, "element_ns.add=1.0 is unknown: correct or drop it"),
    changed(
        "device.concurrency", [[2, 1], [1, 2]], "concurrency=a list of 2 does not ascend: order"
    ),
    changed("device.op_overhead_us", -1, "op_overhead_us=-1.0 is not in 0..1e+30: correct it"),
    changed("intra_host.latency_us", -1, "latency_us=-1.0 is not in 0..1e+30: correct it"),
]

GROUPS = [
    groups([], "cluster.groups=a list of 0 has no hosts: list at least one kind"),
    groups("8xp3", "cluster.groups ... give a list"),
    groups([{}], "cluster.groups[0].hosts=null is missing: add it"),
    groups([{"cluster": "c/cluster/mine.yaml"}], "mine.yaml: groups=a list of 1 is unknown: correct"),
    groups([{"cluster": "mine", "hosts": 1}], "cluster.groups[0].cluster=mine is unknown ... or give"),
    groups([{"cluster": "v100-a100", "hosts": 1}], "groups=a list of 2 is unknown: correct or drop"),
    groups([{"cluster": "8xp33", "hosts": 1}], "cluster.groups[0].cluster=8xp33 ... take one of 1xp3"),
    groups([{"cluster": "./nope.yaml", "hosts": 1}], "(cluster.groups[0].cluster=nope.yaml): correct"),
    groups([{"cluster": "/dev/zero", "hosts": 1}], "(cluster.groups[0].cluster=/dev/zero): correct"),
    groups([{"cluster": "a\0b.yaml", "hosts": 1}], "cluster.groups[0].cluster='a\\x00b.yaml' ... keep"),
    groups([{"cluster": f"{'x' * 5000}/a", "hosts": 1}], "File name too long ... correct the path"),
    groups([{"cluster": "8xp3", "hosts": 0}], "cluster.groups[0].hosts=0 ... correct it"),
    groups([{"cluster": "8xp3", "hosts": 1, "_target_": "os.system"}], "_target_='os.system' is unk"),
    groups([{"cluster": "8xp3"}, {"cluster": "cpu8"}], "device.accelerator ... take accelerators in"),
    groups([{"cluster": "${cluster.groups}", "hosts": 1}], "cannot be resolved ... write the value"),
    groups(
        [{"cluster": "./f.yaml", "hosts": 1}], "It is a pipe ... (cluster.groups[0].cluster=f.yaml)",
        make=lambda folder: os.mkfifo(folder / "f.yaml"),
    ),
]  # fmt: skip


def in_the_way(make) -> dict:
    def lay(folder: pathlib.Path) -> None:
        place = folder / "c" / "cluster"
        place.mkdir(parents=True)
        make(place / "mine.yaml")

    return {"make": lay}


FILES = [
    bad(*ARGUMENTS, **in_the_way(os.mkfifo), says="It is a pipe ... correct the path", name="fifo"),
    bad(
        *ARGUMENTS, **in_the_way(pathlib.Path.mkdir), says="Is a directory: correct", name="folder"
    ),
    bad(*ARGUMENTS, **in_the_way(lambda p: p.symlink_to("/dev/zero")), says="a device ... correct"),
    bad(
        *ARGUMENTS, **in_the_way(lambda p: p.symlink_to("no")), says="cluster=mine is unknown: take"
    ),
]


def primary(contents: str, says: str, name: str) -> Bad:
    return bad(
        "--config-dir=c", "--config-name=my", files={"c/my.yaml": contents}, says=says, name=name
    )


HEAD = "defaults: [config, _self_]\n"
CONFIGS = [
    primary("defaults: [my]\n", "a config includes itself ... look at its defaults list", "itself"),
    primary(
        HEAD + "seed: ${seed}\n", "seed cannot be resolved ... or write the value", "seed: seed"
    ),
    primary(
        HEAD + 'data: {path: "a\\0b"}\n', "data.path has a null character ... take it out", "nul"
    ),
    primary(HEAD + "train: {steps: [1]}\n", "my.yaml: train.steps ... give a whole number", "type"),
    primary(HEAD + "zzz: 1\n", "zzz ... see all keys with --cfg job", "an unknown key"),
    primary(
        "seed: 1\n", "does not start from the launcher's schema: let its defaults", "no schema"
    ),
    primary("- 1\n", "primary config 'my' must be a DictConfig ... correct it there", "a list"),
]

CASES = [*NO_YAML, *NO_YAML_OF_GROUP, *FIGURES, *GROUPS, *FILES, *CONFIGS]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bad_cluster_or_config_file_is_refused(case, refuse):
    refuse(case)
