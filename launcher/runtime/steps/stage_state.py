"""What one stage holds on its devices: for good, for a step, and for a microbatch.

The fields of a microbatch are keyed by its number and live as long as docs/schedules.md says: an
instruction makes them, and an instruction frees them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax

from launcher.autopar.graphs.graph import Value
from launcher.autopar.intra_op.split_layout import SplitLayout
from launcher.runtime.compiled.stage_programs import Compiled, StagePrograms
from launcher.runtime.compiled.update import LossScale
from launcher.runtime.steps.cotangents import Cotangents

Arrays = dict


@dataclass(slots=True)
class Stash:
    """What a microbatch leaves on a stage until its backward pass.

    Attributes:
        imports: the activations that other stages sent.
        kept: what the forward pass computed, in groups by when it goes.
        weight_kept: what the input half of a split backward pass leaves for the weight half.
    """

    batch: Arrays
    key: jax.Array
    imports: Arrays
    kept: tuple[Arrays, ...] = ()
    weight_kept: Arrays = field(default_factory=dict)

    def hold_for_weights(self, split: SplitLayout) -> None:
        """Let go of what the second half of the backward pass does not read."""
        self.kept = self.kept[-1:]
        self.batch = {name: leaf for name, leaf in self.batch.items() if name in split.batch}
        self.imports = {v: array for v, array in self.imports.items() if v in split.imports}


@dataclass(slots=True)
class StageState:
    """One stage's programs and everything they work on."""

    index: int
    programs: StagePrograms
    params: Arrays
    state: Arrays
    optimizer_state: object
    loss_scale: LossScale | None

    # For running instruction by instruction.
    compiled: Compiled | None = None
    beginnings: Cotangents | None = None

    # Of a step.
    state_before: Arrays = field(default_factory=dict)
    accumulators: Arrays = field(default_factory=dict)
    gradients: Arrays = field(default_factory=dict)
    tied_gradients: dict[str, list[jax.Array]] = field(default_factory=dict)
    lent_gradients: Arrays = field(default_factory=dict)
    norms: dict[int, jax.Array] = field(default_factory=dict)
    norm: jax.Array | None = None

    # Of a microbatch.
    imports: dict[int, Arrays] = field(default_factory=dict)
    stash: dict[int, Stash] = field(default_factory=dict)
    exports: dict[int, Arrays] = field(default_factory=dict)
    cotangents: dict[int, dict[Value, dict[int, jax.Array]]] = field(default_factory=dict)
    returns: dict[int, Arrays] = field(default_factory=dict)

    @property
    def microbatch_buffers(self) -> Sequence[dict]:
        """The stores that must be empty when a step ends."""
        return self.imports, self.stash, self.exports, self.cotangents, self.returns

    def release(self) -> None:
        """Let go of all arrays; no step can follow."""
        self.params, self.state, self.optimizer_state, self.loss_scale = {}, {}, None, None
        self.state_before, self.accumulators, self.gradients = {}, {}, {}
        self.tied_gradients, self.lent_gradients = {}, {}
        self.norms, self.norm = {}, None
        for buffers in self.microbatch_buffers:
            buffers.clear()
