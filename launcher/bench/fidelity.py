"""`python -m launcher.bench fidelity data=DIR`: predicted step times beside those that others measured.

Every row of the files that `measured` lists is priced as a plan that a file might hold: its degrees, and
Megatron-LM's strategies (`megatron`), realized, and played by the simulator. For each file then the mean
absolute error of the step time, over all rows, and for each model with several plans the rank correlation
(Spearman's) and the regret: how much slower than the fastest plan the one is that was predicted to be the
fastest. Nothing is fitted here; the figures are those of the packaged cluster files. Rows held to be
artefacts of the measurement are named, and count like any other.

    data   the folder of the files
    files  which, as in megatron_sc21_a100.csv; default: all that are there
"""

import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.autopar.predictions.predict import stage_durations
from launcher.autopar.programs.simulator import simulate
from launcher.autopar.realized.realize import realize
from launcher.autopar.text.wording import count
from launcher.bench.measured import SOURCES, Measurement, Source
from launcher.bench.megatron import megatron_plan
from launcher.bench.settings import check_keys, chosen
from launcher.errors import ConfigError

_LEAST_RANK_CORRELATION = 0.85
_MOST_REGRET = 0.03
_FEWEST_PLANS = 5  # of a task, for a rank correlation that says something


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """A measurement and its prediction."""

    measured: Measurement
    step_s: float

    @property
    def error(self) -> float:
        return self.step_s / self.measured.step_s - 1.0


def run(settings: Mapping[str, str]) -> int:
    """Print a row per measurement, then what comes of them; status 1 if a bar is missed."""
    check_keys("fidelity", settings, ("data", "files"))
    if "data" not in settings:
        raise ConfigError("data is not set: give data=DIR, the folder of the measurements")
    folder = Path(settings["data"])
    wanted = chosen(settings, "files", [source.file for source in SOURCES])
    found = [(s, s.measurements(folder)) for s in SOURCES if s.file in wanted]
    if not any(measurements for _, measurements in found):
        raise ConfigError(
            f"data={folder} has no rows in any of {', '.join(wanted)}: give the folder that has them"
        )
    missed = sum(_report(source, rows) for source, rows in found if rows)
    if missed:
        _say(f"missed: {count(missed, 'bar')} (status 1)")
    return int(missed > 0)


def price(measured: Measurement, source: Source) -> Priced:
    """Predict the step time of a measurement."""
    cluster = source.cluster(measured.num_devices)
    plan, model, planner = megatron_plan(measured, cluster)
    realized = realize(plan, model, cluster, planner)
    timeline = simulate(realized.program, stage_durations(realized, cluster), with_events=False)
    return Priced(measured=measured, step_s=timeline.step_s)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks; equal values share the mean of theirs."""
    return statistics.correlation(_ranks(one), _ranks(other))


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def _report(source: Source, measurements: Sequence[Measurement]) -> int:
    """Print a file's rows and summary; returns how many bars it misses."""
    _say(f"{source.title} ({source.file})")
    _say(f"  {'plan':<58}{'measured':>10}{'predicted':>11}{'error':>9}")
    priced = []
    for measured in measurements:
        priced.append(price(measured, source))
        _say(_row(priced[-1]))
    missed = _report_error(source, priced)
    for rows in _tasks(priced):
        missed += _report_ranks(source, rows)
    return missed


def _row(row: Priced) -> str:
    measured = row.measured
    model = f"h={measured.hidden} L={measured.layers} batch={measured.global_batch} {measured}"
    artefact = f"  artefact: {measured.artefact}" if measured.artefact else ""
    return (
        f"  {model:<58}{measured.step_s:>8.3f} s{row.step_s:>9.3f} s{100 * row.error:>+7.1f} %"
        f"{artefact}"
    )


def _report_error(source: Source, priced: Sequence[Priced]) -> int:
    error = statistics.mean(abs(row.error) for row in priced)
    bar = source.most_error
    missed = bar is not None and error > bar
    said = "no bar" if bar is None else f"at most {100 * bar:g} %{_verdict(missed)}"
    _say(f"  mean absolute error of {len(priced)}: {100 * error:.2f} % ({said})")
    return int(missed)


def _report_ranks(source: Source, rows: Sequence[Priced]) -> int:
    """The rank correlation and the regret among plans for one model, batch and number of devices."""
    correlation = _correlation(rows)
    measured = [row.measured.step_s for row in rows]
    others = [row for row in rows if not row.measured.artefact]
    besides = (
        f"; {_correlation(others):.3f} among the {len(others)} that are held to be no artefacts"
        if source.ranks and _FEWEST_PLANS <= len(others) < len(rows)
        else ""
    )
    first = min(rows, key=lambda row: row.step_s).measured
    regret = first.step_s / min(measured) - 1.0
    bars = (correlation < _LEAST_RANK_CORRELATION, regret > _MOST_REGRET) if source.ranks else ()
    said = [
        f"at least {_LEAST_RANK_CORRELATION:g}{_verdict(bars[0])}{besides}" if bars else "no bar",
        f"at most {100 * _MOST_REGRET:g} %{_verdict(bars[1])}" if bars else "no bar",
    ]
    model = f"h={first.hidden} L={first.layers} batch={first.global_batch} on {first.num_devices}"
    _say(
        f"  {model}: {len(rows)} plans, rank correlation {correlation:.3f}"
        f" ({said[0]}), the first ranked {first} is {100 * regret:.1f} % from the fastest ({said[1]})"
    )
    return sum(bars)


def _correlation(rows: Sequence[Priced]) -> float:
    return rank_correlation([row.step_s for row in rows], [row.measured.step_s for row in rows])


def _verdict(missed: bool) -> str:
    return ": missed" if missed else ": kept"


def _tasks(priced: Iterable[Priced]) -> list[list[Priced]]:
    """The plans that can be compared with one another, where there are enough."""
    tasks: dict[tuple, list[Priced]] = {}
    for row in priced:
        tasks.setdefault(row.measured.task, []).append(row)
    return [rows for rows in tasks.values() if len(rows) >= _FEWEST_PLANS]


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
