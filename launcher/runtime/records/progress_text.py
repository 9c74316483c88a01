"""The words of a run's progress: one row as a line of text, and the lines that stand at its end.

Pure functions from rows to text, the same for a terminal and for a log.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from launcher.autopar.text.wording import count, size
from launcher.runtime.records.metrics import (
    EVAL_LOSS,
    LOSS_SCALE,
    WARM_UP_STEPS,
    Meter,
    Row,
    TrainSummary,
    is_evaluation,
    is_skipped,
)

# In the order in which they are listed at the end; those that were not written are left out.
FILES_OF_A_RUN = (
    "config.yaml",
    "plan.json",
    "plan.html",
    "plan.png",
    "trace.html",
    "trace.json",
    "profile",
    "metrics.jsonl",
    "summary.json",
    "weights.safetensors",
    "sample.txt",
    "checkpoints",
    "wandb",
    "launcher.log",
)
_MOST_STAGES = 8  # whose memory has a place in one line
_SI_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def describe_row(row: Row, meter: Meter, steps: int) -> str:
    """Write a row as one line, which fits a terminal of 80 columns."""
    head = f"step {row['step']:>{len(str(steps))}}/{steps}"
    if is_evaluation(row):
        return f"{head}  eval_loss {loss_text(row[EVAL_LOSS])}"
    return f"{head}  {describe_numbers(row, meter)}"


def describe_pace(row: Row, eta_s: float | None) -> str:
    """Write what a step took and what the rest will: `402 ms per step  ETA 4 min 05 s`."""
    pace = f"{duration(row['step_s'])} per step"
    return pace if eta_s is None else f"{pace}  ETA {duration(eta_s)}"


def describe_numbers(row: Row, meter: Meter) -> str:
    """Write loss and speed: `loss 2.3145  12.3k tokens/s  0.52 TFLOP/s/device  MFU 41.2 %`."""
    if is_skipped(row):
        return f"skipped: the gradients overflowed; loss scale {row[LOSS_SCALE]:g} from now on"
    return f"loss {loss_text(row['loss'])}  {describe_speed(row, meter)}"


def loss_text(value: float | None) -> str:
    """Write a loss: `2.3145`, far from 1 `1.235e+12`; of a row that has null, `not finite`."""
    if value is None or not math.isfinite(value):
        return "not finite"
    is_near_one = value == 0 or 1e-3 <= abs(value) < 1e5
    return format(value, ".4f" if is_near_one else ".4g")


def describe_speed(row: Row, meter: Meter) -> str:
    """Write throughput, TFLOP/s per device and MFU of a training row or of a summary."""
    mfu = row["mfu"]
    parts = (
        f"{rate(row[meter.throughput_key])} {meter.sample_unit}/s",
        f"{_number(row['tflops_per_device'], '.3g')} TFLOP/s/device",
        "MFU ?" if mfu is None else f"MFU {100 * mfu:.1f} %",
    )
    return "  ".join(parts)


def final_lines(summary: TrainSummary, meter: Meter, run_dir: Path) -> tuple[str, ...]:
    """Write how a run ended, how fast it was, what the plan had promised, and the files."""
    if summary.loss is None and summary.eval_loss is not None:  # there was nothing to train
        done = f"evaluated after {count(summary.steps, 'step')}, in {duration(summary.wall_s)}"
        head = f"{summary.status}: {done}, eval_loss {loss_text(summary.eval_loss)}"
        return (head, *_describe_files(run_dir))
    planned = count(summary.planned_steps, "step")
    head = f"{summary.status}: {summary.steps} of {planned} in {duration(summary.wall_s)}"
    if summary.loss is not None:
        head += f", loss {loss_text(summary.loss)} (best {loss_text(summary.best_loss)})"
    if summary.eval_loss is not None:
        head += f", eval_loss {loss_text(summary.eval_loss)}"
    if summary.skipped_steps:
        head += f", {count(summary.skipped_steps, 'step')} skipped, as gradients were not finite"
    lines = [
        head,
        f"speed: {describe_speed(summary.measured, meter)}",
        _describe_promise(summary, meter),
        *_describe_memory(summary, meter),
    ]
    if meter.peak_flops_per_s is None and meter.incomparable is None:
        lines.insert(2, "MFU is not known: the cluster gives no peak FLOP/s for its devices")
    return (*lines, *_describe_files(run_dir))


def duration(seconds: float | None) -> str:
    """Write a time for people: `85.0 ms`, `3.21 s`, `4 min 05 s`, `2 h 03 min`."""
    if seconds is None:
        return "?"
    if seconds < 0.9995:
        return f"{_three_digits(1000 * seconds)} ms"
    if seconds < 59.95:
        return f"{_three_digits(seconds)} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def rate(value: float | None) -> str:
    """Write a number with a prefix: `950`, `12.3k`, `1.23M`."""
    if value is None:
        return "?"
    for least, prefix in _SI_PREFIXES:
        # From 999.5 on, three digits would round up into the next prefix.
        if value >= 0.9995 * least:
            return f"{_three_digits(value / least)}{prefix}"
    return _three_digits(value)


def _describe_promise(summary: TrainSummary, meter: Meter) -> str:
    line = f"step time: {_describe_median(summary)}"
    if summary.predicted_step_s is None:
        return f"{line}, no prediction"
    line += f", {duration(summary.predicted_step_s)} predicted"
    if meter.incomparable is not None:
        return f"{line}; not to be compared, and no MFU: {meter.incomparable}"
    ratio = summary.measured_over_predicted
    return line if ratio is None else f"{line} (measured / predicted = {ratio:.2f})"


def _describe_memory(summary: TrainSummary, meter: Meter) -> Iterator[str]:
    """Write the high-water mark of each stage's devices, and what the plan had said."""
    predicted = meter.predicted_peak_bytes_per_stage
    measured = summary.measured.get("peak_bytes_per_stage")
    if measured is None:
        if predicted:
            what = f"at most {size(max(predicted))} predicted"
            yield f"memory per device: {what}; these devices do not count what they use"
        return
    stages = [
        f"stage {stage} {size(used)} measured, {size(told)} predicted "
        f"(measured / predicted = {used / told:.2f})"
        for stage, (used, told) in enumerate(zip(measured, predicted, strict=True))
    ]
    rest = len(stages) - _MOST_STAGES
    more = f"; the other {rest} in summary.json" if rest > 0 else ""
    yield f"memory per device: {'; '.join(stages[:_MOST_STAGES])}{more}"


def _describe_median(summary: TrainSummary) -> str:
    measured_s = summary.measured["step_s"]
    if measured_s is None and summary.loss is not None:
        return "none measured (all steps were traced or profiled, or came right after)"
    if measured_s is None:
        return "none measured"
    of = "one step, with its warm-up"
    if summary.timed_steps:
        steps = count(summary.timed_steps, "step")
        of = f"median of {steps}, without the first {WARM_UP_STEPS}"
    return f"{duration(measured_s)} measured ({of})"


def _describe_files(run_dir: Path) -> tuple[str, ...]:
    written = tuple(run_dir / name for name in FILES_OF_A_RUN if (run_dir / name).exists())
    if not written:
        return ()
    return ("written:", *(f"  {_shortest(path)}{'/' * path.is_dir()}" for path in written))


def _shortest(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def _three_digits(value: float) -> str:
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}"
