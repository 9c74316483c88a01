"""Compiling many programs: side by side, with progress, counted.

XLA compiles outside Python's lock, so a few threads compile a few programs at a time. Alike programs of
different stages come from the persistent cache where its key leaves the devices out: on GPUs, by jax's
own rule. (On CPU devices an executable is bound to its devices: one loaded for others is refused.)
"""

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import jax


@dataclass(frozen=True, slots=True)
class Compilation:
    """The executables by name, and what making them took."""

    executables: Mapping[str, jax.stages.Compiled]
    wall_s: float

    @property
    def num_programs(self) -> int:
        return len(self.executables)


def compile_all(
    programs: Mapping[str, Callable[[], jax.stages.Compiled]], progress: Callable[[str], None]
) -> Compilation:
    """Compile every program; the first error is raised, and those not begun are dropped."""
    start_s = time.perf_counter()
    executables: dict[str, jax.stages.Compiled] = {}
    doubles = jax.config.jax_enable_x64  # may hold for this thread only

    def compile_in_thread(compile_: Callable[[], jax.stages.Compiled]) -> jax.stages.Compiled:
        with jax.enable_x64(doubles):
            return compile_()

    with ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="compile") as pool:
        waiting = {pool.submit(compile_in_thread, compile_): name for name, compile_ in programs.items()}
        try:
            for done in as_completed(waiting):
                executables[waiting[done]] = done.result()
                progress(f"program {len(executables)} of {len(programs)}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Compilation(executables, time.perf_counter() - start_s)
