"""Batches addressed by (seed, step), from text, token files, images, or random numbers."""

from launcher.config import DataConfig
from launcher.data.dataset import Dataset
from launcher.data.digits import build_digits
from launcher.data.images import build_images
from launcher.data.synthetic import build_synthetic
from launcher.data.text import build_text
from launcher.data.tokens import build_tokens
from launcher.errors import ConfigError
from launcher.models.model import Model


def build(config: DataConfig, model: Model, seed: int) -> Dataset:
    """Build the dataset that `data=` names, fitted to the model's batches."""
    match config.name:
        case "text":
            return build_text(config, model, seed)
        case "tokens":
            return build_tokens(config, model, seed)
        case "digits":
            return build_digits(config, model, seed)
        case "images":
            return build_images(config, model, seed)
        case "synthetic":
            return build_synthetic(model, seed)
        case _:
            raise ConfigError(
                f"data.name={config.name} is unknown: take data=text, tokens, digits, images or "
                f"synthetic"
            )


__all__ = ["Dataset", "build"]
