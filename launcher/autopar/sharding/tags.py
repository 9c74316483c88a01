"""Following one dim of a tensor through the ops: which dim of each value is the batch, or the experts.

A tag marks a dim of a value. An op hands a tag from its operands to its results where one of its sharding
choices splits the tagged dims together; so the rules that say how ops may be split also say where a dim
goes. The planner uses tags to hold the data axis to the batch dim, as Alpa does on two-dimensional meshes
(force_batch_dim_to_mesh_dim), and to let experts take its place.
"""

from collections.abc import Iterable, Mapping

from jax.extend.core import Literal
from jax.extend.core import primitives as prim

from launcher.autopar.graphs.graph import Op, Value
from launcher.autopar.sharding.rules import axis_choices

Tags = dict[Value, int]


def propagate(ops: Iterable[Op], seeds: Mapping[Value, int]) -> Tags:
    """Spread the tags of some values forward through the ops."""
    tags = dict(seeds)
    for op in ops:
        wanted = {
            index: tags[operand]
            for index, operand in enumerate(op.operands)
            if not isinstance(operand, Literal) and operand in tags
        }
        if not wanted:
            continue
        choice = _best_match(op, wanted)
        if choice is not None:
            found = zip(op.results, choice.results, strict=True)
            tags |= {value: entry for value, entry in found if entry >= 0}
    return tags


def _best_match(op: Op, wanted: Mapping[int, int]):
    """The choice that splits the most tagged operands at their tags, and no tagged operand elsewhere."""
    best, best_count = None, 0
    for choice in axis_choices(op):
        entries = [(choice.operands[index], tag) for index, tag in wanted.items()]
        if any(entry >= 0 and entry != tag for entry, tag in entries):
            continue
        count = sum(entry == tag for entry, tag in entries)
        if count > best_count:
            best, best_count = choice, count
    return best


def expert_dims(ops: Iterable[Op], parameters: set[Value]) -> Tags:
    """The dim of each parameter that is a batch dim of a matrix product: one matrix per expert."""
    origin = {value: value for value in parameters}  # casts lead back to the parameter
    found: Tags = {}
    for op in ops:
        if op.primitive in (prim.convert_element_type_p, prim.copy_p):
            known = [origin[value] for value in op.values if value in origin]
            origin |= dict(zip(op.results, known, strict=False))
        for operand, dim in _batch_dims(op):
            if operand in origin:
                found.setdefault(origin[operand], dim)
    return found


def _batch_dims(op: Op) -> list[tuple[Value, int]]:
    """The operands of a matrix product that have batch dims, with the first of them."""
    if op.primitive is not prim.dot_general_p:
        return []
    _, batch_dims = op.eqn.params["dimension_numbers"]
    pairs = zip(op.operands, batch_dims, strict=True)
    return [(v, batch[0]) for v, batch in pairs if len(batch) and not isinstance(v, Literal)]
