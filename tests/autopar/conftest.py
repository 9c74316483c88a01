"""What the planner's tests share: tiny GPTs, models that are no more than their loss, a device, a plan."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launcher import models
from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.clusters.device import Device
from launcher.autopar.clusters.hosts import Cluster
from launcher.autopar.plans.plan import Plan
from launcher.autopar.plans.plan_file import read_plan
from launcher.autopar.programs.simulator import Durations
from launcher.config import GptConfig
from launcher.models.kernels import Kernels
from launcher.models.model import Model

Shapes = Mapping[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True, eq=False, kw_only=True)
class ToyModel:
    """What the planner reads of a `Model`, around a loss(params, state, batch, key_data)."""

    loss: Callable
    abstract_params: Shapes
    batch: Callable[[int], Shapes]
    abstract_state: Shapes = field(default_factory=dict)
    name: str = "toy"
    size: str = "tiny"
    dtype: str = "fp32"
    fingerprint: str = "toy"
    kernels: Kernels = field(default_factory=Kernels)

    def example_batch(self, batch_size: int) -> Shapes:
        return self.batch(batch_size)


def make_perceptron(*, hidden: int, inner: int, blocks: int = 1, dtype: str = "float32"):
    """Blocks of two matrix products, and a squared error."""
    widths = {"up": (hidden, inner), "down": (inner, hidden)}
    shapes = {
        f"{k}/{name}": jax.ShapeDtypeStruct(shape, dtype)
        for k in range(blocks)
        for name, shape in widths.items()
    }

    def loss(params, state, batch, key_data):
        x = batch["x"]
        for k in range(blocks):
            x = jax.nn.relu(x @ params[f"{k}/up"]) @ params[f"{k}/down"]
        return jnp.mean((x - batch["y"]) ** 2), (state, {})

    def batch(size):
        return {name: jax.ShapeDtypeStruct((size, hidden), dtype) for name in ("x", "y")}

    return ToyModel(loss=loss, abstract_params=shapes, batch=batch)


@pytest.fixture(scope="session")
def perceptron() -> Callable[..., ToyModel]:
    return make_perceptron


@pytest.fixture(scope="session")
def toy_model() -> type[ToyModel]:
    return ToyModel


@pytest.fixture(scope="session")
def tiny_gpt() -> Callable[..., Model]:
    """A GPT of the tiny size, with fields of the config as they are given; the same for the same."""

    @functools.cache
    def build(**fields) -> Model:
        return models.build(GptConfig(**{"size": "tiny", "dtype": "fp32", **fields}))

    return build


@pytest.fixture(scope="session")
def cpu8() -> Cluster:
    return load_cluster("cpu8")


@pytest.fixture(scope="session")
def device() -> Device:
    """An accelerator of round figures, whose matrix products reach its peak."""
    return Device(
        kind="test",
        memory_bytes=2**34,
        peak_flops_per_s={"fp32": 1e13},
        matmul_efficiency={"fp32": 1.0},
        memory_bytes_per_s=1e12,
        has_bf16=False,
        accelerator=True,
    )


@pytest.fixture
def plan() -> Plan:
    """Two stages of two layers on the two hosts of `cpu8`, with all that a plan can have."""
    return read_plan(pathlib.Path(__file__).parents[1] / "golden" / "plans" / "two_stages.json")


@pytest.fixture
def params() -> Shapes:
    """The parameters of that plan."""
    block = {"up/kernel": (64, 256), "up/bias": (256,)}
    blocks = {f"blocks/{i}/mlp/{name}": shape for i in range(4) for name, shape in block.items()}
    shapes = {"embedding/token": (256, 64), **blocks}
    return {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}


@pytest.fixture(scope="session")
def draw() -> Callable:
    """Random values for a tree of shapes; integers are below 3."""

    def drawn(shapes, seed: int = 0):
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda leaf: (
                rng.integers(0, 3, leaf.shape).astype(leaf.dtype)
                if jnp.issubdtype(leaf.dtype, jnp.integer)
                else rng.normal(size=leaf.shape).astype(leaf.dtype)
            ),
            shapes,
        )

    return drawn


def balanced_durations(num_stages, forward_s, backward_s, split_s=None):
    """Durations of equal stages with free communication; `split_s` are those of I and W."""
    halves = {}
    if split_s is not None:
        halves = {"backward_input_s": (split_s[0],) * num_stages}
        halves |= {"backward_weight_s": (split_s[1],) * num_stages}
    return Durations(
        forward_s=(forward_s,) * num_stages,
        backward_s=(backward_s,) * num_stages,
        synchronize_s=(0,) * num_stages,
        update_s=(0,) * num_stages,
        **halves,
    )


@pytest.fixture(scope="session")
def balanced():
    """Give `balanced_durations`; test files cannot import it."""
    return balanced_durations
