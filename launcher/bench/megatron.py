"""Plans as Megatron-LM runs them, for measurements of Megatron-LM: degrees and strategies, nothing chosen.

Our planner's own strategies are often better on paper (it splits the sequence, or gathers weights to use
tensor devices for data), and then they are another program than the one that was measured. So every op is
held to Megatron's tensor parallelism: column- and row-parallel products, heads and the vocabulary split,
activations of the residual stream whole on every tensor device. What that leaves open the solver decides.
Weights and gradients are kept in 16 bits, as Megatron's default sums and reduces them.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise

import jax.numpy as jnp
from jax.extend.core import primitives as prim

from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.clusters.hosts import Cluster
from launcher.autopar.graphs.layers import LayeredModel
from launcher.autopar.graphs.trace import Role
from launcher.autopar.intra_op.intra_op import IntraOpPlanner
from launcher.autopar.intra_op.stage_problem import StageSettings
from launcher.autopar.plans.plan import ModelRef, Plan, Stage
from launcher.autopar.realized.picks import strategies_of
from launcher.autopar.realized.realize import layered_model, restrictions, stage_mesh
from launcher.autopar.sharding.rules import Strategy
from launcher.autopar.sharding.spec import PARTIAL
from launcher.bench.measured import Measurement
from launcher.models.gpt import Gpt
from launcher.models.kernels import Kernels
from launcher.models.layers import Precision
from launcher.models.model import Model, make_model
from launcher.models.sizes import TransformerSize

_VOCABULARY = 51200
_HALF = Precision(compute=jnp.dtype(jnp.float16), master=jnp.dtype(jnp.float16))
_TENSOR_AXIS = 1


@lru_cache(maxsize=8)
def megatron_model(hidden: int, layers: int, heads: int, length: int) -> Model:
    """A GPT as Megatron-LM trains it."""
    size = TransformerSize(
        hidden=hidden, layers=layers, heads=heads, seq_len=length, vocab_size=_VOCABULARY
    )
    return make_model(
        partial(Gpt, size, Kernels(), _HALF),
        precision=_HALF,
        name="gpt",
        size="megatron",
        dtype="fp16",
        sample_unit="tokens",
        units_per_sample=length,
        default_global_batch=1,
        vocab_size=_VOCABULARY,
        fingerprint=f"megatron {hidden} {layers} {heads} {length}",
    )


def megatron_plan(row: Measurement, cluster: Cluster) -> tuple[Plan, Model, IntraOpPlanner]:
    """The plan of a measurement: equal stages of consecutive blocks, on consecutive devices."""
    model = megatron_model(row.hidden, row.layers, row.heads, row.length)
    layered = layered_model(model, row.dp * row.microbatch)
    planner = _planner(layered)
    num_stages = row.pp * row.virtual
    firsts = _first_layers(layered)
    starts = (firsts[k * row.layers // num_stages] for k in range(1, num_stages))
    bounds = [0, *starts, len(layered.layers)]
    stages = tuple(
        Stage(
            layers=(first, last),
            hosts=hosts,
            devices=devices,
            mesh=(("data", row.dp), ("tensor", row.tp)),
            recompute="full",
        )
        for (first, last), (hosts, devices) in zip(
            pairwise(bounds), _places(row, cluster, num_stages), strict=True
        )
    )
    strategies = _strategies(planner, stages[0], row, cluster)
    plan = Plan(
        model=ModelRef(name=model.name, size=model.size),
        cluster=cluster.ref(),
        global_batch=row.global_batch,
        num_microbatches=row.num_microbatches,
        schedule="interleaved" if row.virtual > 1 else "1f1b",
        virtual_stages=row.virtual,
        stages=tuple(
            replace(stage, strategies={name: strategies[name] for name in _groups(layered, stage)})
            for stage in stages
        ),
    )
    return plan, model, planner


def _first_layers(layered: LayeredModel) -> dict[int, int]:
    """Block -> the first layer that reads weights of it.

    Of a small model with a large vocabulary the layers are no blocks; then stages are cut next to where
    Megatron-LM cuts them.
    """
    block_of = {
        value: int(source.path.split("/")[1])
        for value, source in layered.traced.inputs.items()
        if source.role is Role.PARAM and source.path.startswith("blocks/")
    }
    found: dict[int, int] = {}
    for number, layer in enumerate(layered.layers):
        for value in filter(block_of.__contains__, layer.inputs):
            found.setdefault(block_of[value], number)
    return found


def _groups(layered: LayeredModel, stage: Stage) -> list[str]:
    """The strategies that belong to a stage: those of the ops of its classes of layers."""
    layers = layered.layers[slice(*stage.layers)]
    return [f"{name}/op" for name in dict.fromkeys(layer.cls.name for layer in layers)]


def _strategies(
    planner: IntraOpPlanner, stage: Stage, row: Measurement, cluster: Cluster
) -> Mapping[str, tuple[str, ...]]:
    """The best strategies of all ops among those that Megatron-LM may have."""
    mesh = stage_mesh(stage, cluster)
    settings = StageSettings(
        mesh=mesh,
        compute=ComputeModel(cluster.device),
        restrictions=restrictions(mesh),
        num_microbatches=row.num_microbatches,
        recompute="full",
    )
    whole = 0, len(planner.model.layers)
    pins = {
        key: held
        for key, choices in planner.problem(*whole, settings).choices.items()
        if key[0] == "op" and (held := [c for c in choices if _is_megatron(planner, key, c, row)])
    }
    found = strategies_of(planner.solve(*whole, settings, pins=pins))
    return {name: texts for name, texts in found.items() if name.endswith("/op")}


def _is_megatron(planner: IntraOpPlanner, key, choice: Strategy, row: Measurement) -> bool:
    """Whether the tensor axis leaves the batch, the sequence and the residual stream whole, and shares the
    work of every product."""
    op = planner.classes[key[1]].joint.ops[key[2]]
    on_tensor = choice.axes[_TENSOR_AXIS]
    is_product = op.primitive is prim.dot_general_p
    # Heads side by side have the shape of the residual stream, between attention and its projection.
    may_be_heads = is_product or op.primitive is prim.reshape_p
    values = (
        *zip(op.eqn.invars, on_tensor.operands, strict=True),
        *zip(op.eqn.outvars, on_tensor.results, strict=True),
    )
    for value, dim in values:
        shape = value.aval.shape
        if dim < 0 or row.length not in shape[1:]:
            continue
        is_stream = shape[1:] == (row.length, row.hidden)
        if dim == 0 or shape[dim] == row.length or (is_stream and not may_be_heads):
            return False
    # What is summed over the split vocabulary: the loss, and the embedding that is looked up.
    over_vocabulary = any(
        dim >= 0 and value.aval.shape[dim] == _VOCABULARY
        for value, dim in zip(op.eqn.invars, on_tensor.operands, strict=True)
    )
    return (
        on_tensor.divides_work
        if is_product
        else over_vocabulary or PARTIAL not in on_tensor.results
    )


@lru_cache(maxsize=2)
def _planner(layered: LayeredModel) -> IntraOpPlanner:
    return IntraOpPlanner(layered)


def _places(row: Measurement, cluster: Cluster, num_stages: int):
    """The hosts and devices of every stage, in Megatron's order: tensor, data, pipeline."""
    width, per_host = row.tp * row.dp, cluster.devices_per_host
    for stage in range(num_stages):
        begin = stage % row.pp * width
        hosts = tuple(range(begin // per_host, (begin + width - 1) // per_host + 1))
        first = begin % per_host if width < per_host else 0
        yield hosts, tuple(range(first, first + min(width, per_host)))
