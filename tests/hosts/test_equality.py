"""A plan over several host processes trains as in one: losses, parameters, statistics, evaluations."""

import host_cases
import pytest


def check(case) -> None:
    """One process and hosts: the same rows, and the same checkpoints at every step that has one."""
    one = case.in_one_process("one")
    several = case.over_hosts("several", one)
    host_cases.compare_rows(one, several)
    for step in (2, 4):
        host_cases.compare_checkpoints(one, several, step)


def stage(layers, hosts, data, tensor, devices=(0, 1), **fields) -> dict:
    mesh = {"data": data, "tensor": tensor}
    return {"layers": layers, "hosts": hosts, "devices": devices, "mesh": mesh} | fields


def test_stages_inside_hosts_and_checkpoints_in_both_directions(case):
    made = case("parallel=manual", "parallel.pp=2", "parallel.tp=1", "parallel.num_microbatches=4")
    one = made.in_one_process("one")
    several = made.over_hosts("several", one)
    host_cases.compare_rows(one, several)
    host_cases.compare_checkpoints(one, several, 2)
    host_cases.compare_checkpoints(one, several, 4)
    made.copy_checkpoint(several, 2, "one resumed")
    host_cases.compare_checkpoints(one, made.in_one_process("one resumed"), 4)
    made.copy_checkpoint(one, 2, "several resumed")
    resumed = made.over_hosts("several resumed", one)
    host_cases.compare_rows(one, resumed, after=2)
    host_cases.compare_checkpoints(one, resumed, 4)


def test_tensor_and_data_parallel_over_processes(from_plan):
    """Two worlds: a stage whose tensor axis spans two hosts, and one whose data axis does."""
    stages = stage([0, 1], [0, 1], 1, 4), stage([1, 2], [2, 3], 4, 1)
    check(from_plan(stages, hosts=4, num_microbatches=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "virtual"), [("gpipe", None), ("zb_h1", None), ("interleaved", 2)]
)
def test_schedules(case, schedule, virtual):
    more = [] if virtual is None else [f"parallel.virtual_stages={virtual}", "model.layers=4"]
    check(
        case(
            "parallel=manual", "parallel.pp=2", "parallel.tp=2", "parallel.num_microbatches=4",
            f"parallel.schedule={schedule}", *more,
        )
    )  # fmt: skip


@pytest.mark.slow
def test_stages_of_different_shapes(from_plan):
    """Two stages on the first host, one of them of one device, and one over two hosts."""
    stages = (
        stage([0, 1], [0], 1, 1, devices=(0,)),
        stage([1, 2], [0], 1, 1, devices=(1,)),
        stage([2, 3], [1, 2], 2, 2),
    )
    check(from_plan(stages, hosts=3))


@pytest.mark.slow
def test_two_stages_that_share_all_hosts(from_plan):
    """One world in which stages lie side by side: values go between and inside processes."""
    stages = stage([0, 1], [0, 1], 2, 1, devices=(0,)), stage([1, 2], [0, 1], 1, 2, devices=(1,))
    check(from_plan(stages))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_optimizer_state_in_shards_over_hosts(case, zero):
    """Of arrays that lie on several hosts each writes pieces."""
    check(case("parallel=zero", f"parallel.zero={zero}", "parallel.num_microbatches=2"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        ("model=moe", "data=synthetic"),
        ("model=wrn", "model.base_channels=4", "data=synthetic"),
    ],
)
def test_other_families(case, model):
    check(case(*model, "parallel=manual", "parallel.pp=2", "parallel.num_microbatches=2"))
