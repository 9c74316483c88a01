"""Weights as safetensors: the package's own reader is the oracle; files that do not fit are refused."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from plans import plan_of, stage_of
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from launcher import models
from launcher.autopar.graphs.trace import Role
from launcher.config import GptConfig, WrnConfig
from launcher.errors import ConfigError, StorageError
from launcher.runtime.checkpoints.weights import (
    DTYPES,
    describe,
    held_arrays,
    open_weights,
    write_weights,
)


def sharded(array, *spec):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


@pytest.fixture
def model():
    return models.build(GptConfig(size="tiny", dtype="fp32", layers=1))


@pytest.fixture
def arrays(model):
    return model.init(0)[0]


def test_the_package_reads_what_is_written_from_shards(tmp_path):
    rng = np.random.default_rng(0)
    wanted = {
        "blocks/0/kernel": rng.normal(size=(8, 6)).astype(np.float32),
        "blocks/0/bias": rng.normal(size=6).astype(np.float16),
        "count": np.array(7, np.int32),
        "empty": np.zeros((0, 3), np.float32),
        "flags": np.array([True, False, True]),
        "whole": rng.normal(size=(4, 4)).astype(np.float32),
    }
    given = {name: jnp.asarray(array) for name, array in wanted.items()}
    given["blocks/0/kernel"] = sharded(wanted["blocks/0/kernel"], "tensor", "data")
    given["whole"] = sharded(wanted["whole"])
    path = tmp_path / "weights.safetensors"
    write_weights(path, given, {"step": "3", "model": "gpt"})
    found = load_file(path)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"step": "3", "model": "gpt"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.safetensors"]


def test_the_data_is_aligned_and_the_dtype_is_kept(tmp_path):
    path = tmp_path / "weights.safetensors"
    values = jnp.arange(6, dtype=jnp.bfloat16)
    write_weights(path, {"a": values}, {})
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length])["a"] == {
        "dtype": "BF16", "shape": [6], "data_offsets": [0, 12],
    }  # fmt: skip
    np.testing.assert_array_equal(np.frombuffer(data[8 + length :], DTYPES["BF16"]), values)


def test_a_tensor_is_gathered_without_leaving_a_copy_on_the_host(tmp_path):
    array = sharded(np.arange(16.0, dtype=np.float32).reshape(4, 4), "data")
    write_weights(tmp_path / "w", {"a": array}, {})
    assert array._npy_value is None


@pytest.mark.parametrize("config", [GptConfig(size="tiny", dtype="fp32"), WrnConfig(size="tiny")])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, config):
    config.dtype = "fp32"
    model = models.build(config)
    params, state = model.init(1)
    path = tmp_path / "w.safetensors"
    write_weights(path, {**params, **state}, {"step": "12"})
    file = open_weights(path, model)
    assert file.step == 12
    found = {(source.role, source.path): array for source, array in file.values(model)}
    wanted = {(Role.PARAM, p): a for p, a in params.items()}
    wanted |= {(Role.STATE, p): a for p, a in state.items()}
    assert found.keys() == wanted.keys()
    for key, array in wanted.items():
        np.testing.assert_array_equal(found[key], array)


def test_files_of_the_package_can_be_read(tmp_path, model, arrays):
    path = tmp_path / "w.safetensors"
    save_file({name: np.asarray(array) for name, array in arrays.items()}, path)
    file = open_weights(path, model)
    assert file.step == 0
    for source, array in file.values(model):
        np.testing.assert_array_equal(array, arrays[source.path])


def test_each_parameter_is_taken_from_its_owner():
    class Stage:
        def __init__(self, params, state):
            self.params, self.state = params, state

    stages = {0: Stage({"a": 1, "tied": 2}, {}), 1: Stage({"b": 3, "tied": 4}, {"mean": 5})}
    assert held_arrays({"a": 0, "b": 1, "tied": 1}, stages) == {
        "a": 1,
        "b": 3,
        "tied": 4,
        "mean": 5,
    }


def refusal(path, model) -> str:
    with pytest.raises(ConfigError) as caught:
        open_weights(path, model)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file(tmp_path, model):
    message = refusal(tmp_path / "nowhere", model)
    assert "cannot read model.weights=" in message
    assert "No such file or directory: give a safetensors file" in message


def changed(arrays, model, tmp_path, **changes):
    path = tmp_path / "w.safetensors"
    kept = {name: array for name, array in {**arrays, **changes}.items() if array is not None}
    write_weights(path, kept, {"model": "gpt", "size": "tiny", "dtype": "fp32"})
    return refusal(path, model)


def test_other_names_shapes_and_dtypes(tmp_path, model, arrays):
    bias = "final_norm/bias"
    here = "model=gpt model.size=tiny model.layers=1"
    # A file that says nothing of overrides may have had any.
    cure = "give the model that it was written by (model=gpt model.size=tiny model.dtype=fp32)"
    message = changed(arrays, model, tmp_path, **{bias: None, "spare": jnp.ones(2)})
    assert f"lacks 1, such as {bias} and has besides 1, such as spare, of the 16" in message
    assert message.endswith(cure)
    message = changed(arrays, model, tmp_path, **{bias: jnp.ones(3)})
    assert f"has {bias} as float32[3], and in {here} it is float32[64]" in message
    assert message.endswith(cure)
    message = changed(arrays, model, tmp_path, **{bias: jnp.ones(64, jnp.float16)})
    assert f"has {bias} as float16[64], and in {here} it is float32" in message
    assert "take the model.dtype that it was written with" in message


def test_a_file_names_the_sizes_that_were_overridden(tmp_path, model):
    other = models.build(GptConfig(size="tiny", dtype="fp32", layers=3, dropout=0.5))
    metadata = describe(other, plan_of(stage_of((0, 1), mesh=(1, 1))), 7)
    path = tmp_path / "w.safetensors"
    write_weights(path, {"a": jnp.ones(2)}, metadata)
    origin = "(model=gpt model.size=tiny model.dtype=fp32 model.layers=3 model.dropout=0.5)"
    assert refusal(path, model).endswith(f"give the model that it was written by {origin}")


def test_a_field_that_only_the_new_model_sets_is_named(tmp_path, model, arrays):
    path = tmp_path / "w.safetensors"
    write_weights(path, arrays, describe(model, plan_of(stage_of((0, 1), mesh=(1, 1))), 7))
    wider = models.build(GptConfig(size="tiny", dtype="fp32", layers=1, hidden=96))
    message = refusal(path, wider)
    assert (
        "in model=gpt model.size=tiny model.hidden=96 model.layers=1 it is float32[96]" in message
    )
    assert message.endswith("model.dtype=fp32 model.layers=1 model.hidden=64)")


def _with_header(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "do not hold the header"),
        (b"abc", "do not hold the header"),
        (struct.pack("<Q", 10**12) + b"{}", "do not hold the header"),
        (struct.pack("<Q", 2) + b"{]", "cannot be understood"),
        (struct.pack("<Q", 2) + b"[]", "cannot be understood"),
        (_with_header({"a": {**ONE, "dtype": "F4"}}, bytes(8)), "cannot be understood"),
        (_with_header({"a": {"dtype": "F32"}}, bytes(8)), "cannot be understood"),
        (_with_header({"a": ONE, "b": ONE}, bytes(8)), "one after the other"),
        (_with_header({"a": {**ONE, "shape": [3]}}, bytes(8)), "one after the other"),
        (_with_header({"a": ONE}, bytes(7)), "and its header"),
        (_with_header({"a": ONE}, bytes(9)), "and its header"),
    ],
)
def test_damaged_files(tmp_path, model, data, words):
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    message = refusal(path, model)
    assert "is no whole safetensors file: " in message
    assert words in message


def test_other_sizes_behind_the_same_shapes_are_warned_of(tmp_path, model, arrays, caplog):
    path = tmp_path / "w.safetensors"
    write_weights(path, arrays, {"fingerprint": "of another"})
    open_weights(path, model)
    assert f"(fingerprint of another, and here {model.fingerprint})" in caplog.text


def test_a_file_that_cannot_be_written_is_not_there(tmp_path, arrays):
    with pytest.raises(StorageError, match="cannot write .*nowhere/w.safetensors"):
        write_weights(tmp_path / "nowhere" / "w.safetensors", arrays, {})

    class Broken:
        dtype, shape, nbytes = np.dtype(np.float32), (1,), 4

        @property
        def addressable_shards(self):
            raise KeyboardInterrupt

    path = tmp_path / "w.safetensors"
    path.write_text("the old one")
    with pytest.raises(KeyboardInterrupt):
        write_weights(path, {"a": jnp.ones(2), "b": Broken()}, {})
    assert path.read_text() == "the old one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]
