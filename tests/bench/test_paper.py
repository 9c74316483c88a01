"""The paper's experiments: what is planned for, how operations are counted, the page and its verdicts."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from launcher.bench.__main__ import main
from launcher.bench.paper_cases import find_cases
from launcher.bench.paper_figures import END_TO_END, INTRA_OP, NOT_SHARED, OUT_OF_MEMORY
from launcher.bench.paper_methods import methods_of, points_of
from launcher.bench.paper_page import behind, page, pictures, tables, verdicts
from launcher.bench.paper_rows import Row, read_rows

ONE = ["paper", "experiments=intra-op", "families=wrn", "gpus=1", "methods=data"]


def row(method, step_s, num_devices=32, family="wrn", experiment=END_TO_END):
    return Row(
        experiment=experiment, family=family, num_devices=num_devices, method=method, size="6.8b",
        step_s=step_s, tflops=OUT_OF_MEMORY if step_s is None else 100 / step_s, plan="1f1b", tried=1,
        wall_s=2.0,
    )  # fmt: skip


def table_of(*rows):
    return {row.key: row for row in rows}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a run with one row."""
    folder = tmp_path_factory.mktemp("docs")
    assert main([*ONE, f"out={folder}"]) == 0
    return folder


def test_a_row_is_planned_and_written_beside_what_was_measured(written):
    (planned,) = read_rows(written / "paper.json").values()
    assert planned.key == (INTRA_OP, "wrn", 1, "data")
    assert planned.plan == "1f1b, 1 microbatch: 1 x 1"
    assert planned.tflops == pytest.approx(8.28, rel=0.1)  # the cluster's figures are fitted to it
    text = (written / "paper.md").read_text()
    assert f"| data | {planned.tflops:.2f} |" in text
    assert "| measured: Alpa, data | 8.28 |" in text
    assert "0 of 0 baselines are faster" in text


def test_a_run_goes_on_with_the_rows_that_are_there(written, tmp_path, capsys):
    (planned,) = read_rows(written / "paper.json").values()
    (tmp_path / "paper.json").write_text(
        (written / "paper.json").read_text().replace("1f1b", "kept")
    )
    assert main([*ONE, "resume=true", f"out={tmp_path}"]) == 0
    assert "data" in capsys.readouterr().out
    (found,) = read_rows(tmp_path / "paper.json").values()
    assert found == replace(planned, plan=planned.plan.replace("1f1b", "kept"))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("family=gpt", "paper has no key 'family': it has experiments, families, gpus, methods"),
        ("families=bert", "families='bert': choose from gpt, moe, wrn"),
        ("gpus=3", "gpus='3': choose from 1, 2, 4, 8, 16, 32, 64"),
        ("methods=heuristic", "methods='heuristic': choose from auto, manual"),
        ("experiments=all", "experiments='all': choose from end-to-end, intra-op"),
        ("resume=yes", "resume='yes': choose from true, false"),
    ],
)
def test_a_wrong_setting_is_status_2_in_one_line(setting, says, tmp_path, capsys):
    assert main(["paper", setting, f"out={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith(says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [{"method": "auto"}]}'])
def test_a_file_of_rows_that_is_none_is_status_2(text, tmp_path, capsys):
    (tmp_path / "paper.json").write_text(text)
    assert main([*ONE, f"out={tmp_path}"]) == 2
    assert "has a paper.json that is none of ours" in capsys.readouterr().err


def test_operations_are_counted_as_the_paper_does():
    """Against pairs of latency and rate that Alpa's authors printed."""
    printed = {1: (71.1, 46.20), 4: (49.9, 58.36), 16: (74.4, 48.42)}
    gpt = {case.num_devices: case for case in find_cases(END_TO_END, "gpt")}
    for number, (step_s, tflops) in printed.items():
        assert gpt[number].paper_flops(0.0) == pytest.approx(
            step_s * tflops * 1e12 * number, rel=2e-3
        )
    quick = replace(gpt[8], global_batch=32)
    assert quick.paper_flops(0.0) == pytest.approx(2.464 * 37.01e12 * 8, rel=2e-3)
    wrn = find_cases(END_TO_END, "wrn")[0]
    assert wrn.paper_flops(1.5e15) == 1.5e15


def test_moe_is_counted_by_its_products():
    """Without recomputation and but for the routing's small terms, the formula is what its ops add up to."""
    case = find_cases(INTRA_OP, "moe")[0]
    tokens, hidden, layers, vocab = 8 * 1024, 1024, 8, 51200
    attention = (8 * hidden + 4 * 1024) * tokens * hidden
    experts = 2 * 32 * tokens * hidden**2 + 8 * tokens * 1024 * hidden
    forward = layers / 2 * (2 * attention + 32 * tokens * hidden**2 + experts)
    logits = 6 * tokens * hidden * vocab
    assert case.paper_flops(0.0) == pytest.approx(4 * forward + logits, rel=0.02)


def test_cases_have_the_devices_of_the_papers_cluster():
    for experiment, numbers in ((END_TO_END, (1, 2, 4, 8, 16, 32, 64)), (INTRA_OP, (1, 2, 4, 8))):
        cases = find_cases(experiment, "moe")
        clusters = [case.cluster() for case in cases]
        assert tuple(case.num_devices for case in cases) == numbers
        assert tuple(cluster.num_devices for cluster in clusters) == numbers
        assert all(
            cluster.num_hosts == max(1, n // 8)
            for cluster, n in zip(clusters, numbers, strict=True)
        )


def test_the_manual_grid_has_every_degree_that_can_hold_the_state():
    case = next(case for case in find_cases(END_TO_END, "gpt") if case.num_devices == 8)
    groups = points_of(case, "manual")
    degrees = {(group[0]["dp"], group[0]["tp"], group[0]["pp"]) for group in groups}
    # 2.65 billion parameters take 12 bytes each at least: on 2 devices they do not fit, on 4 they do.
    every = {(8 // (tp * pp), tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4, 8) if tp * pp <= 8}
    assert degrees == {degree for degree in every if degree[0] <= 2}
    for group in groups:
        sizes = [1024 // point["num_microbatches"] for point in group]
        assert sizes == sorted(sizes)
        assert set(sizes) == {2**k for k in range(11) if 2**k % group[0]["dp"] == 0}
    recompute = [group[0]["recompute"] for group in groups]
    assert recompute.count("none") == recompute.count("layer") == len(degrees)


def test_pipeline_and_data_alone_are_a_part_of_the_grid():
    case = find_cases(END_TO_END, "wrn")[2]
    manual = [point for group in points_of(case, "manual") for point in group]
    alone = [point for group in points_of(case, "pp-dp") for point in group]
    assert alone == [p for p in manual if p["tp"] == 1 and p["recompute"] == "none"]
    assert "pp-dp" not in methods_of(END_TO_END, "gpt")


def test_inter_op_alone_gives_every_stage_a_device_and_recomputes_as_the_paper_did():
    gpt, wrn = (find_cases(END_TO_END, family)[4] for family in ("gpt", "wrn"))
    stages = {"mode": "auto", "dp": 1, "tp": 1, "pp": 16}
    assert points_of(gpt, "inter-op") == [[stages]]
    assert points_of(wrn, "inter-op") == [[{**stages, "recompute": "none"}]]


def test_the_small_experiment_is_one_microbatch_and_recomputes_as_the_paper_did():
    for family, recompute in (("gpt", "layer"), ("wrn", "none")):
        case = find_cases(INTRA_OP, family)[3]
        for method in methods_of(INTRA_OP, family):
            ((point,),) = points_of(case, method)
            assert (point["num_microbatches"], point["recompute"]) == (1, recompute)


def test_a_baseline_that_is_ahead_is_said_and_is_status_1(tmp_path, capsys):
    rows = table_of(row("auto", 10.0), row("manual", 9.0), row("data", None), row("zero-2", 10.005))
    assert behind(rows) == ["Wide-ResNet, end-to-end, 32 GPUs: auto takes 10 s, manual 9 s a step"]
    assert verdicts(rows)[0] == "1 of 2 baselines are faster than the planner's own plan"
    equal = table_of(row("auto", 10.0), row("manual", 10.005))
    assert behind(equal) == []
    assert run_on(tmp_path, rows) == 1
    assert run_on(tmp_path, equal) == 0
    assert "auto / best other" in capsys.readouterr().out


def test_no_plan_beside_a_baseline_that_has_one_is_behind():
    rows = table_of(row("auto", None), row("manual", 9.0))
    assert behind(rows) == [
        "Wide-ResNet, end-to-end, 32 GPUs: auto takes no plan, manual 9 s a step"
    ]


def test_what_went_out_of_memory_in_the_paper_may_not_fit_here(tmp_path):
    fits = table_of(row("auto", 10.0), row("pp-dp", 20.0), row("inter-op", None))
    said = verdicts(fits)
    assert "of 2 runs that went out of memory in the paper, 1 have no plan here" in said
    assert "fits here, and not in the paper: Wide-ResNet, end-to-end, 32 GPUs: pp-dp" in said
    assert run_on(tmp_path, fits) == 1
    assert run_on(tmp_path, table_of(row("auto", 10.0), row("pp-dp", None))) == 0


def test_what_fits_in_the_paper_alone_is_said():
    rows = table_of(row("auto", 10.0), row("intra-op", None))
    assert (
        "no plan here, and measured in the paper: Wide-ResNet, end-to-end, 32 GPUs: intra-op"
        in verdicts(rows)
    )


def run_on(folder, rows) -> int:
    """The command on rows that are there, with nothing to plan."""
    fields = [{name: getattr(r, name) for name in Row.__slots__} for r in rows.values()]
    (folder / "paper.json").write_text(json.dumps({"rows": fields}))
    wanted = ["gpus=32", "families=wrn", "methods=auto", "experiments=end-to-end"]
    return main(["paper", *wanted, "resume=true", f"out={folder}"])


def test_a_batch_that_cannot_be_shared_out_is_no_lack_of_memory(tmp_path, capsys):
    """The paper's Wide-ResNet on 64 GPUs has 1,520 samples a step."""
    arguments = ["experiments=end-to-end", "families=wrn", "gpus=64", "methods=data"]
    assert main(["paper", *arguments, f"out={tmp_path}"]) == 0
    (found,) = read_rows(tmp_path / "paper.json").values()
    assert found.step_s is None
    assert found.tflops == NOT_SHARED
    assert "1520 samples" in found.plan
    assert "| data | - |" in (tmp_path / "paper.md").read_text()


def test_tables_have_predicted_over_measured():
    rows = table_of(
        row("auto", 20.0), row("intra-op", 50.0), row("pp-dp", None), row("auto", 16.0, 16)
    )
    (table,) = tables(rows)
    assert table.head == ("GPUs", "16", "32")
    assert table.lines == (
        ("auto", "6.25", "5.00"),
        ("  measured: Alpa", "6.76", "6.60"),
        ("pp-dp", "", "OOM"),
        ("  measured: PP-DP", "0.37", "OOM"),
        ("intra-op", "", "2.00"),
        ("  measured: Alpa, intra-op", "4.72", "1.96*"),
        ("auto / best other", "", "2.500"),
    )
    assert "GPUs" in table.text()
    text = page(rows, "Written today.")
    assert "Written today." in text
    assert "| 32 | 6.8b | auto | 1f1b | 20 s | 2 s, 1 tried |" in text


def test_moe_has_the_papers_ratio_to_deepspeed():
    rows = table_of(row("auto", 10.0, 16, "moe"), row("zero-2", 42.0, 16, "moe"))
    rows |= table_of(row("auto", 10.0, 32, "moe"), row("zero-2", None, 32, "moe"))
    text = page(rows, "")
    assert "16 GPUs: Alpa over DeepSpeed, measured: 3.5; predicted over ZeRO-2: 4.2." in text
    assert "32 GPUs: Alpa over DeepSpeed, measured: 9.7; ZeRO-2 finds no plan." in text


def test_a_picture_per_family_has_a_bar_per_plan():
    rows = table_of(row("auto", 20.0), row("pp-dp", None), row("auto", 9.0, family="gpt"))
    found = pictures(rows)
    assert set(found) == {"paper-wrn.svg", "paper-gpt.svg"}
    texts = {name: ElementTree.fromstring(picture) for name, picture in found.items()}
    titles = [
        title.text for title in texts["paper-wrn.svg"].iter("{http://www.w3.org/2000/svg}title")
    ]
    assert titles == ["32, auto: 5"]
