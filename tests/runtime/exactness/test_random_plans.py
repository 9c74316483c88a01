"""Plans that nobody thought of: drawn from a seed, right by construction, and trained for three steps."""

import collections
import itertools
import math
import random

import pytest

from launcher.autopar.plans.plan_checks import check_without_model
from launcher.autopar.plans.plan_file import from_json

FAMILIES = ("custom", "wrn", "gpt", "moe")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb_h1")
MOST_LAYERS, MOST_SUBMESHES, STEPS = 6, 4, 3
PLAIN = (0, 9, 12)  # of models that compile fast: four stages, 2 x 3 devices, 1 x 3 devices
SLOW = [seed for seed in range(103) if seed not in PLAIN]

Submesh = tuple[list[int], list[int]]
"""Hosts, and devices in each of them."""


def draw_plan(rng: random.Random, batch: int) -> dict:
    """Draw a cluster, stages on parts of it, and a schedule that suits their number."""
    cluster = rng.choice([1, 2]), rng.choice([2, 4, 4])
    submeshes = draw_submeshes(rng, *cluster)
    schedule = rng.choice(SCHEDULES)
    virtual = rng.choice([2, 3]) if schedule == "interleaved" else 1
    submeshes = submeshes[: MOST_LAYERS // virtual]
    if virtual > 1 and len(submeshes) == 3:  # no number of microbatches is a multiple
        submeshes.pop()
    counts = [count for count in (1, 2, 4, 8, 16) if can_be_cut(count, batch, submeshes, virtual)]
    count = rng.choice(counts)
    stages = len(submeshes) * virtual
    layers = draw_parts(rng, rng.randint(stages, MOST_LAYERS), stages)
    given = [
        draw_stage(rng, number, submeshes[index % len(submeshes)], batch // count)
        for index, number in enumerate(layers)
    ]
    found = {
        "cluster": cluster, "microbatches": count, "schedule": schedule, "stages": given,
    }  # fmt: skip
    return found | ({"virtual_stages": virtual} if virtual > 1 else {})


def draw_submeshes(rng: random.Random, hosts: int, devices: int) -> list[Submesh]:
    """Runs of each host's devices, or of all hosts' together; some in another order, some left idle."""
    if rng.random() < 0.4:
        columns = draw_runs(rng, devices)
        found = [(list(range(hosts)), run) for run in columns]
    else:
        found = [([host], run) for host in range(hosts) for run in draw_runs(rng, devices)]
    rng.shuffle(found)
    return found[: rng.choice([1, 2, 2, 3, MOST_SUBMESHES])]


def draw_runs(rng: random.Random, devices: int) -> list[list[int]]:
    parts = draw_parts(rng, devices, rng.choice([1, 2, 2, devices]))
    ends = itertools.accumulate(parts)
    return [list(range(end - part, end)) for part, end in zip(parts, ends, strict=True)]


def draw_parts(rng: random.Random, total: int, number: int) -> list[int]:
    """Cut a total into so many parts, of at least 1 each."""
    cuts = [0, *sorted(rng.sample(range(1, total), number - 1)), total]
    return [end - begin for begin, end in itertools.pairwise(cuts)]


def can_be_cut(count: int, batch: int, submeshes: list[Submesh], virtual: int) -> bool:
    """Each host of a submesh has part of a microbatch, and interleaving goes in groups."""
    shares = all(batch // count % len(hosts) == 0 for hosts, _ in submeshes)
    return shares and (virtual == 1 or count % len(submeshes) == 0)


def draw_stage(rng: random.Random, layers: int, submesh: Submesh, samples: int) -> dict:
    hosts, devices = submesh
    degrees = [
        len(hosts) * part
        for part in range(1, len(devices) + 1)
        if len(devices) % part == 0 and samples % (len(hosts) * part) == 0
    ]
    return {
        "layers": layers, "hosts": hosts, "devices": devices, "data": rng.choice(degrees),
        "recompute": rng.choice(["none", "layer", "full"]), "zero": rng.randrange(4),
    }  # fmt: skip


def drawn(seed: int, batch: int) -> tuple[str, dict]:
    """Family and plan; one model after the other."""
    given, rng = draw_plan(random.Random(seed), batch), random.Random(f"overlap {seed}")
    for stage in given["stages"]:
        stage["overlap"] = rng.random() < 0.4
        stage["scatter"] = stage["zero"] > 1 and rng.random() < 0.5
    return FAMILIES[seed % len(FAMILIES)], given


def check(exact, seed: int, note) -> None:
    family, given = drawn(seed, exact.BATCH)
    executor = exact.executor_for(exact.model_of(family), given)
    _, gradients = exact.first_gradients(executor, 1e-9)
    largest = exact.train(executor, STEPS, 1e-9) | {"gradients": gradients}
    shape = f"random {seed}: {given['schedule']}, {len(given['stages'])} stages"
    note("largest errors", [family, shape, "fp64", largest])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("seed", PLAIN)
def test_a_random_plan_trains_as_one_device_does(exact, seed, record_property):
    check(exact, seed, record_property)


@pytest.mark.slow
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("seed", SLOW)
def test_a_hundred_more(exact, seed, record_property):
    check(exact, seed, record_property)


def test_random_plans_are_plans_of_all_kinds(exact):
    seen = collections.defaultdict(collections.Counter)
    for seed in (*PLAIN, *SLOW):
        family, given = drawn(seed, exact.BATCH)
        machine = exact.cluster(*given.pop("cluster"))
        model = exact.model_of(family, "fp32")
        plan = from_json(exact.plan_file(model, machine, **given))
        check_without_model(plan, num_layers=None, cluster=machine)
        seen["schedule"][plan.schedule] += 1
        seen["microbatches"][plan.num_microbatches] += 1
        seen["stages"][len(plan.stages)] += 1
        for stage in plan.stages:
            seen["zero"][stage.zero] += 1
            seen["recompute"][stage.recompute] += 1
            seen["overlap"][stage.overlap, plan.schedule] += 1
            seen["scatter"][stage.scatter, stage.zero] += 1
            seen["mesh"][stage.mesh] += 1
            assert plan.microbatch_size % dict(stage.mesh)["data"] == 0
            assert math.prod(length for _, length in stage.mesh) == stage.num_devices
    assert set(seen["schedule"]) == set(SCHEDULES)
    assert set(seen["microbatches"]) == {1, 2, 4, 8, 16}
    assert set(seen["stages"]) == {1, 2, 3, 4, 6}
    assert set(seen["zero"]) == {0, 1, 2, 3}
    assert set(seen["scatter"]) == {
        (s, z) for s in (False, True) for z in range(4) if z > 1 or not s
    }
    assert set(seen["overlap"]) == set(itertools.product([False, True], SCHEDULES))
    assert set(seen["recompute"]) == {"none", "layer", "full"}
    assert len(seen["mesh"]) > 8
    assert min(seen["schedule"].values()) > 10
    assert any(stage["hosts"] == [0, 1] for s in SLOW for stage in drawn(s, 16)[1]["stages"])
