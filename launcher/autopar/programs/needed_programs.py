"""Which compiled programs the stages of a plan need: those that their instructions are launched as.

Left out are two that no compute instruction names: `zeros`, with which a step begins, and `reduce_tied`,
which a stage needs whose layout has gradients of parameters that other stages own.
"""

from collections import Counter
from collections.abc import Mapping

from launcher.autopar.programs.buffers import REDUCE_TIED, program_of
from launcher.autopar.programs.launches import launches
from launcher.autopar.programs.program import Program, Wiring


def needed_programs(program: Program, wiring: Wiring) -> tuple[Mapping[str, int], ...]:
    """Each stage's programs, in the order in which it first runs them, and how often a step runs each."""
    found: tuple[Counter[str], ...] = tuple(Counter() for _ in range(program.num_stages))
    for launch in launches(program, wiring):
        name = program_of(launch)
        if name not in (None, REDUCE_TIED):
            found[launch.first.stage][name] += 1
    return found
