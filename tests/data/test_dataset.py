"""The check that a model can be fed: it names the model's leaves, the data's, and what fits."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from launcher import data, models
from launcher.config import (
    DataConfig,
    DigitsDataConfig,
    GptConfig,
    ImagesDataConfig,
    SyntheticDataConfig,
    TextDataConfig,
    TokensDataConfig,
    WrnConfig,
)
from launcher.errors import ConfigError


@pytest.mark.parametrize(
    "config", [TextDataConfig(), TokensDataConfig(path="nowhere")], ids=["text", "tokens"]
)
def test_image_models_are_told_to_take_images(config: DataConfig, image_model: Callable) -> None:
    wants = r"model=wrn wants images float32\[B,32,32,3\], labels int32\[B\]"
    gives = rf"data={config.name} gives tokens, targets: take data=digits or data=images"
    with pytest.raises(ConfigError, match=f"{wants}, and {gives}"):
        data.build(config, image_model(), 0)


@pytest.mark.parametrize(
    "config", [DigitsDataConfig(), ImagesDataConfig(path="nowhere")], ids=["digits", "images"]
)
def test_language_models_are_told_to_take_text(
    config: DataConfig, language_model: Callable
) -> None:
    wants = r"model=gpt wants tokens int32\[B,64\], targets int32\[B,64\]"
    gives = rf"data={config.name} gives images, labels: take data=text or data=tokens"
    with pytest.raises(ConfigError, match=f"{wants}, and {gives}"):
        data.build(config, language_model(), 0)


@pytest.mark.parametrize(
    "config",
    [TextDataConfig(), TokensDataConfig(path=""), DigitsDataConfig(), ImagesDataConfig(path="")],
    ids=lambda config: config.name,
)
@pytest.mark.parametrize("leaves", [{}, {"x": ((3,), "float32")}, {"labels": ((), "int32")}])
def test_foreign_models_are_told_to_take_synthetic(
    config: DataConfig, leaves: dict, custom_model: Callable
) -> None:
    with pytest.raises(ConfigError, match=r"model=custom wants .* take data=synthetic"):
        data.build(config, custom_model(**leaves), 0)


def test_an_unknown_name_is_refused(language_model: Callable) -> None:
    with pytest.raises(ConfigError, match=r"data\.name=audio is unknown: take data=text"):
        data.build(DataConfig(name="audio"), language_model(), 0)


@pytest.mark.parametrize(
    ("config", "module", "message"),
    [
        (DigitsDataConfig(), "sklearn.datasets", "data=digits needs the package scikit-learn"),
        (ImagesDataConfig(path="x"), "PIL.Image", "data=images needs the package pillow"),
        (
            TextDataConfig(tokenizer="bpe"),
            "tokenizers",
            "data.tokenizer=bpe needs the package tokenizers",
        ),
        (TextDataConfig(), "pydoc_data", r"without its documentation .*: give data\.path="),
    ],
)
def test_a_missing_package_is_named(
    config: DataConfig,
    module: str,
    message: str,
    language_model: Callable,
    image_model: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    model = language_model() if config.name == "text" else image_model()
    with pytest.raises(ConfigError, match=message):
        data.build(config, model, 0)


def test_building_for_a_foreign_model_is_possible_with_synthetic(custom_model: Callable) -> None:
    dataset = data.build(SyntheticDataConfig(), custom_model(x=((3,), "float32")), 0)
    assert dataset.batch(0, 2)["x"].shape == (2, 3)


@pytest.mark.parametrize(
    ("model_config", "configs"),
    [
        (GptConfig, (TextDataConfig(), TextDataConfig(tokenizer="bpe"), SyntheticDataConfig())),
        (WrnConfig, (DigitsDataConfig(), SyntheticDataConfig())),
    ],
    ids=["gpt", "wrn"],
)
def test_our_models_are_fed(
    model_config: type[GptConfig] | type[WrnConfig], configs: tuple[DataConfig, ...]
) -> None:
    model = models.build(model_config(size="tiny", dtype="fp32"))
    for config in configs:
        batch = data.build(config, model, 0).batch(0, 4)
        shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in batch.items()}
        wanted = model.example_batch(4)
        assert shapes == {name: (leaf.shape, leaf.dtype) for name, leaf in wanted.items()}


def test_importing_the_room_imports_no_heavy_package() -> None:
    heavy = {"sklearn", "PIL", "tokenizers", "pydoc_data.topics"}
    program = f"import sys, launcher.data; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
