"""The table of runs, as text: a line for each, below it what else there is to say of some."""

import shutil
from collections.abc import Iterator, Sequence

from launcher.autopar.text.wording import size
from launcher.run_state import TO_GO_ON
from launcher.runtime.records.progress_text import duration, loss_text, rate
from launcher.status.comparison import CSV_NAME, Comparison, Run, samples_per_s
from launcher.status.standing import Standing

_LONGEST_VALUE, _LONGEST_DETAIL = 28, 160
_HEADS = ("state", "step", "loss", "eval loss", "speed", "measured", "predicted", "memory")
_MOST_RUNS = 40
_ROOM = 120  # columns of text; a wider terminal has more
_SAYS_NOTHING = ("null", "auto", "")  # of a field; as the option of a group `auto` says much


def table(comparison: Comparison, *, most: int = _MOST_RUNS) -> list[str]:
    """The lines of the table; of a long one the first runs, which are the best.

    Of what differs between the runs it shows what does so in these, and as much as fits; the others are
    named below it.
    """
    shown = comparison.runs[:most]
    columns = _telling(comparison.columns, shown)
    left_out: list[str] = []
    room = max(_ROOM, shutil.get_terminal_size((_ROOM, 0)).columns)
    while max(map(len, lines := _lines(columns, shown)), default=0) > room and columns:
        left_out.append(columns.pop(_least_telling(columns, shown)))
    rest = len(comparison.runs) - len(shown)
    if rest > 0:
        lines.append(f"... {rest} more")
    if left_out:
        named = sorted(left_out, key=comparison.columns.index)
        lines.append(f"differ too, in {CSV_NAME}: {', '.join(named)}")
    return [*lines, *details(shown)]


def _lines(columns: Sequence[str], runs: Sequence[Run]) -> list[str]:
    rows = [("run", *columns, *_HEADS)]
    rows += [(run.name, *(run.values[name] for name in columns), *_cells(run)) for run in runs]
    return _aligned(rows)


def _telling(columns: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """Those in which these runs differ."""
    return [name for name in columns if len({run.values[name] for run in runs}) > 1]


def _least_telling(columns: Sequence[str], runs: Sequence[Run]) -> int:
    """The place of the column that fewest runs set to something; among several, of the last."""
    telling = [
        len(runs) if "." not in name else sum(run.values[name] not in _SAYS_NOTHING for run in runs)
        for name in columns
    ]
    return max(at for at, count in enumerate(telling) if count == min(telling))


def details(runs: Sequence[Run]) -> Iterator[str]:
    """What there is to say of those that are not simply done, and where their logs are."""
    for run in runs:
        standing = run.standing
        if not standing.has_ended_well:
            said, _, command = (standing.detail or standing.state).partition(TO_GO_ON)
            status = f" (exit status {standing.exit_status})" if standing.exit_status else ""
            yield f"{run.name}: {_short(said, _LONGEST_DETAIL)}{status}; log: {standing.log}"
            if command:  # to be copied, so it is whole and has a line of its own
                yield f"  to go on: {command}"


def _cells(run: Run) -> tuple[str, ...]:
    standing, promised = run.standing, samples_per_s(run)
    steps = "" if standing.steps is None else f"{standing.step}/{standing.steps}"
    speed = "" if standing.per_s is None else f"{rate(standing.per_s)} {standing.unit}/s"
    if standing.state == "planned" and promised is not None:
        speed = f"{rate(promised)} samples/s"
    failed = standing.state == "failed" and standing.exit_status
    return (
        f"failed ({standing.exit_status})" if failed else standing.state,
        steps,
        "" if standing.loss is None else loss_text(standing.loss),
        "" if standing.eval_loss is None else loss_text(standing.eval_loss),
        speed,
        "" if standing.measured_step_s is None else duration(standing.measured_step_s),
        _predicted(standing),
        "" if run.peak_bytes is None else size(run.peak_bytes),
    )


def _predicted(standing: Standing) -> str:
    if standing.predicted_step_s is None:
        return ""
    promised, ratio = duration(standing.predicted_step_s), standing.measured_over_predicted
    return promised if ratio is None else f"{promised} (x {ratio:.2f})"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    short = [[_short(cell, _LONGEST_VALUE) for cell in row] for row in rows]
    # A column that no run fills is left out.
    used = [at for at, cells in enumerate(zip(*short[1:], strict=True)) if any(cells)]
    widths = {at: max(len(row[at]) for row in short) for at in used}
    return ["  ".join(row[at].ljust(widths[at]) for at in used).rstrip() for row in short]


def _short(text: str, longest: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."
