"""The table of runs, as text: a line for each, below it what else there is to say of some."""

from collections.abc import Iterator, Sequence

from launcher.autopar.text.wording import size
from launcher.runtime.records.progress_text import duration, loss_text, rate
from launcher.status.comparison import Comparison, Run, samples_per_s
from launcher.status.standing import Standing

_LONGEST_VALUE, _LONGEST_DETAIL = 28, 160
_HEADS = ("state", "step", "loss", "eval loss", "speed", "measured", "predicted", "memory")
_MOST_RUNS = 40


def table(comparison: Comparison, *, most: int = _MOST_RUNS) -> list[str]:
    """The lines of the table; of a long one the first runs, which are the best."""
    shown = comparison.runs[:most]
    rows = [("run", *comparison.columns, *_HEADS)]
    rows += [(run.name, *run.values.values(), *_cells(run)) for run in shown]
    lines = _aligned(rows)
    rest = len(comparison.runs) - len(shown)
    if rest > 0:
        lines.append(f"... {rest} more")
    return [*lines, *details(shown)]


def details(runs: Sequence[Run]) -> Iterator[str]:
    """What there is to say of those that are not simply done, and where their logs are."""
    for run in runs:
        standing = run.standing
        if not standing.has_ended_well:
            said = standing.detail or standing.state
            status = f" (exit status {standing.exit_status})" if standing.exit_status else ""
            yield f"{run.name}: {_short(said, _LONGEST_DETAIL)}{status}; log: {standing.log}"


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
