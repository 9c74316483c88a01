"""The channels between the stages of a plan, one for every pair and kind of message."""

from collections.abc import Mapping, Sequence
from itertools import permutations

import jax.numpy as jnp

from launcher.autopar.messages import Carried, Edge, scalar_crossing
from launcher.autopar.realize import RealizedPlan
from launcher.runtime.stage_programs import StagePrograms
from launcher.runtime.transport import Channel, Transport

Arrays = dict
NORM = "norm"


class Links:
    """(from stage, to stage) -> the channel that carries such a message.

    Values that stay on a submesh take the same way: from one sharding to another, or as they are.
    """

    def __init__(
        self, realized: RealizedPlan, programs: Sequence[StagePrograms], transport: Transport
    ):
        messages, stages = realized.messages, realized.stages
        self.transport = transport
        submesh = realized.program.submesh_of

        def channels(kind: str, carried: Mapping[Edge, Carried]) -> dict[Edge, Channel]:
            return {
                (source, target): transport.channel(
                    kind, programs[source].mesh, programs[target].mesh, values
                )
                for (source, target), values in carried.items()
            }

        self.activations = channels("activation", messages.activations)
        self.cotangents = channels("cotangent", messages.cotangents)
        self.tied_gradients = channels("tied gradient", messages.tied_gradients)
        self.tied_parameters = channels("tied parameter", messages.tied_parameters)
        self.norms = channels(
            NORM,
            {
                (one, other): {
                    NORM: scalar_crossing(stages[one], stages[other], programs[one].norm_dtype)
                }
                for one, other in permutations(range(len(stages)), 2)
                if submesh[one] != submesh[other]
            },
        )


def hand_over(channel: Channel, values: Arrays) -> Arrays:
    """Bring values to another stage of their own submesh."""
    return dict(channel.receive(channel.send(values)))


def hand_over_copies(channel: Channel, values: Arrays) -> Arrays:
    """The same for values that their owner will donate, while the other stage still has them."""
    return {name: jnp.copy(array) for name, array in hand_over(channel, values).items()}
