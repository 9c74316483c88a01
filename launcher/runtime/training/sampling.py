"""Text from a trained decoder, token by token, on one device.

The model's own forward pass gives the logits of a window of `seq_len` tokens; the last one's are drawn
from. Left out: a cache of keys and values (each token costs a whole window), and plans: where the weights
do not fit on one device, there is no sample. Tokens beyond `seq_len` push the first ones out of the window.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from launcher.autopar.text.wording import size
from launcher.data.dataset import Dataset
from launcher.data.tokenizer import Tokenizer
from launcher.data.windows import TokenWindows
from launcher.errors import ConfigError
from launcher.models.model import Model

# Families whose modules have `logits`.
DECODERS = ("gpt", "moe")
# What a forward pass needs besides the weights; a small part of them at the sizes that do not fit.
_ROOM = 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSettings:
    """What is to be written."""

    num_tokens: int
    prompt: str
    temperature: float  # 0: the likeliest token, always
    top_k: int  # 0: all tokens
    seed: int


@dataclass(frozen=True, slots=True)
class Sampler:
    """Writes text by a model; made before training, so that what is wrong is said then."""

    model: Model
    tokenizer: Tokenizer
    settings: SampleSettings

    def text(self, arrays: Mapping[str, Array]) -> bytes:
        """The prompt and what follows, as bytes; `arrays` are parameters and state, wherever they lie."""
        device = _device_of(arrays)
        params = {path: _brought(arrays[path], device) for path in self.model.abstract_params}
        state = {path: _brought(arrays[path], device) for path in self.model.abstract_state}
        ids = [int(i) for i in self.tokenizer.encode(self.settings.prompt)]
        with jax.default_device(device):
            ids += self._continuation(params, state, ids)
        return self.tokenizer.decode(ids)

    def _continuation(self, params, state, prompt: list[int]) -> list[int]:
        length = self.model.units_per_sample
        draw = jax.jit(partial(next_token, self.model, self.tokenizer.vocab_size, self.settings))
        ids = list(prompt)
        for number in range(self.settings.num_tokens):
            window = np.zeros((1, length), np.int32)
            seen = ids[-length:]
            window[0, : len(seen)] = seen
            # A seed may have more than the 32 bits that a key takes of it.
            key = np.array([self.settings.seed, number]).astype(np.uint32)
            ids.append(int(draw(params, state, window, len(seen) - 1, key)))
        return ids[len(prompt) :]


def next_token(
    model: Model, vocab_size: int, settings: SampleSettings,
    params, state, tokens_BS: Array, last: int, key_data: Array,
) -> Array:  # fmt: skip
    """Draw the token after position `last`, from those that the tokenizer has."""
    logits_BSV = model.logits(params, state, tokens_BS)
    scores_V = lax.dynamic_index_in_dim(logits_BSV[0], last, keepdims=False)[:vocab_size]
    return drawn(scores_V.astype(jnp.float32), settings, key_data)


def drawn(scores_V: Array, settings: SampleSettings, key_data: Array) -> Array:
    """Draw from the softmax of scores over the temperature, cut to the likeliest `top_k`."""
    if settings.temperature == 0:
        return jnp.argmax(scores_V)
    if 0 < settings.top_k < scores_V.shape[0]:
        least = lax.top_k(scores_V, settings.top_k)[0][-1]
        scores_V = jnp.where(scores_V >= least, scores_V, -jnp.inf)
    key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
    return jax.random.categorical(key, scores_V / settings.temperature)


def make_sampler(
    settings: SampleSettings, model: Model, dataset: Dataset, memory_bytes: float | None
) -> Sampler:
    """Check that the model writes text, and that this data can be turned back into it.

    Args:
        memory_bytes: of a device, where the weights have to fit; None where that is not known.
    """
    asked = f"train.sample_tokens={settings.num_tokens}"
    if model.name not in DECODERS:
        raise ConfigError(
            f"{asked} wants text of model={model.name}, which writes none: leave it out, or take "
            f"model={' or '.join(DECODERS)}"
        )
    if not isinstance(dataset, TokenWindows) or dataset.tokenizer is None:
        raise ConfigError(
            f"{asked} wants text, and only data=text has a tokenizer to write it with: leave it "
            f"out, or take data=text"
        )
    needed = _ROOM * sum(_bytes(shape) for shape in model.abstract_params.values())
    if memory_bytes is not None and needed > memory_bytes:
        raise ConfigError(
            f"{asked} runs the model on one device, which takes {size(needed)}, and one has "
            f"{size(memory_bytes)}: leave it out, and sample from train.export_weights=true elsewhere"
        )
    tokens = jax.ShapeDtypeStruct((1, model.units_per_sample), jnp.int32)
    jax.eval_shape(model.logits, model.abstract_params, model.abstract_state, tokens)
    return Sampler(model, dataset.tokenizer, settings)


def why_not(arrays: Mapping[str, Array]) -> str | None:
    """Say what keeps the weights from one device as it is now; None if nothing does."""
    device = _device_of(arrays)
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    needed = _ROOM * sum(_bytes(a) for a in arrays.values() if not _is_whole_on(a, device))
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    if needed <= free:
        return None
    return f"the weights take {size(needed)} more on one device, and {size(free)} are free there"


def _bytes(array: Array | jax.ShapeDtypeStruct) -> int:
    return array.size * array.dtype.itemsize


def _device_of(arrays: Mapping[str, Array]) -> jax.Device:
    """The device with the most of the weights already; the first of several."""
    held: dict[jax.Device, int] = {}
    for array in arrays.values():
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held, key=lambda device: (held[device], -device.id))


def _is_whole_on(array: Array, device: jax.Device) -> bool:
    return array.sharding.is_fully_replicated and device in array.devices()


def _brought(array: Array, device: jax.Device) -> Array:
    if _is_whole_on(array, device):
        return next(s.data for s in array.addressable_shards if s.device == device)
    return jax.device_put(array, device)
