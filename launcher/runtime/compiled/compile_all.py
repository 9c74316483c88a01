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
    num_cached: int

    @property
    def num_programs(self) -> int:
        return len(self.executables)

    def __str__(self) -> str:
        cached = f", {self.num_cached} of them from the cache" if self.num_cached else ""
        programs = "1 program" if self.num_programs == 1 else f"{self.num_programs} programs"
        return f"compiled {programs} in {self.wall_s:.1f} s{cached}"


def compile_all(
    programs: Mapping[str, Callable[[], jax.stages.Compiled]], progress: Callable[[str], None]
) -> Compilation:
    """Compile every program; the first error is raised, and those not begun are dropped."""
    start_s, hits_before = time.perf_counter(), _CACHE_HITS.count
    executables: dict[str, jax.stages.Compiled] = {}
    doubles = jax.config.jax_enable_x64  # may hold for this thread only

    def compile_in_thread(compile_: Callable[[], jax.stages.Compiled]) -> jax.stages.Compiled:
        with jax.enable_x64(doubles):
            return compile_()

    pool = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="compile")
    try:
        waiting = {
            pool.submit(compile_in_thread, compile_): name for name, compile_ in programs.items()
        }
        for done in as_completed(waiting):
            executables[waiting[done]] = done.result()
            progress(f"program {len(executables)} of {len(programs)}")
    finally:  # not waited for: who is asked to stop cannot wait for what XLA has begun
        pool.shutdown(wait=False, cancel_futures=True)
    num_cached = min(len(programs), _CACHE_HITS.count - hits_before)
    return Compilation(executables, time.perf_counter() - start_s, num_cached)


class _CacheHits:
    """Counts what jax says that it found in its persistent cache."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_listener(self._note)

    def _note(self, event: str, **details: object) -> None:
        del details
        self.count += event == "/jax/compilation_cache/cache_hits"


# One for the process: jax has no public way to take a listener off again.
_CACHE_HITS = _CacheHits()
