"""What the solver picked, as a plan file writes it, and back.

A stage's `strategies` map a group of nodes ("layer0/op", "layer0/slot", ...) to one text per node. A text
says what every operand and result is along each mesh axis: `0,R>0|R,1>1` splits dim 0 of the first operand
and of the result on the first axis, and dim 1 of the second operand and of the result on the second.
Reading it back looks the text up among the choices that the node has, so a plan can only name what the
rules allow.
"""

import difflib
from collections import defaultdict
from collections.abc import Iterator, Mapping

from launcher.autopar.graphs.trace import Role
from launcher.autopar.intra_op.intra_op import IntraOpPlanner, StageSharding
from launcher.autopar.intra_op.stage_problem import Key, StageSettings
from launcher.autopar.intra_op.wiring import Place
from launcher.autopar.plans.plan import Stage
from launcher.autopar.sharding.rules import Strategy
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED, Spec, from_dims, to_dims
from launcher.autopar.text.wording import count
from launcher.errors import PlanError

_MOST_DIGITS = 10  # of a node's number
_ENTRY = {REPLICATED: "R", PARTIAL: "P"}


def _entries(entries) -> str:
    return ",".join(_ENTRY.get(entry, str(entry)) for entry in entries)


def choice_text(choice: Spec | Strategy) -> str:
    """Write one pick."""
    if isinstance(choice, Strategy):
        return "|".join(f"{_entries(a.operands)}>{_entries(a.results)}" for a in choice.axes)
    return _entries(choice)


def strategies_of(sharding: StageSharding) -> dict[str, tuple[str, ...]]:
    """All picks of a stage, by group; texts in the order of the nodes' numbers."""
    groups: dict[str, dict[int, str]] = defaultdict(dict)
    for (kind, name, index), choice in sharding.picks.items():
        groups[f"{name}/{kind}"][index] = choice_text(choice)
    return {
        group: tuple(f"{index}:{text}" for index, text in sorted(members.items()))
        for group, members in sorted(groups.items())
    }


def specs_as_dims(specs: Mapping[str, Spec], ranks: Mapping[str, int], axis_names):
    """Specs per path as plan files write them: per dim, None, an axis name, or several."""
    return {
        path: tuple(_dim(names) for names in to_dims(spec, ranks[path], axis_names))
        for path, spec in specs.items()
    }


def _dim(names):
    return None if not names else names[0] if len(names) == 1 else tuple(names)


def pins_of_stage(planner: IntraOpPlanner, stage: Stage, settings: StageSettings):
    """What a plan's stage fixes: its strategies, and the specs of its parameters where it has no more."""
    problem = planner.problem(*stage.layers, settings)
    pins: dict[Key, list] = {}
    for group, texts in stage.strategies.items():
        name, _, kind = group.rpartition("/")
        for text in texts:
            index, _, wanted = text.partition(":")
            if not (index.isascii() and index.isdecimal() and len(index) < _MOST_DIGITS):
                raise PlanError(
                    f"strategy '{text}' of {group} names no node (stages[].strategies): write it as "
                    f"number:choice, or drop the strategies, the solver completes them"
                )
            key = (kind, name, int(index))
            pins[key] = _matching(problem.choices.get(key), wanted, key, stage)
    _check_paths(planner, stage)
    for key, (path, spec) in _param_specs(planner, stage, settings).items():
        if key in problem.choices and key not in pins:
            if spec not in problem.choices[key]:
                raise PlanError(
                    f"{_entry(stage, path)}={list(stage.params[path])} is not possible on the mesh "
                    f"{dict(stage.mesh)}: an axis must divide the dim that it splits, and the data axis "
                    f"splits experts alone; drop the entry, the solver completes it"
                )
            pins[key] = [spec]
    return pins


def _check_paths(planner: IntraOpPlanner, stage: Stage) -> None:
    """Raise `PlanError` for a parameter that the stage has not, or that has other dims."""
    avals = planner.model.traced.graph.avals
    sources = planner.model.traced.inputs
    layers = planner.model.layers[stage.layers[0] : stage.layers[1]]
    read = [value for layer in layers for value in layer.inputs]
    ranks = {
        sources[value].path: len(avals[value].shape)
        for value in (*read, *planner.wiring(*stage.layers).unread)
        if value in sources and sources[value].role is Role.PARAM
    }
    for table, specs in (("params", stage.params), ("optimizer_state", stage.optimizer_state)):
        for path, dims in specs.items():
            _check_path(_entry(stage, path, table), path, len(dims), ranks)


def _check_path(entry: str, path: str, num_dims: int, ranks: Mapping[str, int]) -> None:
    if path not in ranks:
        near = difflib.get_close_matches(path, ranks, n=1)
        hint = f"did you mean '{near[0]}'? Correct or drop it" if near else "drop it"
        raise PlanError(f"{entry} is none of the {len(ranks)} parameters of those layers: {hint}")
    if num_dims != ranks[path]:
        raise PlanError(
            f"{entry} has {count(num_dims, 'entry')}, and the tensor has "
            f"{count(ranks[path], 'dim')}: write an entry per dim, null for one that is whole"
        )


def _entry(stage: Stage, path: str, table: str = "params") -> str:
    first, last = stage.layers
    return f"{table}['{path}'] of the stage of layers [{first}, {last}]"


def _matching(choices, wanted: str, key: Key, stage: Stage) -> list:
    found = [choice for choice in choices or () if choice_text(choice) == wanted]
    if not found and choices and key[0] == "accumulator":
        raise PlanError(
            f"{key[1]}/accumulator sums a gradient as '{wanted}', which zero={stage.zero} and "
            f"scatter={str(stage.scatter).lower()} do not (stages[].strategies): drop the strategies of the "
            f"stage of layers {list(stage.layers)}, the solver completes them"
        )
    if not found:
        raise PlanError(
            f"no strategy '{wanted}' for entry {key[2]} of {key[1]}/{key[0]} in the stage of layers "
            f"{list(stage.layers)} "
            f"(stages[].strategies): the plan was made for another model or version; drop the "
            f"strategies, the solver completes them"
        )
    return found


def _param_specs(
    planner: IntraOpPlanner, stage: Stage, settings: StageSettings
) -> dict[Key, tuple[str, Spec]]:
    """Slot key -> path and spec, for the parameters that the plan places."""
    found: dict[Key, tuple[str, Spec]] = {}
    for path, place in _param_places(planner, stage):
        if path not in stage.params:
            continue
        dims = [_names(dim) for dim in stage.params[path]]
        spec = from_dims(dims, settings.mesh.axis_names)
        first, expected = found.setdefault(("slot", *place), (path, spec))
        if spec != expected:
            raise PlanError(
                f"'{path}' must lie as '{first}' (stages[].params): layers of one kind share their sharding "
                f"within a stage; give both the same spec, or drop one"
            )
    return found


def _param_places(planner: IntraOpPlanner, stage: Stage) -> Iterator[tuple[str, Place]]:
    """Every parameter's path with the (class, slot) that stands for it."""
    aliases = planner.wiring(*stage.layers).aliases
    inputs = planner.model.traced.inputs
    for layer in planner.model.layers[stage.layers[0] : stage.layers[1]]:
        for slot, value in enumerate(layer.inputs):
            if layer.cls.slots[slot].role is Role.PARAM:
                place = (layer.cls.name, slot)
                yield inputs[value].path, aliases.get(place, place)


def _names(dim) -> tuple[str, ...]:
    if dim is None:
        return ()
    return (dim,) if isinstance(dim, str) else tuple(dim)
