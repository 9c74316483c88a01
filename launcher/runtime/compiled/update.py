"""One optimizer step of a stage: unscale, clip, update, and skip it all where the gradients overflowed.

A stage updates its own parameters, yet every stage gets the squared norms of all stages and adds them up in
the same order. So all compute the same global norm and decide alike, on the devices, without asking anyone:
where the norm is not finite, parameters, optimizer state and other state stay as they were on every stage.

Loss scaling (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2; its dynamic form: Kuchaiev
et al. 2018, "Mixed-Precision Training for NLP and Speech Recognition with OpenSeq2Seq", section 2): small
gradients would be zero in fp16, so the loss is multiplied before the backward pass, and the gradients are
divided before they are used. All scales are powers of two where the first one is, and then scaling rounds
nothing. Left out: a scale per layer.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Sharding

from launcher.autopar.graphs.graph import Literal, Value, evaluate, trace
from launcher.models.optimizer import LossScaling, Optimizer

Arrays = dict[str, Array]

# A scale that never overflows would double for ever, up to infinity.
LARGEST_SCALE = 2.0**24


class LossScale(NamedTuple):
    """The state of dynamic loss scaling; every stage has its own, and all are equal."""

    scale: Array  # float32 scalar
    good_steps: Array  # int32 scalar: since the scale was last changed


class UpdateInputs(NamedTuple):
    """What the update of a stage reads; the names of its program's arguments, in their order."""

    params: Arrays  # those that the stage owns
    optimizer_state: Any
    gradients: Arrays  # summed over microbatches and devices, of the scaled loss
    squares: Sequence[Array]  # the squared norms of all stages' gradients
    loss_scale: LossScale | None  # None where the scale is constant
    state_before: Arrays  # what the forward pass changes (BatchNorm's statistics), before the step
    state_after: Arrays  # and after its last microbatch


class UpdateResult(NamedTuple):
    """What the update of a stage makes."""

    params: Arrays
    optimizer_state: Any
    state: Arrays
    loss_scale: LossScale | None
    norm: Array  # of all gradients, unscaled


def first_loss_scale(scaling: LossScaling) -> LossScale | None:
    """The state that a run begins with; none is needed for a constant scale."""
    if not scaling.dynamic:
        return None
    return LossScale(jnp.float32(scaling.scale), jnp.int32(0))


def loss_cotangent(
    scaling: LossScaling, loss_scale: LossScale | None, num_microbatches: int, dtype: Any
) -> Array:
    """Where the backward pass of a microbatch begins: its share of the mean loss, scaled."""
    scale = jnp.float32(scaling.scale) if loss_scale is None else loss_scale.scale
    return scale.astype(dtype) / num_microbatches


def compile_loss_cotangent(
    scaling: LossScaling, num_microbatches: int, dtype: Any, where: Sharding
) -> jax.stages.Compiled:
    """(loss scale) -> `loss_cotangent`, for the stage with the loss; both lie `where` says."""
    function = partial(loss_cotangent, scaling, num_microbatches=num_microbatches, dtype=dtype)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        first_loss_scale(scaling),
    )
    return jax.jit(function, out_shardings=where).lower(state).compile()


def apply_update(optimizer: Optimizer, inputs: UpdateInputs) -> UpdateResult:
    """One optimizer step, clipped by the norm over all stages, if that norm is finite."""
    scaling, params = optimizer.loss_scaling, inputs.params
    total = sum(inputs.squares[1:], start=inputs.squares[0])
    inverse = _inverse_scale(scaling, inputs.loss_scale, total.dtype)
    norm = jnp.sqrt(total) if inverse is None else jnp.sqrt(total) * inverse
    gradients = _scaled(inputs.gradients, _factor(optimizer.clip_norm, norm, inverse))
    is_finite = jnp.isfinite(norm)
    updates, optimizer_state = _updates(
        optimizer.transform, is_finite, gradients, inputs.optimizer_state, params
    )
    new = optax.apply_updates(params, updates), inputs.state_after
    old = params, inputs.state_before
    params, state = jax.tree.map(partial(lax.select, is_finite), new, old)
    scale = _next_scale(scaling, inputs.loss_scale, is_finite)
    return UpdateResult(params, optimizer_state, state, scale, norm)


def _updates(
    transform: optax.GradientTransformation, is_finite: Array, gradients: Arrays, state: Any,
    params: Arrays,
):  # fmt: skip
    """The changes of the parameters, and the state after the step: the old one where it is skipped.

    What becomes state is selected as soon as it is there, and that is what the changes read. Did they read
    it before, XLA would compute it again in each of them, from the old state; it could not be overwritten
    then, and copies of it would be held from the beginning of the program to its end.
    """
    arguments = (gradients, state, params)
    graph, structure = trace(transform.update, *arguments)
    _, outputs = jax.tree.unflatten(structure, graph.outputs)
    outputs = [None if isinstance(o, Literal) else o for o in jax.tree.leaves(outputs)]
    old, computed = jax.tree.leaves(state), {value for op in graph.ops for value in op.results}
    before = {
        output: leaf
        for output, leaf in zip(outputs, old, strict=True)
        if output in computed and outputs.count(output) == 1
    }

    def kept(value: Value, array: Array) -> Array:
        return lax.select(is_finite, array, before[value]) if value in before else array

    inputs = [*jax.tree.leaves(arguments), *graph.constants.values()]
    updates, new = jax.tree.unflatten(structure, evaluate(graph, inputs, revise=kept))
    selected = [
        leaf if output in before else lax.select(is_finite, jnp.asarray(leaf), held)
        for output, leaf, held in zip(outputs, jax.tree.leaves(new), old, strict=True)
    ]
    return updates, jax.tree.unflatten(jax.tree.structure(new), selected)


def like_result(inputs: UpdateInputs) -> UpdateResult:
    """What lies as each part of the result does: for its structure, shapes and shardings."""
    return UpdateResult(
        params=inputs.params,
        optimizer_state=inputs.optimizer_state,
        state=inputs.state_before,
        loss_scale=inputs.loss_scale,
        norm=inputs.squares[0],
    )


def _inverse_scale(scaling: LossScaling, loss_scale: LossScale | None, dtype) -> Array | None:
    """What gradients are multiplied with; None where that is 1 for good."""
    if loss_scale is not None:
        return 1.0 / loss_scale.scale.astype(dtype)
    return None if scaling.scale == 1.0 else jnp.asarray(1.0 / scaling.scale, dtype)


def _factor(clip_norm: float | None, norm: Array, inverse: Array | None) -> Array | None:
    if clip_norm is None:
        return inverse
    clip = jnp.minimum(1.0, clip_norm / (norm + 1e-12))
    return clip if inverse is None else clip * inverse


def _scaled(gradients: Arrays, factor: Array | None) -> Arrays:
    if factor is None:
        return gradients
    return {path: gradient * factor.astype(gradient.dtype) for path, gradient in gradients.items()}


def _next_scale(
    scaling: LossScaling, loss_scale: LossScale | None, is_finite: Array
) -> LossScale | None:
    """Half after an overflow, twice after so many steps without one."""
    if loss_scale is None:
        return None
    scale, good_steps = loss_scale
    counted = good_steps + 1
    grows = counted >= scaling.growth_steps
    larger = jnp.minimum(scale * 2.0, LARGEST_SCALE)
    return LossScale(
        scale=lax.select(is_finite, lax.select(grows, larger, scale), scale * 0.5),
        good_steps=lax.select(is_finite & ~grows, counted, jnp.zeros_like(counted)),
    )
