"""What a run leaves behind besides its numbers: weights to go on from, and a sample of text."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from launcher.autopar.plans.plan import Plan
from launcher.autopar.text.atomic_file import storage_error
from launcher.models.model import Model
from launcher.runtime.checkpoints.weights import describe, write_weights
from launcher.runtime.training.sampling import Sampler, why_not

log = logging.getLogger(__name__)

WEIGHTS_NAME, SAMPLE_NAME = "weights.safetensors", "sample.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnd:
    """Writes it; called after the last step, or after that which Ctrl-C let finish."""

    run_dir: Path
    model: Model
    plan: Plan
    arrays: Callable[[], Mapping[str, jax.Array]]  # parameters and state, where they lie then
    exports: bool
    sampler: Sampler | None

    def __call__(self, num_steps: int, interrupted: bool) -> None:
        if self.exports:
            described = describe(self.model, self.plan, num_steps)
            write_weights(self.run_dir / WEIGHTS_NAME, self.arrays(), described)
        if self.sampler is not None and not interrupted:
            self._write_sample(self.sampler, self.arrays())

    def _write_sample(self, sampler: Sampler, arrays: Mapping[str, jax.Array]) -> None:
        reason = why_not(arrays)
        if reason is not None:
            log.warning("no sample, train.sample_tokens is left out: %s", reason)
            return
        text = sampler.text(arrays)
        path = self.run_dir / SAMPLE_NAME
        try:
            path.write_bytes(text)
        except OSError as error:
            raise storage_error(path, error, needed_bytes=len(text)) from error
        log.info("sample:\n%s", text.decode(errors="replace"))
