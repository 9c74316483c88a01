"""plan.json: a `Plan` as a file that people read, diff and write by hand. See docs/plan-file.md.

Reading is strict: a key that nobody knows, a wrong type, NaN or a key given twice is a `PlanError`
that names the place and the cure. Writing is stable: the same plan gives the same bytes, with one
line per parameter, and a reader never meets half a file.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import NoReturn, TypeVar

from launcher.autopar.clusters.hosts import ClusterRef, GroupRef
from launcher.autopar.plans.plan import (
    AXIS_NAMES,
    PLAN_VERSION,
    DimSpec,
    ModelRef,
    Plan,
    Prediction,
    RunnerUp,
    SearchStats,
    SpecList,
    Stage,
)
from launcher.autopar.text.atomic_file import write_atomically
from launcher.autopar.text.strict_reader import Node
from launcher.errors import PlanError
from launcher.limits import CHOICES, RANGES
from launcher.regular_file import read_regular

LARGEST_FILE_BYTES = 64 * 2**20
_LINE = 96  # a list or a flat object that is no longer stands on one line

T = TypeVar("T")


def read_plan(path: Path, key: str = "parallel.path") -> Plan:
    """Read a plan file; `key` is the one that named it, for messages."""
    given = f"{key}={path}"
    try:
        data = read_regular(path, LARGEST_FILE_BYTES)
    except FileNotFoundError as error:
        raise PlanError(
            f"there is no plan file {path} ({given}): give the path of the plan.json that a run wrote"
        ) from error
    except OSError as error:
        raise PlanError(
            f"cannot read the plan, {error.strerror} ({given}): correct the path"
        ) from error
    if data is None:
        raise PlanError(
            f"the plan has more than {LARGEST_FILE_BYTES} bytes ({given}): give the path of a "
            "plan.json; it may leave out `strategies`, the largest part"
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise PlanError(f"the plan is no UTF-8 text, {error} ({given}): save it as such") from error
    return from_json(text, source=str(path))


@contextlib.contextmanager
def errors_of(path: Path | str | None, key: str = "parallel.path") -> Iterator[None]:
    """Name the file in what is found to be wrong with its plan later on, if it is one of the user's."""
    try:
        yield
    except PlanError as error:
        if path is None:
            raise
        raise PlanError(f"{key}={path}: {error}") from error


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan file: the new one appears whole, or the old one stays."""
    write_atomically(path, to_json(plan))


def to_json(plan: Plan) -> str:
    """Write a plan as JSON with a stable layout."""
    tree = asdict(plan)
    if not plan.cluster.groups:  # as it has always been written
        del tree["cluster"]["groups"]
    for stage in tree["stages"]:
        stage["layers"] = stage["layers"] or None
        for key in ("scatter", "overlap"):  # likewise
            if not stage[key]:
                del stage[key]
        stage["mesh"] = dict(stage["mesh"]) or None
    return _layout(tree, "") + "\n"


def from_json(text: str, source: str = "plan") -> Plan:
    """Read a plan from JSON; `source` names it in messages."""

    def fail(problem: str, cure: str) -> NoReturn:
        raise PlanError(f"{source}: {problem}: {cure}")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            fail(f"the key {ascii(twice)} stands there twice", "drop one")
        return found

    def constant(name: str) -> NoReturn:
        fail(f"{name} is no number of JSON", "write a finite number, or null")

    try:
        tree = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        fail(f"this is no JSON, {error}", "correct it there")
    return _plan(Node(value=tree, place="", source=source, error=PlanError))


def _plan(top: Node) -> Plan:
    version = top.entries().get("version")
    if version is None:
        top.child("version", None).fail("is missing", f"add it, this launcher reads {PLAN_VERSION}")
    if version.integer(0) != PLAN_VERSION:  # before its keys are found unknown
        version.fail(
            f"is not {PLAN_VERSION}, the one that this launcher reads",
            "plan again, or take the launcher that wrote the plan",
        )
    found = top.fields(
        (
            "version", "model", "cluster", "global_batch", "num_microbatches", "schedule", "stages",
        ),
        ("virtual_stages", "num_layers", "predicted", "search", "runners_up"),
    )  # fmt: skip
    stages = tuple(_stage(node) for node in found["stages"].items())
    covered = stages[-1].layers[1] if stages and stages[-1].layers else None
    return Plan(
        version=PLAN_VERSION,
        model=_model(found["model"]),
        cluster=_cluster(found["cluster"]),
        global_batch=found["global_batch"].integer(1, _most("train.global_batch")),
        num_microbatches=found["num_microbatches"].integer(1, _most("parallel.num_microbatches")),
        schedule=found["schedule"].text(),
        virtual_stages=_optional(found["virtual_stages"], lambda node: node.integer(1), 1),
        num_layers=_optional(found["num_layers"], lambda node: node.integer(1), covered),
        stages=stages,
        predicted=_optional(found["predicted"], _prediction, None),
        search=_optional(found["search"], _search, None),
        runners_up=_optional(
            found["runners_up"], lambda node: tuple(_runner_up(item) for item in node.items()), ()
        ),
    )


def _most(key: str) -> int:
    """The largest value that the config takes for what the plan has too."""
    return RANGES[key][1] - 1


def _optional(node: Node, read: Callable[[Node], T], default: T) -> T:
    return default if node.is_null else read(node)


def _model(node: Node) -> ModelRef:
    found = node.fields(("name", "size"), ("fingerprint", "dtype", "attention", "loss_chunks"))
    return ModelRef(
        name=found["name"].text(),
        size=found["size"].text(),
        fingerprint=_optional(found["fingerprint"], Node.text, None),
        dtype=_optional(found["dtype"], _dtype, None),
        attention=_optional(found["attention"], _attention, None),
        loss_chunks=_optional(found["loss_chunks"], lambda node: node.integer(1), None),
    )


def _dtype(node: Node) -> str:
    return node.text([name for name in CHOICES["model.dtype"] if name != "auto"])


def _attention(node: Node) -> str:
    return node.text([name for name in CHOICES["model.attention"] if name != "auto"])


def _cluster(node: Node) -> ClusterRef:
    found = node.fields(("name", "hosts", "devices_per_host"), ("groups",))
    return ClusterRef(
        name=found["name"].text(),
        hosts=found["hosts"].integer(1),
        devices_per_host=found["devices_per_host"].integer(1),
        groups=_optional(
            found["groups"], lambda node: tuple(_group(item) for item in node.items()), ()
        ),
    )


def _group(node: Node) -> GroupRef:
    found = node.fields(("hosts", "devices_per_host", "device"))
    return GroupRef(
        hosts=found["hosts"].integer(1),
        devices_per_host=found["devices_per_host"].integer(1),
        device=found["device"].text(),
    )


def _stage(node: Node) -> Stage:
    found = node.fields(
        ("hosts", "devices"),
        (
            "layers",
            "mesh",
            "recompute",
            "zero",
            "scatter",
            "overlap",
            "params",
            "optimizer_state",
            "strategies",
        ),
    )
    return Stage(
        layers=_optional(found["layers"], _layers, ()),
        hosts=_integers(found["hosts"]),
        devices=_integers(found["devices"]),
        mesh=_optional(found["mesh"], _mesh, ()),
        recompute=_optional(found["recompute"], Node.text, "none"),
        zero=_optional(found["zero"], lambda zero: zero.integer(0), 0),
        scatter=_optional(found["scatter"], Node.boolean, False),
        overlap=_optional(found["overlap"], Node.boolean, False),
        params=_optional(found["params"], _specs, {}),
        optimizer_state=_optional(found["optimizer_state"], _specs, {}),
        strategies=_optional(found["strategies"], _strategies, {}),
    )


def _layers(node: Node) -> tuple[int, ...]:
    layers = _integers(node)
    if len(layers) != 2:
        node.fail("is no pair", "write [first, last + 1]")
    return layers


def _integers(node: Node) -> tuple[int, ...]:
    return tuple(item.integer(0) for item in node.items())


def _mesh(node: Node) -> tuple[tuple[str, int], ...]:
    """In the order of the axes, whatever the file's; an axis that is left out has length 1."""
    lengths = node.fields((), AXIS_NAMES)
    return tuple(
        (name, _optional(lengths[name], lambda length: length.integer(1), 1)) for name in AXIS_NAMES
    )


def _specs(node: Node) -> dict[str, SpecList]:
    return {
        path: tuple(_dim(item) for item in spec.items()) for path, spec in node.entries().items()
    }


def _dim(node: Node) -> DimSpec:
    if isinstance(node.value, list):
        return tuple(item.text() for item in node.items())
    return _optional(node, Node.text, None)


def _strategies(node: Node) -> dict[str, tuple[str, ...]]:
    return {
        group: tuple(item.text() for item in texts.items())
        for group, texts in node.entries().items()
    }


def _prediction(node: Node) -> Prediction:
    found = node.fields([field.name for field in fields(Prediction)])
    per_stage = {
        name: tuple(item.number() for item in found[name].items())
        for name in (
            "peak_bytes_per_device", "stage_forward_s", "stage_backward_s", "stage_sync_s",
            "stage_update_s",
        )
    }  # fmt: skip
    return Prediction(
        step_s=found["step_s"].number(),
        bubble_fraction=found["bubble_fraction"].number(maximum=1.0),
        tflops_per_device=found["tflops_per_device"].number(),
        tflops_convention=found["tflops_convention"].text(),
        communicated_bytes=found["communicated_bytes"].number(),
        **per_stage,
    )


def _search(node: Node) -> SearchStats:
    found = node.fields(("wall_s", "ilp_solved", "candidates"), ("optimality_gap", "space"))
    return SearchStats(
        wall_s=found["wall_s"].number(),
        ilp_solved=found["ilp_solved"].integer(0),
        candidates=found["candidates"].integer(0),
        optimality_gap=_optional(found["optimality_gap"], Node.number, None),
        space=_optional(found["space"], Node.text, None),
    )


def _runner_up(node: Node) -> RunnerUp:
    found = node.fields(("description", "step_s", "why"))
    return RunnerUp(
        description=found["description"].text(),
        step_s=found["step_s"].number(),
        why=found["why"].text(),
    )


def _layout(value: object, indent: str) -> str:
    """JSON with short lists and flat objects on one line, and one member per line in the others."""
    flat = json.dumps(value, allow_nan=False)
    is_object = isinstance(value, dict)
    if not isinstance(value, dict | list | tuple) or not value:
        return flat
    is_nested = is_object and any(
        isinstance(member, dict | list | tuple) for member in value.values()
    )
    if len(flat) <= _LINE and not is_nested:
        return flat
    inner = indent + "  "
    if is_object:
        members = [f"{json.dumps(key)}: {_layout(item, inner)}" for key, item in value.items()]
    else:
        members = [_layout(item, inner) for item in value]
    body = ",\n".join(inner + member for member in members)
    start, end = "{}" if is_object else "[]"
    return f"{start}\n{body}\n{indent}{end}"
