"""A plan over several host processes trains as in one: losses, parameters, statistics, evaluations."""

import host_cases

TWO_STAGES = (
    {"layers": [0, 2], "hosts": [0], "devices": [0, 1], "mesh": {"data": 2, "tensor": 1}},
    {"layers": [2, None], "hosts": [1], "devices": [0, 1], "mesh": {"data": 1, "tensor": 2}},
)


def check(case, plan, steps: int = 4) -> None:
    """One process and hosts: the same rows, and the same checkpoints at every step that has one."""
    one = case.in_one_process("one")
    several = case.over_hosts("several", one)
    host_cases.compare_rows(one, several)
    for step in (2, 4):
        host_cases.compare_checkpoints(one, several, step)


def test_a_stage_on_each_host(case):
    made = case("parallel=manual", "parallel.pp=2", "parallel.tp=1", "parallel.num_microbatches=4")
    one = made.in_one_process("one")
    several = made.over_hosts("several", one)
    host_cases.compare_rows(one, several)
    host_cases.compare_checkpoints(one, several, 2)
    host_cases.compare_checkpoints(one, several, 4)
    # And in both directions from the checkpoint of step 2.
    made.copy_checkpoint(several, 2, "one resumed")
    host_cases.compare_checkpoints(one, made.in_one_process("one resumed"), 4)
    made.copy_checkpoint(one, 2, "several resumed")
    resumed = made.over_hosts("several resumed", one)
    host_cases.compare_rows(one, resumed, after=2)
    host_cases.compare_checkpoints(one, resumed, 4)
