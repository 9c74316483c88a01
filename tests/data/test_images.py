"""Image folders: labels by name, a split in every class, and what happens to a picture."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launcher import data
from launcher.config import ImagesDataConfig
from launcher.errors import ConfigError

COLOURS = {"ant": (255, 0, 0), "bee": (0, 255, 0), "cow": (0, 0, 255)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of ten images, each of one colour."""
    for name, colour in COLOURS.items():
        (tmp_path / name).mkdir()
        for index in range(10):
            Image.new("RGB", (12, 9), colour).save(tmp_path / name / f"{index}.png")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README").write_text("not a class")
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    return tmp_path


def _config(folder: Path, valid_fraction: float = 0.2) -> ImagesDataConfig:
    return ImagesDataConfig(path=str(folder), valid_fraction=valid_fraction)


def test_labels_are_the_sorted_folder_names(folder: Path, image_model: Callable) -> None:
    batch = data.build(_config(folder), image_model((8, 8, 3)), 0).batch(0, 24)
    assert batch["images"].shape == (24, 8, 8, 3)
    assert batch["images"].dtype == np.float32
    assert batch["labels"].dtype == np.int32
    for image, label in zip(batch["images"], batch["labels"], strict=True):
        expected = np.asarray(tuple(COLOURS.values())[label]) / 127.5 - 1
        np.testing.assert_allclose(image, np.broadcast_to(expected, (8, 8, 3)), atol=1e-6)


def test_every_class_is_in_both_splits(folder: Path, image_model: Callable) -> None:
    dataset = data.build(_config(folder), image_model((4, 4, 3)), 0)
    for split, each in (("train", 8), ("valid", 2)):
        labels = dataset.batch(0, 3 * each, split)["labels"]
        assert np.bincount(labels).tolist() == [each] * 3


def test_a_batch_depends_on_seed_and_step_alone(folder: Path, image_model: Callable) -> None:
    first, again = (data.build(_config(folder), image_model((4, 4, 3)), 7) for _ in range(2))
    first.batch(0, 5)
    np.testing.assert_array_equal(first.batch(2, 5)["images"], again.batch(2, 5)["images"])


def test_an_image_is_scaled_to_cover_and_cropped_about_its_centre(
    tmp_path: Path, image_model: Callable
) -> None:
    stripes = np.zeros((10, 40, 3), np.uint8)
    stripes[:, 10:30] = 255  # twice as wide as high: exactly what a 2:1 model sees
    for name in ("a", "b"):
        (tmp_path / "x").mkdir(exist_ok=True)
        Image.fromarray(stripes).save(tmp_path / "x" / f"{name}.png")
    images = data.build(_config(tmp_path), image_model((5, 10, 3)), 0).batch(0, 1)["images"]
    # Bicubic scaling lets a little of the stripes' dark neighbours in at the very edge.
    assert images[0, :, 1:-1].min() > 0.9


def test_images_are_turned_upright(tmp_path: Path, image_model: Callable) -> None:
    (tmp_path / "x").mkdir()
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[:, :2] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn to the right: the white half is then on top
    for name in ("a", "b"):
        Image.fromarray(picture).save(tmp_path / "x" / f"{name}.png", exif=exif)
    image = data.build(_config(tmp_path), image_model((4, 4, 3)), 0).batch(0, 1)["images"][0]
    assert (image[:2] == 1).all()
    assert (image[2:] == -1).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_kind_of_picture_has_the_models_channels(
    mode: str, channels: int, tmp_path: Path, image_model: Callable
) -> None:
    (tmp_path / "x").mkdir()
    for index in range(2):
        Image.new(mode, (6, 6)).save(tmp_path / "x" / f"{index}.tiff")
    batch = data.build(_config(tmp_path), image_model((4, 4, channels)), 0).batch(0, 1)
    assert batch["images"].shape == (1, 4, 4, channels)


def test_a_damaged_image_is_named(folder: Path, image_model: Callable) -> None:
    message = r"cannot read the image .*\.png: .*: repair it, or rem"
    dataset = data.build(_config(folder), image_model((4, 4, 3)), 0)
    for file in folder.glob("*/*.png"):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ConfigError, match=message):
        dataset.batch(0, 2)
    with pytest.raises(ConfigError, match=message):  # the first of each class is looked at
        data.build(_config(folder), image_model((4, 4, 3)), 0)


@pytest.mark.parametrize("name", ["missing", "ant"])
def test_a_path_without_class_folders_is_refused(
    name: str, folder: Path, image_model: Callable
) -> None:
    with pytest.raises(ConfigError, match=rf"data\.path=\S*{name} is no folder with a folder of"):
        data.build(_config(folder / name), image_model(), 0)


def test_a_path_is_needed(image_model: Callable) -> None:
    with pytest.raises(ConfigError, match=r"data=images reads a folder, and data\.path=null: give"):
        data.build(ImagesDataConfig(), image_model(), 0)


def test_an_empty_class_is_named(folder: Path, image_model: Callable) -> None:
    (folder / "dog").mkdir()
    with pytest.raises(ConfigError, match=r"the class folder .*dog has no images \(\.bmp .*fill"):
        data.build(_config(folder), image_model(), 0)


def test_too_many_classes_are_refused(folder: Path, image_model: Callable) -> None:
    with pytest.raises(ConfigError, match="data=images has 3 classes, and .* labels below 2: "):
        data.build(_config(folder), image_model(num_classes=2), 0)


def test_one_image_in_every_class_is_too_few(tmp_path: Path, image_model: Callable) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / name / "1.png")
    with pytest.raises(ConfigError, match="2 images in 2 classes, one each, and none is left"):
        data.build(_config(tmp_path), image_model(), 0)


def test_channels_that_no_picture_has_are_refused(folder: Path, image_model: Callable) -> None:
    with pytest.raises(ConfigError, match="images of 2 channels, and data=images gives 1 or 3"):
        data.build(_config(folder), image_model((4, 4, 2)), 0)
