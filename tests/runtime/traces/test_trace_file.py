"""trace.json, trace.html and the table: of recordings that are planned steps, two times slower."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from launcher.autopar.programs.communication import add_communication
from launcher.autopar.programs.instructions import Instruction
from launcher.autopar.programs.launches import Launch, launches
from launcher.autopar.programs.program import Wiring
from launcher.autopar.programs.schedules import schedule_by_name
from launcher.autopar.programs.simulator import Durations, simulate
from launcher.runtime.steps.tracing import read_late
from launcher.runtime.traces.comparison import compare, planned_seconds
from launcher.runtime.traces.recording import Recording, Span
from launcher.runtime.traces.trace_file import trace_text
from launcher.runtime.traces.trace_page import trace_page

SLOWER = 2.0
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb_h1": 1}
NUM_SUBMESHES, NUM_MICROBATCHES = 3, 6


def planned_step(schedule: str):
    """Program, wiring and timeline of a step with tied parameters and slow, overlapping messages."""
    virtual_stages = SCHEDULES[schedule]
    count = NUM_SUBMESHES * virtual_stages
    wiring = Wiring.chain(
        count, tied=((0, count - 1),), with_norm=True, virtual_stages=virtual_stages
    )
    lists = schedule_by_name(schedule, virtual_stages).build(count, NUM_MICROBATCHES)
    program = add_communication(lists, wiring)
    pairs = [(stage, stage + 1) for stage in range(count - 1)]
    durations = Durations(
        forward_s=tuple(0.001 + 0.0003 * stage for stage in range(count)),
        backward_s=(0.002,) * count,
        backward_input_s=(0.0011,) * count,
        backward_weight_s=(0.0009,) * count,
        synchronize_s=(0.0015,) * count,
        update_s=(0.0007,) * count,
        activation_s=dict.fromkeys(pairs, 0.0005),
        cotangent_s={(later, earlier): 0.0015 for earlier, later in pairs},
        tied_s={(0, count - 1): 0.002, (count - 1, 0): 0.002},
        norm_s=0.0001,
    )
    return program, wiring, simulate(program, durations)


def slow_recording(program, wiring, planned, step: int = 7) -> Recording:
    """The planned step as it would be recorded, with all times doubled."""
    at_s = {e.instruction: (SLOWER * e.start_s, SLOWER * e.end_s) for e in planned.events}
    lists: list[list[Span]] = [[] for _ in program.lists]
    clocks_s = [0.0] * len(lists)
    for launch in read_late(launches(program, wiring)):
        first, last = launch.first, launch.instructions[-1]
        if first in at_s:
            span = Span(launch, at_s[first][0], at_s[last][1])
        else:  # a receive or a free
            arrived_s = at_s[first.partner][1] if first.is_receive else 0.0
            now_s = clocks_s[launch.submesh]
            span = Span(launch, now_s, max(now_s, arrived_s))
        if not first.is_send:
            clocks_s[launch.submesh] = span.end_s
        lists[launch.submesh].append(span)
    return Recording(step, program, tuple(span for spans in lists for span in spans))


def one_program(program) -> Recording:
    launch = Launch(0, tuple(entry for entries in program.lists for entry in entries))
    return Recording(4, program, (Span(launch, 0.0, 0.5),))


def processes(text: str) -> dict[str, dict[str, list[dict]]]:
    """Name of process -> name of thread -> its slices."""
    events = json.loads(text)["traceEvents"]
    assert {event["ph"] for event in events} == {"X", "M"}
    names, threads, found = {}, {}, {}
    for event in events:
        if event["name"] == "process_name":
            names[event["pid"]] = event["args"]["name"]
        elif event["name"] == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
            found.setdefault(names[event["pid"]], {})[event["args"]["name"]] = []
        elif event["ph"] == "X":
            lane = threads[event["pid"], event["tid"]]
            found[names[event["pid"]]][lane].append(event)
    tids = [tid for _, tid in threads]
    assert len(set(tids)) == len(tids)
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_trace_has_every_instruction_once_and_nothing_overlaps(schedule):
    program, wiring, planned = planned_step(schedule)
    found = processes(trace_text(planned, program, [slow_recording(program, wiring, planned)]))
    assert list(found) == ["planned", "measured, step 7"]
    wanted = sorted(str(entry) for entries in program.lists for entry in entries)
    for lanes in found.values():
        slices = [one for lane in lanes.values() for one in lane]
        names = [name for one in slices for name in one["name"].split("+")]
        assert sorted(names) == wanted
        assert {"submesh 0", "submesh 0 sends", "submesh 2"} <= lanes.keys()
        for lane in lanes.values():
            spans_ns = sorted(
                (round(one["ts"] * 1000), round((one["ts"] + one["dur"]) * 1000)) for one in lane
            )
            assert all(0 <= start <= end for start, end in spans_ns)
            assert all(a[1] <= b[0] for a, b in zip(spans_ns, spans_ns[1:], strict=False))


def test_slices_have_the_times_of_their_instructions():
    program, wiring, planned = planned_step("1f1b")
    found = processes(trace_text(planned, program, [slow_recording(program, wiring, planned)]))
    events = {str(event.instruction): event for event in planned.events}
    slices = {one["name"]: one for lane in found["planned"].values() for one in lane}
    for name, event in events.items():
        assert slices[name]["ts"] == pytest.approx(1e6 * event.start_s, abs=1e-3)
        assert slices[name]["dur"] == pytest.approx(1e6 * (event.end_s - event.start_s), abs=2e-3)
    slices = {one["name"]: one for lane in found["measured, step 7"].values() for one in lane}
    assert slices["1F3"]["ts"] == pytest.approx(2e6 * events["1F3"].start_s, abs=1e-3)
    assert slices["1F3"]["args"] == {
        "stage": 1, "microbatch": 3, "planned_us": pytest.approx(1300.0),
    }  # fmt: skip
    fused = slices["2F0+2B0"]
    assert fused["dur"] == pytest.approx(2 * fused["args"]["planned_us"])
    assert fused["args"]["instructions"] == ["2F0", "2B0"]
    # What 1B0 waits for is made by 2F0 and 2B0, and on its way for 1.5 ms.
    receive = slices["1RECV_B0<2"]
    assert receive["dur"] == 0.0
    assert receive["args"]["waited_us"] == pytest.approx(
        receive["ts"] - (slices["1F1"]["ts"] + slices["1F1"]["dur"]), abs=1e-2
    )


def lane_of(found: dict[str, list[dict]], name: str) -> str:
    return next(lane for lane, slices in found.items() if name in [one["name"] for one in slices])


def test_messages_that_overtake_one_another_get_a_lane_of_their_own():
    program, wiring, planned = planned_step("1f1b")
    recording = slow_recording(program, wiring, planned)
    found = processes(trace_text(planned, program, [recording]))["measured, step 7"]
    assert lane_of(found, "2SEND_B0>1") == lane_of(found, "2SEND_B1>1") == "submesh 2 sends"
    late = Instruction.parse("2SEND_B0>1")
    spans = tuple(
        Span(span.launch, span.start_s, span.end_s + 0.02 * (span.launch.first == late))
        for span in recording.spans
    )
    text = trace_text(planned, program, [Recording(7, program, spans)])
    found = processes(text)["measured, step 7"]
    assert lane_of(found, "2SEND_B0>1") == "submesh 2 sends"
    assert lane_of(found, "2SEND_B1>1") == "submesh 2 sends (2)"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_timeline_of_a_recording_is_the_planned_one_slowed_down(schedule):
    program, wiring, planned = planned_step(schedule)
    measured = slow_recording(program, wiring, planned).timeline(planned_seconds(planned))
    assert measured.step_s == pytest.approx(SLOWER * planned.step_s)
    assert measured.bubble_fraction == pytest.approx(planned.bubble_fraction)
    assert measured.stash_peak == planned.stash_peak
    found = {event.instruction: event for event in measured.events}
    assert found.keys() == {event.instruction for event in planned.events}
    for event in planned.events:
        other = found[event.instruction]
        assert (other.submesh, other.kind) == (event.submesh, event.kind)
        assert other.start_s == pytest.approx(SLOWER * event.start_s)
        assert other.end_s == pytest.approx(SLOWER * event.end_s)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_table_finds_how_much_slower(schedule):
    program, wiring, planned = planned_step(schedule)
    recording = slow_recording(program, wiring, planned)
    rows = compare(planned, [recording, recording])
    assert all(row.ratio == pytest.approx(SLOWER) for row in rows)
    counted = {(row.kind, row.where): row.count for row in rows}
    assert counted["F", "stage 0"] == NUM_MICROBATCHES
    assert counted["SEND_F", "0 > 1"] == NUM_MICROBATCHES
    assert [row.kind for row in rows if row.kind.startswith("SEND")][-1] == "SEND_P"


def test_what_is_gathered_on_arrival_counts_to_the_transfer():
    program, wiring, planned = planned_step("gpipe")
    receive = Instruction.parse("1RECV_F0<0")
    spans = list(slow_recording(program, wiring, planned).spans)
    index = next(i for i, span in enumerate(spans) if span.launch.first == receive)
    spans[index] = Span(spans[index].launch, spans[index].start_s, spans[index].end_s + 0.25)
    recording = Recording(1, program, tuple(spans))
    assert recording.landing(spans[index]).seconds == pytest.approx(0.25)
    send = recording.sends[receive.partner]
    assert recording.transfer_s(send) == pytest.approx(0.001 + 0.25)


def test_a_step_of_one_program_says_so():
    program = add_communication(
        schedule_by_name("1f1b").build(1, 4), wiring := Wiring.chain(1, with_norm=True)
    )
    assert wiring.num_stages == 1
    planned = simulate(program, Durations(**dict.fromkeys(
        ("forward_s", "backward_s", "synchronize_s", "update_s"), (0.02,))))  # fmt: skip
    recording = one_program(program)
    found = processes(trace_text(planned, program, [recording]))
    [[one]] = found["measured, step 4 (one program)"].values()
    assert one["args"]["instructions"] == [str(entry) for entry in program.lists[0]]
    assert (one["ts"], one["dur"]) == (0.0, 500_000.0)
    [row] = compare(planned, [recording])
    assert (row.kind, row.ratio) == ("step", pytest.approx(0.5 / planned.step_s))
    page = trace_page("a step", planned, [recording], None)
    assert "whose whole step is one program" in page
    assert f"{len(program.lists[0])} instructions in one program" in page


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_page_shows_both_steps_on_one_scale(schedule):
    program, wiring, planned = planned_step(schedule)
    recording = slow_recording(program, wiring, planned)
    page = trace_page("gpt < tiny", planned, [recording], "CPU devices stand for V100")
    assert "<h1>gpt &lt; tiny</h1>" in page
    assert "Compare proportions, not seconds, with the plan: CPU devices stand for V100" in page
    upper, lower = re.findall(r"<svg.*?</svg>", page, re.DOTALL)[:2]
    ends = [
        [text for text in texts(picture) if text.endswith("s")][-1] for picture in (upper, lower)
    ]
    assert ends[0] == ends[1]
    assert ("F+B" in page) == (schedule in ("1f1b", "interleaved"))


def texts(picture: str) -> list[str]:
    root = ElementTree.fromstring(picture)
    return [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
