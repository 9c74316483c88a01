"""Which compiled programs the stages of a plan need: those that their instructions are launched as.

Left out are two that no instruction names: `zeros`, with which a step begins, and `reduce_tied`, which a
stage needs whose layout has gradients of parameters that other stages own.
"""

from launcher.autopar.programs.buffers import FUSED, PROGRAM_OF
from launcher.autopar.programs.instructions import Op
from launcher.autopar.programs.launches import launches
from launcher.autopar.programs.program import Program, Wiring

PER_MICROBATCH = frozenset(
    (FUSED, *(PROGRAM_OF[op] for op in (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)))
)  # fmt: skip
_PER_STEP = frozenset(PROGRAM_OF[op] for op in (Op.SYNCHRONIZE, Op.UPDATE))


def needed_programs(program: Program, wiring: Wiring) -> tuple[tuple[str, ...], ...]:
    """The names of each stage's programs, in the order in which it first runs them."""
    found: tuple[dict[str, None], ...] = tuple({} for _ in range(program.num_stages))
    for launch in launches(program, wiring):
        name = FUSED if launch.is_fused else PROGRAM_OF.get(launch.first.op)
        if name in PER_MICROBATCH | _PER_STEP:
            found[launch.first.stage][name] = None
    return tuple(map(tuple, found))
