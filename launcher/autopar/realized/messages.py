"""What the messages of a step carry, and how: the crossing of every value that goes between stages.

The planner prices these crossings and the runtime's transport executes them.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.graphs.graph import Value
from launcher.autopar.graphs.trace import TracedModel
from launcher.autopar.realized.realized_stage import RealizedStage
from launcher.autopar.sharding.crossing import (
    Crossing,
    Located,
    message_s,
    plan_crossing,
    total_bytes,
)
from launcher.autopar.sharding.param_costs import gradient_spec
from launcher.autopar.sharding.spec import replicated

Edge = tuple[int, int]
Carried = Mapping[Hashable, Crossing]
Values = Mapping[Edge, Sequence[Value]]


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


def price_messages(
    messages: Messages, stages: Sequence[RealizedStage], cluster: AnyCluster
) -> MessageSeconds:
    """Price all messages on a cluster."""

    def seconds(carried: Mapping[Edge, Carried]) -> dict[Edge, float]:
        return {
            (source, target): message_s(values.values(), cluster, stages[target].settings.mesh)
            for (source, target), values in carried.items()
        }

    tied: Counter[Edge] = Counter()
    for carried in (messages.tied_gradients, messages.tied_parameters):
        tied.update(seconds(carried))
    return MessageSeconds(seconds(messages.activations), seconds(messages.cotangents), dict(tied))


def _bytes(carried) -> int:
    return sum(total_bytes(values.values()) for values in carried)


def exchanged(stages: Sequence[RealizedStage]) -> tuple[dict[Edge, tuple[Value, ...]], ...]:
    """The values that one stage sends to another; and those whose gradients come back."""
    producer = {value: i for i, stage in enumerate(stages) for value in stage.layout.exports}
    sent: dict[Edge, list[Value]] = defaultdict(list)
    returned: dict[Edge, list[Value]] = defaultdict(list)
    for index, stage in enumerate(stages):
        for value in stage.layout.imports:
            sent[producer[value], index].append(value)
            if value in stage.layout.returns:
                returned[producer[value], index].append(value)
    return tuple({edge: tuple(values) for edge, values in t.items()} for t in (sent, returned))


def plan_messages(
    stages: Sequence[RealizedStage], traced: TracedModel, *, sent: Values, returned: Values,
    owner: Mapping[str, int], users: Mapping[str, Sequence[int]],
    contributors: Mapping[str, Sequence[int]],
) -> Messages:  # fmt: skip
    """Plan the crossings of all messages of a plan, but the norms: see `scalar_crossing`.

    The arguments are fields of the realized plan.
    """
    cotangents = {
        (k, i): {
            value: _cross(
                traced.graph.avals[value],
                stages[k].located(stages[k].layout.returns[value]),
                stages[i].located(stages[i].layout.cotangents[value]),
            )
            for value in values
        }
        for (i, k), values in returned.items()
    }
    gradients: dict[Edge, dict] = defaultdict(dict)
    parameters: dict[Edge, dict] = defaultdict(dict)
    for path, others in sorted(users.items()):
        for user in others:
            edge = owner[path], user
            aval, ends = traced.param_avals[path], [stages[index] for index in edge]
            forth, back = _tied(path, aval, *ends)
            parameters[edge][path] = forth
            going_back = gradients[edge[::-1]]
            if user in contributors[path]:
                going_back[path] = back
    activations = forward_crossings(stages, traced, sent)
    return Messages(activations, cotangents, dict(gradients), dict(parameters))


def forward_crossings(
    stages: Sequence[RealizedStage], traced: TracedModel, sent: Values
) -> dict[Edge, Carried]:
    """The crossings of what forward passes send."""
    return {
        (i, k): {
            value: _cross(
                traced.graph.avals[value],
                stages[i].located(stages[i].layout.exports[value]),
                stages[k].located(stages[k].layout.imports[value]),
            )
            for value in values
        }
        for (i, k), values in sent.items()
    }


def scalar_crossing(source: RealizedStage, target: RealizedStage, dtype: np.dtype) -> Crossing:
    """A number that every device of a stage has, such as its norm, sent to all devices of another."""
    whole = [end.located(replicated(end.settings.mesh.num_axes)) for end in (source, target)]
    return plan_crossing((), dtype, *whole)


def _tied(path: str, aval, owner: RealizedStage, user: RealizedStage) -> tuple[Crossing, Crossing]:
    """A new value goes to a user; the sum of its gradients, brought home there, to the owner."""
    home, settings = owner.layout.params[path], owner.settings
    at_user = user.located(user.layout.params[path])
    summed = gradient_spec(home, aval.shape, settings.mesh, settings.zero)
    forth = _cross(aval, owner.located(home), at_user)
    return forth, _cross(aval, at_user, owner.located(summed))


def _cross(aval, source: Located, target: Located) -> Crossing:
    return plan_crossing(aval.shape, np.dtype(aval.dtype), source, target)
