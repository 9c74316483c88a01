"""The digits: real images at any size, split and labelled."""

from collections.abc import Callable

import numpy as np
import pytest

from launcher import data
from launcher.config import DigitsDataConfig
from launcher.errors import ConfigError


def test_pixels_are_repeated_to_the_models_size(image_model: Callable) -> None:
    small = data.build(DigitsDataConfig(), image_model((8, 8, 1)), 0).batch(3, 16)
    large = data.build(DigitsDataConfig(), image_model((32, 16, 3)), 0).batch(3, 16)
    assert large["images"].shape == (16, 32, 16, 3)
    assert large["images"].dtype == np.float32
    repeated = small["images"].repeat(4, 1).repeat(2, 2).repeat(3, 3)
    np.testing.assert_array_equal(large["images"], repeated)
    np.testing.assert_array_equal(large["labels"], small["labels"])


@pytest.mark.parametrize("size", [(5, 5, 3), (37, 20, 1)])
def test_sizes_need_not_divide(size: tuple[int, int, int], image_model: Callable) -> None:
    batch = data.build(DigitsDataConfig(), image_model(size), 0).batch(0, 4)
    assert batch["images"].shape == (4, *size)


def test_values_are_within_one_and_all_classes_are_there(image_model: Callable) -> None:
    dataset = data.build(DigitsDataConfig(valid_fraction=0.1), image_model((8, 8, 1)), 0)
    for split, count in (("train", 1617), ("valid", 180)):
        batch = dataset.batch(0, count, split)
        assert batch["images"].min() == -1
        assert batch["images"].max() == 1
        assert batch["labels"].dtype == np.int32
        assert set(batch["labels"]) == set(range(10))


def test_no_held_out_image_is_seen_in_training(image_model: Callable) -> None:
    dataset = data.build(DigitsDataConfig(valid_fraction=0.1), image_model((8, 8, 1)), 0)
    epochs = [dataset.batch(0, n, split) for split, n in (("train", 1617), ("valid", 180))]
    seen = [{image.tobytes() for image in epoch["images"]} for epoch in epochs]
    assert len(seen[0]) == 1617
    assert len(seen[1]) == 180
    assert not seen[0] & seen[1]


def test_a_model_may_leave_its_classes_unsaid(image_model: Callable) -> None:
    data.build(DigitsDataConfig(), image_model(num_classes=None), 0)


def test_too_few_classes_are_refused(image_model: Callable) -> None:
    message = r"has 10 classes, and model=wrn takes labels below 9: give model\.num_classes=10 or"
    with pytest.raises(ConfigError, match=message):
        data.build(DigitsDataConfig(), image_model(num_classes=9), 0)


@pytest.mark.parametrize(
    ("leaves", "named"),
    [
        ({"images": ((8, 8), "float32")}, r"images float32\[B,8,8\]"),
        ({"images": ((8, 8, 3), "int32")}, r"images int32\[B,8,8,3\]"),
        ({"images": ((8, 8, 3), "float32"), "labels": ((10,), "int32")}, r"labels int32\[B,10\]"),
        ({"images": ((8, 8, 3), "float32"), "labels": ((), "float32")}, r"labels float32\[B\]"),
    ],
)
def test_leaves_of_another_shape_are_refused(
    leaves: dict, named: str, custom_model: Callable
) -> None:
    with pytest.raises(ConfigError, match=f"wants {named}, and data=digits gives .*synthetic"):
        data.build(DigitsDataConfig(), custom_model(**leaves), 0)
