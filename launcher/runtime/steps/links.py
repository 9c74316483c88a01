"""The channels between the stages of a plan, one for every pair and kind of message."""

from collections.abc import Mapping
from itertools import permutations

import jax.numpy as jnp
from jax.sharding import Mesh

from launcher.autopar.realized.messages import Carried, Edge, scalar_crossing
from launcher.autopar.realized.realize import RealizedPlan
from launcher.runtime.compiled.stage_programs import StagePrograms
from launcher.runtime.steps.transport import Channel, Transport

Arrays = dict
NORM = "norm"


class Links:
    """(from stage, to stage) -> the channel that carries such a message.

    Values that stay on a submesh take the same way: from one sharding to another, or as they are.
    """

    def __init__(
        self, realized: RealizedPlan, programs: Mapping[int, StagePrograms], transport: Transport
    ):
        """`programs` of the stages of this process: others need no channel."""
        messages, stages = realized.messages, realized.stages
        self.transport = transport
        submesh = realized.program.submesh_of
        meshes = {index: built.mesh for index, built in programs.items()}
        norm_dtype = next(iter(programs.values())).norm_dtype

        def channels(kind: str, carried: Mapping[Edge, Carried]) -> dict[Edge, Channel]:
            return open_channels(transport, kind, meshes, carried)

        self.activations = channels("activation", messages.activations)
        self.cotangents = channels("cotangent", messages.cotangents)
        self.tied_gradients = channels("tied gradient", messages.tied_gradients)
        self.tied_parameters = channels("tied parameter", messages.tied_parameters)
        self.norms = channels(
            NORM,
            {
                (one, other): {NORM: scalar_crossing(stages[one], stages[other], norm_dtype)}
                for one, other in permutations(range(len(stages)), 2)
                if submesh[one] != submesh[other]
            },
        )


def open_channels(
    transport: Transport, kind: str, meshes: Mapping[int, Mesh], carried: Mapping[Edge, Carried]
) -> dict[Edge, Channel]:
    """Open the channels that begin or end on a stage that has a mesh here."""
    return {
        (source, target): transport.channel(
            kind, (source, target), meshes.get(source), meshes.get(target), values
        )
        for (source, target), values in carried.items()
        if source in meshes or target in meshes
    }


def hand_over_copies(channel: Channel, values: Arrays) -> Arrays:
    """Hand over values that their owner will donate, while the other stage still has them."""
    return {name: jnp.copy(array) for name, array in channel.hand_over(values).items()}
