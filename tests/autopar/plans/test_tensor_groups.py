"""Which parameters are of one group, and how their placements are told apart."""

import dataclasses

import jax
import numpy as np
import pytest
from plans import plan_of, stage_of

from launcher.autopar.plans.plan import ModelRef, Plan
from launcher.autopar.plans.tensor_groups import Placement, Split, tensor_groups

SHAPES = {
    "blocks/0/conv1/kernel": (3, 3, 8, 8),
    "blocks/1/conv1/kernel": (3, 3, 8, 8),
    "blocks/2/conv1/kernel": (3, 3, 8, 16),
    "head/kernel": (16, 100),
    "scale": (),
}
PARAMS = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in SHAPES.items()}
WHOLE = {path: (None,) * len(shape) for path, shape in SHAPES.items()}


@pytest.fixture
def plan() -> Plan:
    stage = stage_of((0, 1), mesh=(4, 1), params=WHOLE)
    return plan_of(stage, model=ModelRef(name="wrn", size="tiny"))


def with_specs(plan: Plan, **changes) -> Plan:
    return dataclasses.replace(plan, stages=(dataclasses.replace(plan.stages[0], **changes),))


def test_numbers_and_equal_shapes_make_a_group_and_the_largest_is_first(plan):
    groups = tensor_groups(plan, PARAMS)
    assert [(group.name, group.members, group.shape, group.num_bytes) for group in groups] == [
        ("head/kernel", 1, (16, 100), 6400),
        ("blocks/*/conv1/kernel", 2, (3, 3, 8, 8), 4608),
        ("blocks/2/conv1/kernel", 1, (3, 3, 8, 16), 4608),
        ("scale", 1, (), 4),
    ]
    assert groups[-1].placements[0].weights == Split(text="[]", shards=())


def test_without_shapes_tensors_with_more_dims_come_first(plan):
    groups = tensor_groups(plan, {})
    assert [(group.name, group.members) for group in groups] == [
        ("blocks/*/conv1/kernel", 3), ("head/kernel", 1), ("scale", 1),
    ]  # fmt: skip
    assert {group.num_bytes for group in groups} == {0}


def test_axes_of_one_device_split_nothing(plan):
    specs = {"head/kernel": ("tensor", ("data", "tensor"))}
    state = {"head/kernel": ("data", None)}
    (group,) = tensor_groups(with_specs(plan, params=specs, optimizer_state=state), PARAMS)
    assert group.placements == (
        Placement(
            stages=(0,),
            weights=Split(text="[-, data=4]", shards=(1, 4)),
            optimizer_state=Split(text="[data=4, -]", shards=(4, 1)),
        ),
    )


def test_members_that_lie_otherwise_are_another_placement(plan):
    specs = WHOLE | {"blocks/1/conv1/kernel": (None, None, None, "data")}
    group = tensor_groups(with_specs(plan, params=specs), PARAMS)[1]
    assert [placement.weights.text for placement in group.placements] == [
        "[-, -, -, -]", "[-, -, -, data=4]",
    ]  # fmt: skip
    assert group.placements[0].optimizer_state is None
