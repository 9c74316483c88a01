"""plan.html and its pictures: well-formed, self-contained, and of a size that opens."""

import dataclasses
import re
import xml.etree.ElementTree as ElementTree

import pytest

from launcher.autopar.answers.answers import Answers
from launcher.autopar.answers.compare import PricedPlan, compare
from launcher.autopar.answers.why_not import Alternative, WhyNot
from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.pages.cluster_picture import cluster_svg
from launcher.autopar.pages.plan_page import PageExtras, page, write_page
from launcher.autopar.pages.stage_bars import bar_legend, memory_bar, time_bar
from launcher.autopar.pages.timeline_picture import timeline_svg
from launcher.autopar.plans.plan import RunnerUp
from launcher.autopar.plans.stage_hosts import TightStage
from launcher.autopar.predictions.step_parts import StepParts
from launcher.autopar.programs.communication import add_communication
from launcher.autopar.programs.program import Wiring
from launcher.autopar.programs.schedules import schedule_by_name
from launcher.autopar.programs.simulator import Durations, simulate
from launcher.autopar.programs.timeline import EventKind, Timeline
from launcher.errors import StorageError

SVG = "{http://www.w3.org/2000/svg}"
PARTS = (
    StepParts(computation_s=0.02, recomputation_s=0.01, communication_s=0.005, bubble_s=0.0062),
    StepParts(computation_s=0.03, synchronization_s=0.002, transfers_s=0.003, bubble_s=0.0062),
)


def make_timeline(
    num_stages: int, num_microbatches: int, schedule: str = "1f1b", virtual_stages: int = 1
) -> Timeline:
    """The step of a pipeline whose later stages are slower, with transfers."""
    lists = schedule_by_name(schedule, virtual_stages).build(num_stages, num_microbatches)
    edges = [(stage, stage + 1) for stage in range(num_stages - 1)]
    durations = Durations(
        forward_s=tuple(0.001 + 0.0002 * stage for stage in range(num_stages)),
        backward_s=tuple(0.002 + 0.0004 * stage for stage in range(num_stages)),
        synchronize_s=(0.003, *(0.0 for _ in edges)),
        update_s=(0.0005,) * num_stages,
        backward_input_s=tuple(0.001 + 0.0002 * stage for stage in range(num_stages)),
        backward_weight_s=tuple(0.001 + 0.0002 * stage for stage in range(num_stages)),
        activation_s=dict.fromkeys(edges, 0.0004),
        cotangent_s={(later, earlier): 0.0004 for earlier, later in edges},
    )
    wiring = Wiring.chain(num_stages, virtual_stages=virtual_stages)
    return simulate(add_communication(lists, wiring), durations)


@pytest.fixture
def timeline() -> Timeline:
    return make_timeline(2, 8)


@pytest.fixture
def long_timeline() -> Timeline:
    return make_timeline(6, 200)


def boxes(picture: str, css: str) -> list[ElementTree.Element]:
    return [
        node
        for node in ElementTree.fromstring(picture).iter(f"{SVG}rect")
        if node.get("class") == css
    ]


def texts(picture: str) -> list[str]:
    return [node.text for node in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def test_the_page_is_written_and_needs_nothing_else(plan, timeline, cpu8, params, tmp_path):
    path = tmp_path / "plan.html"
    write_page(plan, timeline, cpu8, path, PageExtras(params=params, parts=PARTS))
    text = path.read_text()
    assert text.startswith("<!doctype html>")
    for part in (
        "41.2 ms",
        "15.8 %",
        "blocks/*/mlp/up/kernel",
        "[-, tensor=2]",
        "nominal",
        "1,482",
    ):
        assert part in text, part
    for outside in ("<script", "<link", "<img", "url(", "@import", "src="):
        assert outside not in text
    assert set(re.findall(r'https?://[^"\s<]+', text)) == {"http://www.w3.org/2000/svg"}
    assert [file.name for file in tmp_path.iterdir()] == ["plan.html"]


def test_every_picture_of_the_page_is_well_formed(plan, timeline, cpu8, params):
    text = page(plan, timeline, cpu8, PageExtras(params=params, parts=PARTS))
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) > 6
    for picture in pictures:
        ElementTree.fromstring(picture)


HOSTILE = "<script>alert(1)</script>'\"&"


def test_names_cannot_break_the_page(plan, timeline, cpu8, params):
    first, *others = plan.stages
    stage = dataclasses.replace(first, params={**first.params, HOSTILE: (None,)}, recompute=HOSTILE)
    runner_up = RunnerUp(description=HOSTILE, step_s=1.0, why=HOSTILE)
    hostile = dataclasses.replace(
        plan,
        model=dataclasses.replace(plan.model, name=HOSTILE, size=HOSTILE),
        stages=(stage, *others),
        runners_up=(runner_up,),
        schedule=HOSTILE,
    )
    priced = [
        PricedPlan(name=HOSTILE, plan=each, parts=parts, tight=TightStage(0, 0.0, cpu8.device))
        for each, parts in zip((hostile, plan), PARTS, strict=True)
    ]
    forced = Alternative(name=HOSTILE, best=None, reason=HOSTILE)
    answers = Answers(
        comparison=compare(*priced, params),
        why_not=WhyNot(chosen=priced[0], alternatives=(forced,)),
    )
    extras = PageExtras(params=params, parts=PARTS, answers=answers)
    machine = dataclasses.replace(cpu8, name=HOSTILE)
    text = page(hostile, timeline, machine, extras)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 10
    body = re.sub(r"<!doctype html>|<meta[^>]*>", "", text)
    ElementTree.fromstring(body)  # every tag is closed, every & escaped


def test_a_plan_without_a_price_has_a_page(plan, cpu8):
    bare = dataclasses.replace(
        plan,
        predicted=None,
        search=None,
        runners_up=(),
        stages=tuple(dataclasses.replace(stage, params={}) for stage in plan.stages),
    )
    empty = Timeline(events=(), step_s=0.0, busy_s=(0.0, 0.0), exposed_s=(0, 0), stash_peak=(0, 0))
    text = page(bare, empty, cpu8)
    assert "This timeline holds no events." in text
    assert "Where the tensors lie" not in text


def test_a_page_that_cannot_be_written(plan, timeline, cpu8, tmp_path):
    with pytest.raises(StorageError, match="cannot write .*hydra.run.dir="):
        write_page(plan, timeline, cpu8, tmp_path / "none" / "plan.html")


def test_a_short_step_has_a_box_for_every_instruction(timeline):
    picture = timeline_svg(timeline)
    assert len(boxes(picture, "forward")) == 16 + 1  # 2 stages x 8 microbatches, and the legend
    assert len(boxes(picture, "backward")) == 16 + 1
    assert {"F0", "F7", "B0", "B7", "stage 0", "stage 1"} <= set(texts(picture))
    assert boxes(picture, "forward")[1].find(f"{SVG}title").text == "stage 0 F0: 1 ms"


def test_a_submesh_has_one_row_for_all_its_stages(timeline):
    virtual = make_timeline(4, 4, "interleaved", 2)
    picture = timeline_svg(virtual)
    assert {"submesh 0", "submesh 1", "0F0", "2F0"} <= set(texts(picture))
    assert not {"submesh 2", "stage 0"} & set(texts(picture))
    assert len(boxes(picture, "forward")) == 4 * 4 + 1
    places = {
        box.find(f"{SVG}title").text.split(" F")[0]: box.get("y")
        for box in boxes(picture, "forward")[1:]
    }
    assert places["stage 0"] == places["stage 2"] != places["stage 1"]
    assert "weight gradients" not in texts(picture)


def test_weight_gradients_have_a_colour_of_their_own():
    split = make_timeline(2, 8, "zb_h1")
    picture = timeline_svg(split)
    assert len(boxes(picture, "weight")) == 16 + 1
    assert {"W0", "I0", "weight gradients"} <= set(texts(picture))
    long = timeline_svg(make_timeline(4, 200, "zb_h1"))
    assert "200 microbatches" in next(text for text in texts(long) if text.startswith("One step"))


def test_the_page_of_virtual_stages(plan, cpu8, params):
    first, second = plan.stages
    stages = tuple(
        dataclasses.replace(stage, layers=(i, i + 1)) for i, stage in enumerate((first, second) * 2)
    )
    virtual = dataclasses.replace(
        plan, schedule="interleaved", virtual_stages=2, stages=stages, predicted=None
    )
    extras = PageExtras(params=params, parts=PARTS)
    text = page(virtual, make_timeline(4, 4, "interleaved", 2), cpu8, extras)
    for part in (
        "schedule interleaved, 2 stages on each of 2 submeshes",
        "2 submeshes of 4 devices each",
        "the number the first of the 2 stages on its submesh",
        "memory: of the submesh",
    ):
        assert part in text, part
    for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(picture)
    drawn = ElementTree.fromstring(cluster_svg(virtual, cpu8))
    assert {node.text for node in drawn.iter(f"{SVG}text") if node.get("class") == "on"} == {
        "0",
        "1",
    }


def test_a_long_step_is_cut_to_what_can_be_seen(long_timeline):
    picture = timeline_svg(long_timeline)
    titles = [text for text in texts(picture) if text.startswith(("One step", "Its"))]
    assert [title.split(":")[0].split()[0:2] for title in titles] == [
        ["One", "step"], ["Its", "first"], ["Its", "last"],
    ]  # fmt: skip
    assert "200 microbatches" in titles[0]
    assert len(boxes(picture, "forward")) < 6 * 200
    assert len(picture) < 400_000


def test_slices_have_the_area_of_what_they_stand_for(long_timeline):
    """The whole step's forward path of stage 0 covers its share of the row."""
    picture = ElementTree.fromstring(timeline_svg(long_timeline))
    path = next(node for node in picture.iter(f"{SVG}path") if node.get("class") == "forward")
    moves = re.findall(r"([MHV])([\d.]+)(?: ([\d.]+))?", path.get("d"))
    x, y = float(moves[0][1]), float(moves[0][2])
    left, points = x, [(x, y)]
    for command, value, _ in moves[1:]:
        x, y = (float(value), y) if command == "H" else (x, float(value))
        points.append((x, y))
    area = sum(
        (x2 - x1) * (y1 + y2) / 2
        for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True)
    )
    row_px, width_px = 24.0, max(x for x, _ in points) - left
    forward_s = sum(
        event.end_s - event.start_s
        for event in long_timeline.events
        if event.kind is EventKind.FORWARD and event.submesh == 0
    )
    shown = forward_s / long_timeline.step_s
    assert abs(area) / (row_px * width_px) == pytest.approx(shown, rel=0.02)


def test_a_bar_is_as_long_as_its_step_and_cut_by_its_parts():
    picture = time_bar(PARTS[0], 0.0412)
    widths = {
        css: float(boxes(picture, css)[0].get("width"))
        for css in ("compute", "again", "communicate", "idle")
    }
    assert sum(widths.values()) == pytest.approx(300, abs=0.3)
    assert widths["compute"] == pytest.approx(300 * 0.02 / 0.0412, abs=0.1)
    assert not boxes(picture, "update")
    assert "49 %" in texts(picture)
    half = time_bar(PARTS[0], 2 * 0.0412)
    assert float(boxes(half, "compute")[0].get("width")) == pytest.approx(
        widths["compute"] / 2, abs=0.1
    )


def test_the_legend_of_bars_has_what_they_have():
    legend = bar_legend(PARTS[:1])
    assert ">recomputation" in legend
    assert "update" not in legend
    assert "waits for a transfer" in bar_legend(PARTS)


def test_memory_beyond_the_limit_is_shown_as_such():
    assert boxes(memory_bar(12e9, 16e9), "update")
    beyond = memory_bar(32e9, 16e9)
    assert boxes(beyond, "limit")
    assert not boxes(beyond, "update")


def test_the_map_shows_who_has_which_device(plan, cpu8):
    picture = cluster_svg(plan, cpu8)
    titles = [node.text for node in ElementTree.fromstring(picture).iter(f"{SVG}title")]
    assert titles[0] == "host 0, device 0: stage 0"
    assert titles[-1] == "host 1, device 3: stage 1"
    larger = cluster_svg(plan, load_cluster("8xp3").replace(hosts=384))
    assert larger.count("not used") == 384 * 8 - 8
