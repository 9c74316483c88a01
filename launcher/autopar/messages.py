"""What the messages of a step carry, and how: the crossing of every value that goes between stages.

The planner prices these crossings and the runtime's transport executes them.
"""

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np

from launcher.autopar.cluster import Cluster
from launcher.autopar.crossing import Crossing, Located, message_s, plan_crossing, total_bytes
from launcher.autopar.param_costs import gradient_spec
from launcher.autopar.realize import RealizedPlan, RealizedStage
from launcher.autopar.spec import Spec, replicated

Edge = tuple[int, int]
Carried = Mapping[Hashable, Crossing]


@dataclass(frozen=True, slots=True, eq=False)
class Messages:
    """(from stage, to stage) -> what a message between them carries.

    Activations and cotangents go once per microbatch, by the value's number; what belongs to parameters
    that several stages read goes once per step, by path.
    """

    activations: Mapping[Edge, Carried]
    cotangents: Mapping[Edge, Carried]
    tied_gradients: Mapping[Edge, Carried]
    tied_parameters: Mapping[Edge, Carried]

    def bytes_per_step(self, num_microbatches: int) -> int:
        """Bytes that devices send one another, but for the norms."""
        often = (*self.activations.values(), *self.cotangents.values())
        once = (*self.tied_gradients.values(), *self.tied_parameters.values())
        return num_microbatches * _bytes(often) + _bytes(once)


@dataclass(frozen=True, slots=True)
class MessageSeconds:
    """How long messages take, by (from stage, to stage); `tied_s` is for gradients and parameters."""

    activation_s: Mapping[Edge, float]
    cotangent_s: Mapping[Edge, float]
    tied_s: Mapping[Edge, float]


def price_messages(messages: Messages, realized: RealizedPlan, cluster: Cluster) -> MessageSeconds:
    """Price all messages on a cluster."""

    def seconds(carried: Mapping[Edge, Carried]) -> dict[Edge, float]:
        return {
            (source, target): message_s(
                values.values(), cluster, realized.stages[target].settings.mesh
            )
            for (source, target), values in carried.items()
        }

    tied: Counter[Edge] = Counter()
    for carried in (messages.tied_gradients, messages.tied_parameters):
        tied.update(seconds(carried))
    return MessageSeconds(seconds(messages.activations), seconds(messages.cotangents), dict(tied))


def _bytes(carried) -> int:
    return sum(total_bytes(values.values()) for values in carried)


def messages_of(realized: RealizedPlan) -> Messages:
    """Plan the crossings of all messages of a plan, but the norms: see `scalar_crossing`."""
    stages, avals = realized.stages, realized.planner.model.traced.graph.avals

    def carried(values, source: int, made: Mapping, target: int, read: Mapping) -> Carried:
        return {
            value: _cross(
                avals[value],
                _held(stages[source], made[value]),
                _held(stages[target], read[value]),
            )
            for value in values
        }

    activations = {
        (i, k): carried(values, i, stages[i].layout.exports, k, stages[k].layout.imports)
        for (i, k), values in realized.sent.items()
    }
    cotangents = {
        (k, i): carried(values, k, stages[k].layout.returns, i, stages[i].layout.cotangents)
        for (i, k), values in realized.returned.items()
    }
    gradients, parameters = _tied(realized)
    return Messages(activations, cotangents, gradients, parameters)


def scalar_crossing(realized: RealizedPlan, source: int, target: int, dtype: np.dtype) -> Crossing:
    """A number that every device of a stage has, such as its norm, sent to all devices of another."""
    ends = [realized.stages[stage] for stage in (source, target)]
    whole = [_held(end, replicated(end.settings.mesh.num_axes)) for end in ends]
    return plan_crossing((), dtype, *whole)


def _tied(realized: RealizedPlan) -> tuple[dict[Edge, dict], dict[Edge, dict]]:
    """Sums of gradients go to the owner, brought home before they go; new values to the users."""
    avals, stages = realized.planner.model.traced.param_avals, realized.stages
    pairs = realized.wiring.tied
    gradients: dict[Edge, dict] = {(user, owner): {} for owner, user in pairs}
    parameters: dict[Edge, dict] = {pair: {} for pair in pairs}
    for path, users in sorted(realized.users.items()):
        owner, aval = stages[realized.owner[path]], avals[path]
        home, settings = owner.layout.params[path], owner.settings
        for user in users:
            at_user = _held(stages[user], stages[user].layout.params[path])
            edge = realized.owner[path], user
            parameters[edge][path] = _cross(aval, _held(owner, home), at_user)
            if user in realized.contributors[path]:
                summed = gradient_spec(home, aval.shape, settings.mesh, settings.zero)
                gradients[edge[::-1]][path] = _cross(aval, at_user, _held(owner, summed))
    return gradients, parameters


def _cross(aval, source: Located, target: Located) -> Crossing:
    return plan_crossing(aval.shape, np.dtype(aval.dtype), source, target)


def _held(stage: RealizedStage, spec: Spec) -> Located:
    places = tuple((host, device) for host in stage.stage.hosts for device in stage.stage.devices)
    return Located(spec, stage.settings.mesh.shape, places)
