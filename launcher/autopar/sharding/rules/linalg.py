"""Rules for factorisations, solvers and Fourier transforms: one matrix is whole, a batch of them is split."""

from collections.abc import Iterator

from jax.extend.core import primitives as prim
from jax.lax import linalg

from launcher.autopar.graphs.graph import Op
from launcher.autopar.sharding.rules.registry import AxisStrategy, operand_rank, rule
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED


def split_batch(op: Op, item_rank: int) -> Iterator[AxisStrategy]:
    """Split the leading dims, those before the `item_rank` dims of the first operand's items."""
    for dim in range(operand_rank(op, 0) - item_rank):
        yield AxisStrategy((dim,) * len(op.operands), (dim,) * len(op.results))


@rule(
    prim.cholesky_p, linalg.cholesky_update_p, prim.eig_p, prim.eigh_p, prim.hessenberg_p,
    prim.householder_product_p, prim.lu_p, linalg.ormqr_p, prim.qr_p, prim.schur_p, prim.svd_p,
    linalg.symmetric_product_p, prim.tridiagonal_p, "geqrf", "geqp3",
)  # fmt: skip
def of_matrices(op: Op) -> Iterator[AxisStrategy]:
    yield from split_batch(op, item_rank=2)


@rule(linalg.lu_pivots_to_permutation_p)
def of_vectors(op: Op) -> Iterator[AxisStrategy]:
    yield from split_batch(op, item_rank=1)


@rule(prim.tridiagonal_solve_p)
def tridiagonal_solve(op: Op) -> Iterator[AxisStrategy]:
    """Three diagonals and the right sides, which are the columns of a matrix; linear in those."""
    rank = operand_rank(op, 3)
    yield from split_batch(op, item_rank=1)
    yield AxisStrategy((REPLICATED,) * 3 + (rank - 1,), (rank - 1,))
    yield AxisStrategy((REPLICATED,) * 3 + (PARTIAL,), (PARTIAL,))


@rule(prim.triangular_solve_p)
def triangular_solve(op: Op) -> Iterator[AxisStrategy]:
    """The right sides are independent of one another, and the solution is linear in them."""
    rank = operand_rank(op, 1)
    sides = rank - 1 if op.eqn.params["left_side"] else rank - 2
    yield from split_batch(op, item_rank=2)
    yield AxisStrategy((REPLICATED, sides), (sides,))
    yield AxisStrategy((REPLICATED, PARTIAL), (PARTIAL,))


@rule(prim.fft_p)
def fft(op: Op) -> Iterator[AxisStrategy]:
    yield from split_batch(op, item_rank=len(op.eqn.params["fft_lengths"]))
    yield AxisStrategy((PARTIAL,), (PARTIAL,))
