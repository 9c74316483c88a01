"""`python -m launcher.bench paper`: the Alpa paper's experiments, predicted, beside what the paper measured.

GPT, MoE and Wide-ResNet on 1 to 64 V100s, planned by the planner and by the paper's baselines
(`paper_methods`), and the paper's intra-operator experiment. Prints the tables, and writes the page, its
pictures and the rows as JSON. A row that is planned anew takes the place of the old one in the file; the
page shows all rows that there are. All of it takes hours; rows are written as they come.

    experiments  which, of end-to-end,intra-op
    families     which, of gpt,moe,wrn
    gpus         which, of 1,2,4,8,16,32,64
    methods      which; all that an experiment has, if left out
    resume       true keeps the rows that are there, and plans what is missing
    out          the folder of paper.md, paper.json and images/; default: docs
"""

import datetime
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.autopar.text.atomic_file import write_atomically
from launcher.bench.paper_cases import DEVICES, FAMILIES, Case, find_cases
from launcher.bench.paper_methods import METHODS, methods_of
from launcher.bench.paper_page import (
    EXPERIMENTS,
    behind,
    order,
    out_of_memory,
    page,
    pictures,
    tables,
    verdicts,
)
from launcher.bench.paper_rows import Planner, Rows, read_rows, write_rows
from launcher.bench.settings import check_keys, chosen

_KEYS = ("experiments", "families", "gpus", "methods", "resume", "out")


def run(settings: Mapping[str, str]) -> int:
    """Plan, print and write; status 1 if a baseline is ahead, or one fits that did not in the paper."""
    check_keys("paper", settings, _KEYS)
    resume = chosen({"resume": "false", **settings}, "resume", ("true", "false")) == ["true"]
    out = Path(settings.get("out", "docs"))
    wanted = list(_wanted(settings))
    rows = read_rows(out / "paper.json")
    (out / "images").mkdir(parents=True, exist_ok=True)
    for case, methods in wanted:
        keys = {m: (case.experiment, case.family, case.num_devices, m) for m in methods}
        missing = [m for m in methods if not (resume and keys[m] in rows)]
        planner = Planner(case) if missing else None
        for method in missing:
            row = planner.row(method)
            rows[row.key] = row
            rate = "no plan" if row.step_s is None else f"{row.tflops:.2f} TFLOP/s"
            sys.stderr.write(
                f"{case.family} on {case.num_devices} ({case.experiment}), {method}: "
                f"{rate}, {row.plan}; {row.tried} planned in {row.wall_s:.0f} s\n"
            )
            write_rows(out / "paper.json", rows, order)
    _write(out, rows)
    return _report(rows)


def _wanted(settings: Mapping[str, str]) -> Iterator[tuple[Case, list[str]]]:
    """The cases that the settings ask for, and the methods of each."""
    experiments = chosen(settings, "experiments", EXPERIMENTS)
    families = chosen(settings, "families", FAMILIES)
    numbers = chosen(settings, "gpus", map(str, DEVICES))
    methods = chosen(settings, "methods", METHODS)
    for experiment, family in itertools.product(experiments, families):
        own = [method for method in methods_of(experiment, family) if method in methods]
        for case in find_cases(experiment, family):
            if str(case.num_devices) in numbers:
                yield case, own


def _write(out: Path, rows: Rows) -> None:
    today = datetime.date.today().isoformat()
    made_on = f"Written on {today}, on a machine with {os.cpu_count()} CPU cores."
    write_atomically(out / "paper.md", page(rows, made_on))
    for name, picture in pictures(rows).items():
        write_atomically(out / "images" / name, picture)


def _report(rows: Rows) -> int:
    for table in tables(rows):
        sys.stdout.write(f"{table.text()}\n\n")
    for line in verdicts(rows):
        sys.stdout.write(f"{line}\n")
    return int(bool(behind(rows) or out_of_memory(rows, in_paper=True, here=False)))
