"""Everything that training changes, as arrays by name, whatever plan holds it: to a checkpoint and back.

    params/PATH            a parameter
    state/PATH             a state variable, such as BatchNorm's statistics
    optimizer/0/mu/PATH    a leaf of optax's state, by its path in that tree
    loss_scale/scale       of a dynamic loss scale

Shapes are global, and stages are merged: each stage's optimizer state is optax's own tree over the
parameters that the stage owns. So a leaf that stands under a parameter's path is that of its owner, and all
others, such as step counts, are equal on all stages. Randomness has no array: it is the seed and the step.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np

from launcher.autopar.graphs.trace import Input, Role
from launcher.errors import ConfigError
from launcher.models.model import Model
from launcher.models.optimizer import Optimizer
from launcher.models.origin import Origin, origin_of
from launcher.runtime.checkpoints.checkpoint_manifest import ArrayEntry, Manifest
from launcher.runtime.checkpoints.weights import held_arrays
from launcher.runtime.compiled.stage_programs import StagePrograms
from launcher.runtime.compiled.update import LossScale
from launcher.runtime.steps.placing import put
from launcher.runtime.steps.stage_state import StageState

PARAMS, STATE, OPTIMIZER, LOSS_SCALE = "params", "state", "optimizer", "loss_scale"
_TOLD_AT_MOST = 3  # paths of each kind of difference


def device_arrays(owner: Mapping[str, int], stages: Sequence[StageState]) -> dict[str, jax.Array]:
    """All of it that these stages have, where it lies, until the next step takes it."""
    states = {path for stage in stages for path in stage.state}
    found = {
        f"{STATE if path in states else PARAMS}/{path}": array
        for path, array in held_arrays(owner, {stage.index: stage for stage in stages}).items()
    }
    for stage in stages:
        named = _named_leaves(stage.optimizer_state)
        found |= {name: leaf for name, leaf in named if name not in found}
    scale = next(iter(stages)).loss_scale
    if scale is not None:
        found |= {f"{LOSS_SCALE}/{name}": leaf for name, leaf in scale._asdict().items()}
    return found


def _named_leaves(optimizer_state) -> list[tuple[str, jax.Array]]:
    leaves, _ = jax.tree.flatten_with_path(optimizer_state)
    return [(_name(path), leaf) for path, leaf in leaves]


def _name(path: Sequence) -> str:
    parts = []
    for key in path:
        match key:
            case jax.tree_util.SequenceKey(idx=index):
                parts.append(str(index))
            case jax.tree_util.GetAttrKey(name=name):
                parts.append(name)
            case jax.tree_util.DictKey(key=name) | jax.tree_util.FlattenedIndexKey(key=name):
                parts.append(str(name))
    return "/".join((OPTIMIZER, *parts))


# Back from a checkpoint


def values(arrays: Mapping[str, np.ndarray], model: Model) -> Iterator[tuple[Input, np.ndarray]]:
    """Yield the parameters and state variables of a model that the arrays were checked for."""
    for path in model.abstract_params:
        yield Input(Role.PARAM, path), arrays[f"{PARAMS}/{path}"]
    for path in model.abstract_state:
        yield Input(Role.STATE, path), arrays[f"{STATE}/{path}"]


def place_optimizer(arrays: Mapping[str, np.ndarray], programs: StagePrograms):
    """Bring a stage's part of the optimizer state where the stage's plan wants it."""
    leaves, structure = jax.tree.flatten_with_path(programs.abstract_optimizer_state())
    placed = [put(arrays[_name(path)], leaf.sharding) for path, leaf in leaves]
    return jax.tree.unflatten(structure, placed)


def restored_loss_scale(
    arrays: Mapping[str, np.ndarray], first: LossScale | None
) -> LossScale | None:
    """The loss scale to go on with: a run that scales now, and did not before, begins with the first."""
    names = [f"{LOSS_SCALE}/{name}" for name in LossScale._fields]
    if first is None or not all(name in arrays for name in names):
        return first
    return LossScale(*(arrays[name] for name in names))


def check_arrays(manifest: Manifest, where: str, model: Model, optimizer: Optimizer | None) -> None:
    """Raise ConfigError for a checkpoint of another model, or, if that is given, another optimizer.

    The message goes path by path. The loss scale may come and go: it follows from the dtype.
    """
    wanted = {f"{PARAMS}/{path}": aval for path, aval in model.abstract_params.items()}
    wanted |= {f"{STATE}/{path}": aval for path, aval in model.abstract_state.items()}
    if optimizer is not None:
        state = jax.eval_shape(optimizer.transform.init, dict(model.abstract_params))
        wanted |= dict(_named_leaves(state))
    groups = (PARAMS, STATE) if optimizer is None else (PARAMS, STATE, OPTIMIZER)
    found = {n: e for n, e in manifest.arrays.items() if n.partition("/")[0] in groups}
    here = {n: _described(aval) for n, aval in wanted.items()}
    lacking, spare = sorted(here.keys() - found.keys()), sorted(found.keys() - here.keys())
    other = [
        f"{name} ({_without_checksum(found[name])} there, {text} here)"
        for name, text in sorted(here.items())
        if name in found and _without_checksum(found[name]) != text
    ]
    parts = [
        f"{what} {len(paths)}: {_few(paths)}"
        for what, paths in (("lacks", lacking), ("has besides", spare), ("has otherwise", other))
        if paths
    ]
    if parts:
        raise ConfigError(_mismatch(manifest, where, model, "; ".join(parts), [*lacking, *spare]))


def _mismatch(manifest: Manifest, where: str, model: Model, parts: str, names: list[str]) -> str:
    entry = manifest.run.model
    # The others are kept in the same dtype.
    is_dtype = "fp64" in (entry.dtype, model.dtype) and entry.dtype != model.dtype
    there = Origin(name=entry.name, size=entry.size, overrides=entry.overrides)
    keys = replace(there, dtype=entry.dtype if is_dtype else None).keys_instead_of(model)
    cure = f"give {keys}"
    is_optimizer = bool(names) and all(name.startswith(f"{OPTIMIZER}/") for name in names)
    if is_optimizer:
        name = manifest.run.config["optimizer"]["name"]
        cure = f"give optimizer={name}, or take the weights alone with resume_weights_only=true"
    return f"the checkpoint {where} of {there} does not fit {origin_of(model)}: it {parts}: {cure}"


def _described(aval) -> str:
    return f"{np.dtype(aval.dtype).name}[{','.join(map(str, aval.shape))}]"


def _without_checksum(entry: ArrayEntry) -> str:
    return f"{entry.dtype}[{','.join(map(str, entry.shape))}]"


def _few(paths: Sequence[str]) -> str:
    more = "" if len(paths) <= _TOLD_AT_MOST else ", ..."
    return ", ".join(paths[:_TOLD_AT_MOST]) + more
