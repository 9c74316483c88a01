"""Shapes and dtypes of everything that a stage's programs exchange."""

from dataclasses import dataclass

from launcher.autopar.graphs.trace import Role
from launcher.autopar.realized.emit import StageEmitter


@dataclass(frozen=True, slots=True, eq=False)
class StageAvals:
    """Shapes and dtypes of everything the layout names."""

    params: dict
    state: dict
    batch: dict
    values: dict
    kept: dict


def stage_avals(emitter: StageEmitter) -> StageAvals:
    model, layout = emitter.model, emitter.layout
    traced = model.traced
    of_path = {
        (source.role, source.path): traced.graph.avals[value]
        for value, source in traced.inputs.items()
    }

    def by_path(role) -> dict:
        return {path: aval for (r, path), aval in of_path.items() if r is role}

    crossing = (*layout.imports, *layout.exports, *layout.cotangents, *layout.returns)
    return StageAvals(
        params=by_path(Role.PARAM),
        state=by_path(Role.STATE),
        batch=by_path(Role.BATCH),
        values={value: traced.graph.avals[value] for value in crossing},
        kept={
            (index, value): model.layers[index].cls.joint.avals[value]
            for index, value in layout.kept
        },
    )
