"""The rows of the paper's experiments as tables, as pictures, and as two verdicts.

The planner is never behind a baseline, whose plans are all among its own; and what went out of memory in
the paper finds no plan here. Left out: a bar on how near measured rates are; the devices are not here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.autopar.text.wording import aligned, seconds
from launcher.bench.chart import Bars, bar_chart
from launcher.bench.paper_cases import FAMILIES
from launcher.bench.paper_figures import (
    END_TO_END,
    EXTRAPOLATED,
    INTRA_OP,
    MEASURED,
    MEASURED_BY,
    MOE_SPEEDUPS,
    NOT_SHARED,
    OUT_OF_MEMORY,
)
from launcher.bench.paper_methods import METHODS, methods_of
from launcher.bench.paper_rows import Row, Rows

EXPERIMENTS = (END_TO_END, INTRA_OP)
_BEHIND = 1.001  # times the baseline's step: what differs by less is equal
_COLOURS = {
    "auto": "forward",
    "manual": "backward",
    "pp-dp": "weight",
    "data": "communicate",
    "zero-2": "synchronize",
    "zero-3": "compute",
    "inter-op": "update",
    "intra-op": "transfer",
    "equal-layers": "wait",
}
_TITLES = {"gpt": "GPT", "moe": "MoE", "wrn": "Wide-ResNet"}


@dataclass(frozen=True, slots=True)
class Table:
    """An experiment with a family: its head, and a list of cells per line."""

    experiment: str
    family: str
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]

    @property
    def title(self) -> str:
        return f"{_TITLES[self.family]}, {self.experiment}"

    def text(self) -> str:
        """Lay it out for a terminal."""
        lines = aligned([self.head, *self.lines], right=range(1, len(self.head)))
        return "\n".join([f"{self.title}: TFLOP/s per device", *(f"  {line}" for line in lines)])

    def markdown(self) -> str:
        rule = ["---"] + ["---:"] * (len(self.head) - 1)
        lines = (self.head, rule, *self.lines)
        return "\n".join(f"| {' | '.join(map(str.strip, cells))} |" for cells in lines)


def order(row: Row) -> tuple:
    """Rows in the order of the tables."""
    return (
        EXPERIMENTS.index(row.experiment),
        FAMILIES.index(row.family),
        row.num_devices,
        METHODS.index(row.method),
    )


def planner_of(experiment: str) -> str:
    """The method that no other may beat."""
    return methods_of(experiment, "gpt")[0]


def tables(rows: Rows) -> list[Table]:
    """Those of which there are rows."""
    made = (_table(rows, experiment, family) for experiment in EXPERIMENTS for family in FAMILIES)
    return [table for table in made if table.lines]


def _table(rows: Rows, experiment: str, family: str) -> Table:
    ours = [row for row in rows.values() if (row.experiment, row.family) == (experiment, family)]
    numbers = sorted({row.num_devices for row in ours})
    lines = []
    planned = {row.method for row in ours}
    for method in (name for name in methods_of(experiment, family) if name in planned):
        cells = [_predicted(rows.get((experiment, family, number, method))) for number in numbers]
        lines.append((method, *cells))
        if (experiment, family, method) in MEASURED:
            cells = [_measured(experiment, family, method, number) for number in numbers]
            lines.append((f"  measured: {_system(family, method)}", *cells))
    lead = [_lead(rows, experiment, family, number) for number in numbers]
    if any(lead):
        lines.append((f"{planner_of(experiment)} / best other", *lead))
    return Table(experiment, family, ("GPUs", *map(str, numbers)), tuple(lines))


def _system(family: str, method: str) -> str:
    part = "Alpa" if method == "auto" else f"Alpa, {method}"
    return MEASURED_BY.get((family, method), part)


def _predicted(row: Row | None) -> str:
    return "" if row is None else _rate(row.tflops)


def _measured(experiment: str, family: str, method: str, number: int) -> str:
    rate = MEASURED[experiment, family, method].get(number)
    if rate is None:
        return ""
    return _rate(rate) + ("*" if (experiment, family, method, number) in EXTRAPOLATED else "")


def _rate(tflops: float) -> str:
    return {OUT_OF_MEMORY: "OOM", NOT_SHARED: "-"}.get(tflops, f"{tflops:.2f}")


def _others(rows: Rows, experiment: str, family: str, number: int) -> list[Row]:
    """The baselines that have a plan."""
    return [
        row
        for row in rows.values()
        if (row.experiment, row.family, row.num_devices) == (experiment, family, number)
        and row.method != planner_of(experiment)
        and row.step_s is not None
    ]


def _lead(rows: Rows, experiment: str, family: str, number: int) -> str:
    """How many times faster than the best baseline the planner's plan is."""
    ours = rows.get((experiment, family, number, planner_of(experiment)))
    others = _others(rows, experiment, family, number)
    if ours is None or ours.step_s is None or not others:
        return ""
    return f"{min(row.step_s for row in others) / ours.step_s:.3f}"


def behind(rows: Rows) -> list[str]:
    """Where a baseline is faster than the planner, in words."""
    found = []
    for row in sorted(rows.values(), key=order):
        if row.method != planner_of(row.experiment):
            continue
        for other in _others(rows, row.experiment, row.family, row.num_devices):
            if row.step_s is None or row.step_s > _BEHIND * other.step_s:
                own = "no plan" if row.step_s is None else seconds(row.step_s)
                found.append(
                    f"{_place(row)}: {row.method} takes {own}, {other.method} "
                    f"{seconds(other.step_s)} a step"
                )
    return found


def out_of_memory(rows: Rows, *, in_paper: bool, here: bool) -> list[str]:
    """Runs that the paper measured, by where memory was too little."""
    return [
        f"{_place(row)}: {row.method}"
        for row in sorted(rows.values(), key=order)
        if (rate := _measurement(row)) is not None
        and (rate == OUT_OF_MEMORY, row.step_s is None) == (in_paper, here)
    ]


def _measurement(row: Row) -> float | None:
    return MEASURED.get((row.experiment, row.family, row.method), {}).get(row.num_devices)


def _place(row: Row) -> str:
    return f"{_TITLES[row.family]}, {row.experiment}, {row.num_devices} GPUs"


def pictures(rows: Rows) -> dict[str, str]:
    """File name -> picture of a family end to end, as figure 7 of the paper."""
    found = {}
    for table in tables(rows):
        if table.experiment == END_TO_END:
            groups = [_bars(rows, table.family, int(number)) for number in table.head[1:]]
            title = f"{_TITLES[table.family]}: predicted (bars) and, in the paper, measured (lines)"
            found[f"paper-{table.family}.svg"] = bar_chart(
                title, "TFLOP/s per GPU", _COLOURS, groups, "V100s; x: out of memory"
            )
    return found


def _bars(rows: Rows, family: str, number: int) -> Bars:
    ours = {
        row.method: max(row.tflops, OUT_OF_MEMORY)
        for row in rows.values()
        if (row.experiment, row.family, row.num_devices) == (END_TO_END, family, number)
    }
    measured = {name: MEASURED.get((END_TO_END, family, name), {}).get(number) for name in ours}
    marks = {name: rate for name, rate in measured.items() if rate is not None}
    return Bars(label=str(number), values=ours, marks=marks)


_HEAD = """# The Alpa paper's experiments, predicted

    python -m launcher.bench paper

Written by this command. **Predicted** rows are what the simulator says of the best plan that was found, on
the paper's cluster (`cluster=8xp3`, a part of it for fewer GPUs); no GPU was there. **Measured** rows are the
paper's (OSDI 2022, figures 7 and 8, from the tables of its artifact); those with * its authors extended from
smaller batches. Rates are TFLOP/s per GPU, counted as the paper does: GPT's and MoE's with one forward pass
more, whether a plan recomputes or not. OOM: out of memory; predicted, that no plan fits. -: no data axis of
the method divides the paper's batch.

The methods are in `launcher/bench/paper_methods.py`. `manual` is every data x tensor x pipeline degree and
number of microbatches, with and without recomputation. The solver shards the ops inside these degrees, and
stages are cut where they balance, so it is an upper bound of what Megatron-LM can do, not Megatron-LM. Of
Wide-ResNet `pp-dp` and `inter-op` do not recompute, as in the paper; all other methods may. The
intra-operator experiment is one microbatch on one host, recomputing as the paper did.
"""


def page(rows: Rows, made_on: str) -> str:
    """The whole page, in Markdown."""
    parts = [_HEAD, f"{made_on}\n", _verdicts(rows)]
    for table in tables(rows):
        parts.append(f"## {table.title}\n\n{table.markdown()}\n")
        if table.experiment == END_TO_END:
            parts.append(f"![{table.title}](images/paper-{table.family}.svg)\n")
        if table.family == "moe" and table.experiment == END_TO_END:
            parts.append(_moe_speedups(rows))
        parts.append(_plans(rows, table))
    return "\n".join(parts)


def _verdicts(rows: Rows) -> str:
    lines = verdicts(rows)
    return "".join(f"- {line}\n" for line in lines)


def verdicts(rows: Rows) -> Sequence[str]:
    """What the table shows, a line each."""
    slower = behind(rows)
    agree = out_of_memory(rows, in_paper=True, here=True)
    differ = out_of_memory(rows, in_paper=True, here=False)
    only_here = out_of_memory(rows, in_paper=False, here=True)
    return [
        f"{len(slower)} of {_compared(rows)} baselines are faster than the planner's own plan",
        *(f"behind: {line}" for line in slower),
        f"of {len(agree) + len(differ)} runs that went out of memory in the paper, {len(agree)} have no "
        f"plan here",
        *(f"fits here, and not in the paper: {line}" for line in differ),
        *(f"no plan here, and measured in the paper: {line}" for line in only_here),
    ]


def _compared(rows: Rows) -> int:
    return sum(
        len(_others(rows, row.experiment, row.family, row.num_devices))
        for row in rows.values()
        if row.method == planner_of(row.experiment)
    )


def _moe_speedups(rows: Rows) -> str:
    """The only figures that the paper prints of MoE."""
    lines = []
    for number, measured in MOE_SPEEDUPS.items():
        ours = rows.get((END_TO_END, "moe", number, "auto"))
        deepspeed = rows.get((END_TO_END, "moe", number, "zero-2"))
        if ours is None or deepspeed is None or ours.step_s is None:
            continue
        predicted = (
            "ZeRO-2 finds no plan"
            if deepspeed.step_s is None
            else f"predicted over ZeRO-2: {deepspeed.step_s / ours.step_s:.1f}"
        )
        lines.append(f"{number} GPUs: Alpa over DeepSpeed, measured: {measured}; {predicted}.")
    return "\n".join([*lines, ""])


def _plans(rows: Rows, table: Table) -> str:
    lines = ["| GPUs | model | method | plan | step | planned in |", "|---|---|---|---|---|---|"]
    best: Iterable[Row] = sorted(
        (
            row
            for row in rows.values()
            if (row.experiment, row.family) == (table.experiment, table.family)
            and row.method in (planner_of(row.experiment), "manual")
        ),
        key=order,
    )
    for row in best:
        step = "-" if row.step_s is None else seconds(row.step_s)
        lines.append(
            f"| {row.num_devices} | {row.size} | {row.method} | {row.plan} | {step} | "
            f"{seconds(row.wall_s)}, {row.tried} tried |"
        )
    return "\n".join(lines) + "\n"
