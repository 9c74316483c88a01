"""Predictions beside measurements: two rows made by hand, and Megatron-LM's strategies in their plans."""

from dataclasses import replace

import pytest

from launcher.autopar.predictions.predict import stage_durations
from launcher.autopar.realized.realize import realize
from launcher.autopar.sharding.spec import REPLICATED
from launcher.bench.__main__ import main
from launcher.bench.fidelity import price, rank_correlation
from launcher.bench.measured import SOURCES, Measurement
from launcher.bench.megatron import megatron_plan

SC21, MANY_NODES, ONE_NODE = SOURCES
HEAD = (
    "# GPUs,global batch,micro batch,hidden size,attention heads,# layers,sequence length,"
    "tensor parallelism,data parallelism,pipeline parallelism,iteration time (ms)"
)
SMALL = Measurement(
    hidden=128, layers=4, heads=4, length=64, tp=2, pp=2, dp=2, microbatch=2, virtual=1,
    global_batch=16, step_s=1.0,
)  # fmt: skip
DATA = replace(SMALL, tp=1, pp=1, dp=8)


def line(row: Measurement, step_s: float) -> str:
    return (
        f"{row.num_devices},{row.global_batch},{row.microbatch},{row.hidden},{row.heads},{row.layers},"
        f"{row.length},{row.tp},{row.dp},{row.pp},{1000 * step_s}"
    )


def measured(folder, factor: float, file: str = MANY_NODES.file) -> str:
    """A file of two rows that took `factor` times as long as they are predicted to."""
    lines = [line(row, factor * price(row, MANY_NODES).step_s) for row in (SMALL, DATA)]
    (folder / file).write_text("\n".join([HEAD, *lines]))
    return f"data={folder}"


def test_rows_within_the_bar_are_printed_with_their_errors(tmp_path, capsys):
    assert main(["fidelity", measured(tmp_path, 1.05)]) == 0
    shown = capsys.readouterr().out
    assert "h=128 L=4 batch=16 tp=2 pp=2 dp=2 microbatch=2" in shown
    assert shown.count("-4.8 %") == 2
    assert "mean absolute error of 2: 4.76 % (at most 10 %: kept)" in shown


def test_a_missed_bar_is_status_1(tmp_path, capsys):
    assert main(["fidelity", measured(tmp_path, 1.2)]) == 1
    assert "mean absolute error of 2: 16.67 % (at most 10 %: missed)" in capsys.readouterr().out


def test_plans_of_a_task_are_ranked(tmp_path, capsys):
    """Five plans that took the longer the faster they are predicted to be."""
    plans = [
        replace(SMALL, tp=tp, pp=pp, dp=8 // (tp * pp), microbatch=microbatch)
        for tp, pp, microbatch in ((1, 1, 1), (2, 2, 1), (2, 1, 2), (8, 1, 1), (4, 2, 2))
    ]
    times = {plan: price(plan, MANY_NODES).step_s for plan in plans}
    file = tmp_path / MANY_NODES.file
    file.write_text("\n".join([HEAD, *(line(plan, step_s) for plan, step_s in times.items())]))
    assert main(["fidelity", f"data={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "5 plans, rank correlation 1.000 (at least 0.85: kept)" in shown
    assert "is 0.0 % from the fastest (at most 3 %: kept)" in shown
    slowest = max(times.values())
    turned = [line(plan, slowest**2 / step_s) for plan, step_s in times.items()]
    file.write_text("\n".join([HEAD, *turned]))
    assert main(["fidelity", f"data={tmp_path}"]) == 1
    shown = capsys.readouterr().out
    assert "rank correlation -1.000 (at least 0.85: missed)" in shown
    assert "from the fastest (at most 3 %: missed)" in shown


def test_ranks_are_compared_and_equal_values_share_one():
    assert rank_correlation([1.0, 2.0, 4.0], [10.0, 11.0, 500.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 4.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert rank_correlation([1.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == pytest.approx(0.75**0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=x", "y=1"], "fidelity has no key 'y': it has data, files"),
        ([], "data is not set: give data=DIR"),
        (["data=x", "files=y"], "files='y': choose from megatron_sc21_a100.csv"),
        (["data=nowhere"], "data=nowhere has no rows in any of megatron_sc21_a100.csv"),
    ],
)
def test_settings_that_cannot_be(arguments, message, capsys):
    assert main(["fidelity", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["# GPUs\n8", HEAD + "\n" + line(SMALL, 1.0).replace("128", "x")])
def test_a_row_that_is_no_measurement_is_named_by_its_line(text, tmp_path, capsys):
    (tmp_path / MANY_NODES.file).write_text(text)
    assert main(["fidelity", f"data={tmp_path}"]) == 2
    assert "line 2 of" in (error := capsys.readouterr().err)
    assert "lacks a column or a number" in error


def realized(row: Measurement, source=MANY_NODES):
    cluster = source.cluster(row.num_devices)
    plan, model, planner = megatron_plan(row, cluster)
    return realize(plan, model, cluster, planner), cluster


def test_products_are_column_and_row_parallel():
    found, _ = realized(replace(SMALL, pp=1))
    params = found.stages[0].layout.params
    column, row, whole = (REPLICATED, 1), (REPLICATED, 0), (REPLICATED, REPLICATED)
    block = "blocks/0"
    assert params[f"{block}/attention/qkv/kernel"] == params[f"{block}/mlp/up/kernel"] == column
    assert params[f"{block}/attention/out/kernel"] == params[f"{block}/mlp/down/kernel"] == row
    assert params[f"{block}/attention_norm/scale"] == params[f"{block}/mlp_norm/scale"] == whole


def test_a_block_reduces_twice_on_its_way_forward():
    """In a stage of blocks alone, on devices that compute in no time: activations of 2 bytes."""
    row = replace(SMALL, hidden=4096, layers=8, pp=4, dp=1)
    found, cluster = realized(row)
    fast = replace(
        cluster.device, peak_flops_per_s={"fp32": 1e30, "fp16": 1e30}, memory_bytes_per_s=1e30,
        matmul_curve={}, op_overhead_s=0.0,
    )  # fmt: skip
    cluster = replace(cluster, device=fast)
    plan, model, planner = megatron_plan(row, cluster)
    durations = stage_durations(realize(plan, model, cluster, planner), cluster)
    reduced_s = found.stages[1].settings.mesh.all_reduce(1, 2 * 2 * 64 * 4096)
    assert durations.forward_s[1] == pytest.approx(2 * 2 * reduced_s, rel=1e-6)
    # Backward two more per block, and the two of the forward pass again.
    assert durations.backward_s[1] == pytest.approx(2 * 4 * reduced_s, rel=1e-6)


def test_stages_lie_side_by_side_and_virtual_ones_go_round():
    plan, _, _ = megatron_plan(SMALL, MANY_NODES.cluster(8))
    assert [stage.devices for stage in plan.stages] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    ends = [stage.layers[1] for stage in plan.stages]
    assert ends[0] / ends[1] == pytest.approx(1 / 2, abs=0.2)
    round_trip = replace(SMALL, dp=8, virtual=2, microbatch=1)
    plan, _, _ = megatron_plan(round_trip, MANY_NODES.cluster(32))
    assert [stage.hosts for stage in plan.stages] == [(0, 1), (2, 3)] * 2
    assert plan.schedule == "interleaved"


def test_a_source_has_the_network_of_its_cluster():
    networks = [source.cluster(64).inter_host.bytes_per_s for source in SOURCES]
    assert networks == [200e9, 100e9, 100e9]
    assert (ONE_NODE.cluster(4).num_hosts, ONE_NODE.cluster(4).devices_per_host) == (1, 4)
    assert SC21.cluster(64).num_hosts == 8


def test_an_artefact_is_named_with_its_reason():
    odd = replace(SMALL, hidden=3072, layers=30, tp=8, pp=1, dp=8, microbatch=64)
    assert "twice as slow as with microbatches of 32" in odd.artefact
    assert SMALL.artefact is None
