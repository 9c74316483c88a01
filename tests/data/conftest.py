"""A stand-in for the models: what the data asks of one, and nothing else."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import pytest


@dataclass(frozen=True, kw_only=True)
class StubModel:
    """A model's name, sizes and leaves (of one sample, without the batch dim)."""

    name: str
    leaves: dict[str, tuple[tuple[int, ...], str]]
    vocab_size: int | None = None

    def example_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
            for name, (shape, dtype) in self.leaves.items()
        }


@pytest.fixture
def language_model() -> Callable[..., StubModel]:
    def build(seq_len: int = 64, vocab_size: int | None = 256) -> StubModel:
        leaf = ((seq_len,), "int32")
        return StubModel(
            name="gpt", leaves={"tokens": leaf, "targets": leaf}, vocab_size=vocab_size
        )

    return build


@pytest.fixture
def image_model() -> Callable[..., StubModel]:
    def build(size: tuple[int, int, int] = (32, 32, 3), num_classes: int | None = 10) -> StubModel:
        leaves = {"images": (size, "float32"), "labels": ((), "int32")}
        return StubModel(name="wrn", leaves=leaves, vocab_size=num_classes)

    return build


@pytest.fixture
def custom_model() -> Callable[..., StubModel]:
    def build(vocab_size: int | None = None, **leaves: tuple[tuple[int, ...], str]) -> StubModel:
        return StubModel(name="custom", leaves=leaves, vocab_size=vocab_size)

    return build
