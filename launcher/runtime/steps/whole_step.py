"""A whole training step as one program, for a plan of one stage.

Nothing enters or leaves such a stage in the midst of a step, so its list of instructions, a forward and a
backward of each microbatch in turn, then `S`, `N` and `U`, can be dispatched at once: a loop over
microbatches inside one XLA program. It computes what the instructions compute one by one, and lets XLA
fuse across them. Where the stage overlaps, the last microbatch stands behind the loop, in one straight line
with `S`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
from jax import lax

from launcher.autopar.graphs.trace import TracedModel
from launcher.autopar.plans.plan import Plan
from launcher.autopar.programs.instructions import Op
from launcher.autopar.programs.program import Program
from launcher.autopar.realized.apart import Turns
from launcher.autopar.realized.realize import RealizedPlan
from launcher.runtime.compiled.stage_programs import StagePrograms
from launcher.runtime.compiled.update import UpdateInputs, UpdateResult, loss_cotangent
from launcher.runtime.steps.executor import StepResult
from launcher.runtime.steps.loose_metrics import LooseMetrics, Scalars
from launcher.runtime.steps.means import LOSS, mean
from launcher.runtime.steps.placement import StackedBatch, StackedPlacer, stacked_sharding
from launcher.runtime.steps.stage_state import StageState

Arrays = dict


def is_one_loop(program: Program, loose: LooseMetrics) -> bool:
    """Whether the program is one stage's, each microbatch going back right after it went forward.

    Parameters and state that are metrics themselves are read between microbatches.
    """
    if program.num_stages != 1 or loose.inputs:
        return False
    order = [entry.op for entry in program.lists[0] if entry.op in (Op.FORWARD, Op.BACKWARD)]
    return order == [Op.FORWARD, Op.BACKWARD] * program.num_microbatches


def hollow_loop(
    realized: RealizedPlan, programs: StagePrograms, loose: LooseMetrics
) -> "WholeStep":
    """The step of a plan that is one loop, to be compiled and not to be run: its stage holds nothing."""
    hollow = StageState(0, programs, {}, {}, optimizer_state=None, loss_scale=None)
    traced = realized.planner.model.traced
    return WholeStep(hollow, loose, realized.plan, traced, seed=0)


class WholeStep:
    """The step of a plan's only stage.

    Args:
        traced: says which value is the loss, and which are metrics: reported as means over microbatches.
    """

    def __init__(
        self, stage: StageState, loose: LooseMetrics, plan: Plan, traced: TracedModel, *, seed: int
    ):
        self._stage, self._programs = stage, stage.programs
        self._num_microbatches, self._loss = plan.num_microbatches, traced.loss
        self.overlaps = plan.stages[0].overlap
        exports = self._programs.layout.exports
        self._reported = {n: v for n, v in traced.metrics.items() if v in exports}
        self._reported |= {LOSS: traced.loss}
        self._placer = StackedPlacer(
            self._programs, loose, num_microbatches=self._num_microbatches, seed=seed
        )
        self.place = self._placer.place
        self._executable: jax.stages.Compiled | None = None

    def take(self, executable: jax.stages.Compiled) -> None:
        """Take what `compile` made, perhaps in another thread."""
        self._executable = executable

    def step(self, placed: StackedBatch) -> StepResult:
        """Dispatch a step."""
        stage = self._stage
        made, reported = self._executable(
            stage.params, stage.state, stage.optimizer_state, stage.loss_scale, placed.leaves,
            placed.keys,
        )  # fmt: skip
        stage.params, stage.state = made.params, made.state
        stage.optimizer_state, stage.loss_scale = made.optimizer_state, made.loss_scale
        loss = reported.pop(LOSS)
        return StepResult(
            loss=loss,
            grad_norm=made.norm,
            metrics=reported | _means(placed.loose),
            loss_scale=made.loss_scale and made.loss_scale.scale,
        )

    def compile(self) -> jax.stages.Compiled:
        """(params, state, optimizer state, loss scale, batch, keys) -> (what the update makes, means).

        Batch and keys have a leading dim of microbatches. Parameters, state and optimizer state are donated.
        """
        programs, layout = self._programs, self._programs.layout
        update, _ = programs.sharded_update
        params = programs.abstracts(layout.params, programs.avals.params)
        state = programs.abstracts(layout.state, programs.avals.state)
        batch = {name: self._stacked(name) for name in layout.batch}
        count = self._num_microbatches
        keys = jax.ShapeDtypeStruct((count, 2), jnp.uint32, sharding=programs.whole)
        arguments = (params, state, update.optimizer_state, update.loss_scale, batch, keys)
        in_specs = jax.tree.map(lambda leaf: leaf.sharding.spec, arguments)
        whole = programs.whole.spec
        made = UpdateResult(*in_specs[:1], in_specs[2], in_specs[1], in_specs[3], whole)
        out_specs = made, dict.fromkeys(self._reported, whole)
        function = programs.shard_map(self._step, in_specs, out_specs, donate_argnums=(0, 1, 2))
        return function.lower(*arguments).compile()

    def _stacked(self, name: str) -> jax.ShapeDtypeStruct:
        """A leaf of the batch, with a leading dim of microbatches."""
        aval = self._programs.avals.batch[name]
        shape = (self._num_microbatches, *aval.shape)
        return jax.ShapeDtypeStruct(
            shape, aval.dtype, sharding=stacked_sharding(self._programs, name)
        )

    def _step(
        self, params: Arrays, state: Arrays, optimizer_state, loss_scale, batch: Arrays, keys
    ):
        """On one device's shards."""
        emitter, carry = self._programs.emitter, (self._programs.local_zeros(), state)
        turns = emitter.turns()
        if self._num_microbatches == 1:
            only = {name: leaf[0] for name, leaf in batch.items()}, keys[0]
            (sums, after), reported = self._microbatch(params, loss_scale, carry, only, turns)
        else:
            turns = emitter.turns()
            run = partial(self._loop_body, params, loss_scale)
            (sums, after), reported = self._looped(run, carry, (batch, keys), turns)
            reported = {name: leaf.mean(axis=0) for name, leaf in reported.items()}
        update = partial(self._update, params, optimizer_state, loss_scale, sums, state, after)
        made = emitter.apart(update, turns)
        return made._replace(params=params | made.params, state=after | made.state), reported

    def _looped(self, run: Callable, carry, inputs, turns: Turns):
        """All microbatches, those in a loop that nothing else waits for; what they report is stacked."""
        if not self.overlaps:
            return lax.scan(run, carry, inputs)
        before, last = (jax.tree.map(itemgetter(of), inputs) for of in (slice(-1), -1))
        carry, reported = lax.scan(run, carry, before)
        carry, of_last = self._programs.emitter.apart(partial(run, carry, last), turns)
        stacked = {n: jnp.concatenate([leaf, of_last[n][None]]) for n, leaf in reported.items()}
        return carry, stacked

    def _loop_body(self, params: Arrays, loss_scale, carry, inputs):
        # Or XLA gathers all parameters before the loop, and holds them throughout.
        params, carry = lax.optimization_barrier((params, carry))
        turns = self._programs.emitter.turns()
        return self._microbatch(params, loss_scale, carry, inputs, turns)

    def _microbatch(self, params: Arrays, loss_scale, carry, inputs, turns: Turns):
        """Forward and backward."""
        (sums, state), (batch, key) = carry, inputs
        programs = self._programs
        dtype = programs.avals.values[self._loss].dtype
        scaling = programs.optimizer.loss_scaling
        share = loss_cotangent(scaling, loss_scale, self._num_microbatches, dtype)
        exports, new_state, sums, _ = programs.microbatch.forward_backward(
            params, state, batch, key, {}, {self._loss: share}, sums, turns
        )
        reported = {name: exports[value] for name, value in self._reported.items()}
        return (sums, {**state, **new_state}), reported

    def _update(self, params, optimizer_state, loss_scale, sums, before, after) -> UpdateResult:
        programs = self._programs
        gradients, square = programs.synchronize_shards(sums, {})
        changing = programs.layout.new_state
        inputs = UpdateInputs(
            {path: params[path] for path in programs.owned_paths}, optimizer_state, gradients,
            [square], loss_scale, {path: before[path] for path in changing},
            {path: after[path] for path in changing},
        )  # fmt: skip
        return programs.update_shards(inputs)


def _means(loose: Sequence[Scalars]) -> Scalars:
    """Of metrics that do not depend on the step's results."""
    return {name: mean([scalars[name] for scalars in loose]) for name in loose[0]}
