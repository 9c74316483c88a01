"""trace.html: the planned step above the traced ones, on one time scale, and where they differ."""

from collections.abc import Iterator, Sequence
from html import escape

from launcher.autopar.pages import html_page
from launcher.autopar.pages.html_page import cell, number, section, table
from launcher.autopar.pages.timeline_picture import one_bar_svg, timeline_svg
from launcher.autopar.programs.instructions import Op
from launcher.autopar.programs.timeline import Timeline
from launcher.autopar.text.wording import digits, percent, seconds
from launcher.runtime.traces.comparison import WHOLE_STEP, Compared, compare, planned_seconds
from launcher.runtime.traces.recording import Recording

PAGE_NAME = "trace.html"

_TOO_SMALL = 2  # times shorter than the other
_WORDS = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "backward, gradients of inputs",
    Op.BACKWARD_WEIGHT: "backward, gradients of weights",
    Op.SYNCHRONIZE: "synchronize gradients",
    Op.UPDATE: "update",
    Op.SEND_ACTIVATION: "transfer of activations",
    Op.SEND_COTANGENT: "transfer of cotangents",
    Op.SEND_TIED_GRADIENT: "transfer of tied gradients",
    Op.SEND_NORM: "transfer of norms",
    Op.SEND_TIED_PARAMETER: "transfer of tied parameters",
}


def trace_page(
    title: str, planned: Timeline, recordings: Sequence[Recording], incomparable: str | None
) -> str:
    """The page as a text.

    Args:
        incomparable: why what was measured says nothing of the plan's devices; None where it does.
    """
    until_s = max(planned.step_s, *(recording.step_s for recording in recordings))
    sections = [
        f"<h1>{escape(title)}</h1>",
        html_page.tiles(_tiles(planned, recordings)),
        _notes(recordings[0], incomparable),
        section("Planned", "", timeline_svg(planned, alone=False, until_s=until_s)),
        *(_measured(recording, planned, until_s) for recording in recordings),
        *_own_scale(planned, recordings[0]),
        _table(compare(planned, recordings)),
    ]
    return html_page.document(title, sections)


def _tiles(planned: Timeline, recordings: Sequence[Recording]) -> Iterator[tuple[str, str]]:
    yield "a step, planned", seconds(planned.step_s)
    yield "bubble, planned", percent(planned.bubble_fraction)
    for recording in recordings:
        yield f"step {recording.step}, measured", seconds(recording.step_s)
        if not recording.is_one_program:
            yield f"bubble, step {recording.step}", percent(recording.bubble_fraction)


def _notes(recording: Recording, incomparable: str | None) -> str:
    notes = []
    if recording.is_one_program:
        notes.append(
            "This plan has one stage, whose whole step is one program: what happens inside is not "
            "to be seen from here. <code>train.profile_steps</code> shows it."
        )
    else:
        notes.append(
            "A traced step waits for the results of every instruction, so it takes somewhat longer "
            "than others, whose instructions are dispatched ahead."
        )
    if any(span.launch.is_fused for span in recording.spans) and not recording.is_one_program:
        notes.append(
            "Instructions that are one program (such as F+B) are drawn cut in the plan's ratio."
        )
    if incomparable:
        notes.append(f"Compare proportions, not seconds, with the plan: {escape(incomparable)}.")
    return "".join(f'<div class="note">{note}</div>' for note in notes)


def _measured(recording: Recording, planned: Timeline, until_s: float) -> str:
    title = f"Measured, step {recording.step}"
    if recording.is_one_program:
        name = f"{sum(map(len, recording.program.lists))} instructions in one program"
        return section(title, "", one_bar_svg(name, recording.step_s, until_s))
    timeline = recording.timeline(planned_seconds(planned))
    return section(title, "", timeline_svg(timeline, alone=False, until_s=until_s))


def _own_scale(planned: Timeline, recording: Recording) -> Iterator[str]:
    """The shorter step once more, if little can be seen of it on a common scale."""
    if planned.step_s * _TOO_SMALL < recording.step_s:
        yield section("Planned, on its own scale", "", timeline_svg(planned, alone=False))
    elif recording.step_s * _TOO_SMALL < planned.step_s and not recording.is_one_program:
        title = f"Measured, step {recording.step}, on its own scale"
        timeline = recording.timeline(planned_seconds(planned))
        yield section(title, "", timeline_svg(timeline, alone=False))


def _table(compared: Sequence[Compared]) -> str:
    heads = ("instruction", "", "where", "in a step", "planned", "measured", "measured / planned")
    lead = (
        "Medians of one instruction. A transfer counts from its send until its receiver has put it "
        "together."
    )
    return section("Instruction by instruction", lead, table(heads, map(_row, compared)))


def _row(compared: Compared) -> str:
    ratio = "" if compared.ratio is None else digits(compared.ratio)
    return "".join(
        (
            f"<td><code>{compared.kind}</code></td>",
            cell(_words(compared.kind)),
            cell(compared.where),
            number(str(compared.count)),
            number(seconds(compared.planned_s)),
            number(seconds(compared.measured_s)),
            number(ratio),
        )
    )


def _words(kind: str) -> str:
    if kind == WHOLE_STEP:
        return "the whole step"
    words = " and ".join(_WORDS[Op(op)] for op in kind.split("+"))
    return f"{words}, one program" if "+" in kind else words
