"""Rules for fused attention: the custom calls of `jax.nn.dot_product_attention(implementation="cudnn")`.

Written from jax/_src/cudnn/fused_attention_stablehlo.py, jax 0.10.2. Operands of the forward call are
query, key, value, bias, the lengths of queries and of keys, two tables of offsets and two of pages; the
backward call has three more: the softmax statistics (batch, heads, queries), the output and its gradient.
What is not used is an array of size 0. Sequences and features stay whole.

Batch and heads may be split. With fewer key heads than query heads, a device's query heads find theirs
if all are split, or if there is one key head: then its gradients are partial sums. Dropout draws by the
position in the kernel, so that another split would draw other bits: with dropout, and for packed or
paged sequences, whose tables count over the whole batch, the call is whole.
"""

from collections.abc import Iterator

from launcher.autopar.graphs.graph import Op
from launcher.autopar.sharding.rules.registry import AxisStrategy, rule
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED

_BNTH = 1  # the value of the layout parameter; 0 is BTNH
_ALIBI = 4  # the value of the mask type whose slopes depend on the number of the head
_NUM_TABLES = 4
_BIAS = 3


def _head_dim(op: Op) -> int:
    return 1 if op.eqn.params["layout"] == _BNTH else 2


def _sizes(op: Op, dim: int) -> list[int]:
    """The sizes of a dim of query, key and value."""
    return [atom.aval.shape[dim] for atom in op.eqn.invars[:3]]


def _may_split(op: Op) -> bool:
    tables = op.eqn.invars[6 : 6 + _NUM_TABLES]
    return op.eqn.params["dropout_rate"] == 0 and not any(atom.aval.size for atom in tables)


def _bias_entry(op: Op, dim: int, size: int) -> int:
    """What splitting batch or heads does to the bias (batch, heads, queries, keys), which may be shared."""
    shape = op.eqn.invars[_BIAS].aval.shape
    return dim if len(shape) == 4 and shape[dim] == size else REPLICATED


def _batch_operands(op: Op) -> tuple[int, ...]:
    """Query, key, value, bias, lengths and tables with the batch split."""
    size = _sizes(op, 0)[0]
    lengths = (0 if atom.aval.shape == (size,) else REPLICATED for atom in op.eqn.invars[4:6])
    return (0, 0, 0, _bias_entry(op, 0, size), *lengths, *(REPLICATED,) * _NUM_TABLES)


def _head_operands(op: Op) -> tuple[int, ...] | None:
    """The same with the heads split, where that is possible."""
    dim = _head_dim(op)
    query_heads, key_heads, _ = _sizes(op, dim)
    if op.eqn.params["mask_type"].value == _ALIBI:
        return None
    keys = REPLICATED if key_heads == 1 < query_heads else dim
    bias = _bias_entry(op, 1, query_heads)
    return (dim, keys, keys, bias, *(REPLICATED,) * (2 + _NUM_TABLES))


@rule("dot_product_attention_fwd_wrapper")
def forward(op: Op) -> Iterator[AxisStrategy]:
    """The output and, in training, the softmax statistics."""
    if not _may_split(op):
        return
    num_results = len(op.results)
    yield AxisStrategy(_batch_operands(op), (0, 0)[:num_results])
    heads = _head_operands(op)
    if heads is not None:
        yield AxisStrategy(heads, (_head_dim(op), 1)[:num_results])


@rule("dot_product_attention_bwd_wrapper")
def backward(op: Op) -> Iterator[AxisStrategy]:
    """Gradients of query, key, value and, where it is asked for, of the bias; linear in the output's."""
    if not _may_split(op):
        return
    yield _with_gradients(op, _batch_operands(op), (0, 0, 0))
    heads, dim = _head_operands(op), _head_dim(op)
    if heads is not None:
        yield _with_gradients(op, heads, (1, dim, dim))
    whole = (REPLICATED,) * (len(op.operands) - 1)
    yield AxisStrategy((*whole, PARTIAL), (PARTIAL,) * len(op.results))


def _with_gradients(op: Op, operands: tuple[int, ...], later: tuple[int, ...]) -> AxisStrategy:
    """A gradient lies as its operand does; of an operand that several devices share, it is a partial sum."""
    gradients = tuple(PARTIAL if entry == REPLICATED else entry for entry in operands[:4])
    return AxisStrategy((*operands, *later), gradients[: len(op.results)])
