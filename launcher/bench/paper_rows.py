"""A method on a case: its best plan, as a row of the table; and rows in a file, so that a run can go on."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import make_plan
from launcher.autopar.plans.plan import Plan, Stage
from launcher.autopar.text.atomic_file import write_atomically
from launcher.autopar.text.wording import count
from launcher.bench.paper_cases import Case
from launcher.bench.paper_figures import NOT_SHARED, OUT_OF_MEMORY
from launcher.bench.paper_methods import Choices, points_of
from launcher.errors import ConfigError, InfeasiblePlanError
from launcher.models.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The best plan of a method.

    Attributes:
        size: Of the model, in words.
        step_s: None where there is no plan.
        tflops: Per device, as the paper counts operations; `OUT_OF_MEMORY` where nothing fits, `NOT_SHARED`
            where the batch cannot be shared out.
        plan: In words; where there is none, why.
        tried: How many choices were planned for.
        wall_s: What that took.
    """

    experiment: str
    family: str
    num_devices: int
    method: str
    size: str
    step_s: float | None
    tflops: float
    plan: str
    tried: int
    wall_s: float

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.experiment, self.family, self.num_devices, self.method


@dataclass(frozen=True, slots=True)
class _Priced:
    """What came of a point: a plan, or the reason why there is none."""

    plan: Plan | None
    why: str
    no_rate: float = OUT_OF_MEMORY  # without a plan


_TOO_LARGE = _Priced(None, "its share of weights and state is more than a device has")


class Planner:
    """Plans for the methods of a case; what two methods share is planned once."""

    def __init__(self, case: Case):
        self._case, self._cluster = case, case.cluster()
        self._model: Model = case.model()
        self._priced: dict[tuple, _Priced] = {}

    def row(self, method: str) -> Row:
        """The best of all that a method tries."""
        began_s = time.perf_counter()
        tried = [found for group in points_of(self._case, method) for found in self._walk(group)]
        plans = [found.plan for found in tried if found.plan is not None]
        best = min(plans, key=lambda plan: plan.predicted.step_s, default=None)
        # Of several reasons for no plan, memory is the one that the paper gives.
        none = max(tried, key=lambda found: found.no_rate, default=_TOO_LARGE)
        case = self._case
        return Row(
            experiment=case.experiment,
            family=case.family,
            num_devices=case.num_devices,
            method=method,
            size=case.size,
            step_s=None if best is None else best.predicted.step_s,
            tflops=none.no_rate if best is None else self._tflops(best),
            plan=none.why if best is None else describe(best),
            tried=len(tried),
            wall_s=time.perf_counter() - began_s,
        )

    def _walk(self, group: Iterable[Choices]) -> Iterable[_Priced]:
        for choices in group:
            found = self._price(choices)
            yield found
            if found.plan is None:
                return

    def _price(self, choices: Choices) -> _Priced:
        key = tuple(sorted(choices.items()))
        if key not in self._priced:
            case = self._case
            options = PlanOptions(
                global_batch=case.global_batch, optimizer=case.optimizer, **choices
            )
            try:
                plan = make_plan(self._model, self._cluster, options)
                self._priced[key] = _Priced(plan, "")
            except InfeasiblePlanError as error:
                self._priced[key] = _Priced(None, str(error))
            except ConfigError as error:
                self._priced[key] = _Priced(None, str(error), NOT_SHARED)
        return self._priced[key]

    def _tflops(self, plan: Plan) -> float:
        predicted, devices = plan.predicted, self._case.num_devices
        ours = predicted.tflops_per_device * 1e12 * predicted.step_s * devices
        return self._case.paper_flops(ours) / predicted.step_s / devices / 1e12


def describe(plan: Plan) -> str:
    """A plan in a line: schedule, microbatches, and the stages of equal kind that follow one another."""
    runs = [(kind, len(list(run))) for kind, run in groupby(map(_kind, plan.stages))]
    stages = " + ".join(f"{number} x ({kind})" if number > 1 else kind for kind, number in runs)
    virtual = f" on {plan.num_submeshes} submeshes" if plan.virtual_stages > 1 else ""
    return f"{plan.schedule}, {count(plan.num_microbatches, 'microbatch')}: {stages}{virtual}"


def _kind(stage: Stage) -> str:
    shape = " x ".join(str(length) for _, length in stage.mesh)
    zero = f", ZeRO-{stage.zero}" if stage.zero else ""
    zero += " scattering" if stage.scatter else ""
    again = "" if stage.recompute == "none" else f", recomputes {stage.recompute}"
    return f"{shape}{zero}{again}"


Rows = Mapping[tuple, Row]


def read_rows(path: Path) -> dict[tuple, Row]:
    """The rows of a file; none if it is not there."""
    if not path.exists():
        return {}
    try:
        rows = [Row(**fields) for fields in json.loads(path.read_text())["rows"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"out={path.parent} has a {path.name} that is none of ours ({error}): remove it, or set "
            f"another out="
        ) from None
    return {row.key: row for row in rows}


def write_rows(path: Path, rows: Rows, order: Callable[[Row], tuple]) -> None:
    """Write rows, a line each."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in sorted(rows.values(), key=order))
    write_atomically(path, f'{{"rows": [\n{lines}\n]}}\n')
