"""Text from a decoder: the model's own logits are the oracle, and what cannot write is refused at once."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launcher import data, models
from launcher.config import GptConfig, MoeConfig, SyntheticDataConfig, TextDataConfig, WrnConfig
from launcher.errors import ConfigError
from launcher.runtime.training.run_end import RunEnd
from launcher.runtime.training.sampling import SampleSettings, drawn, make_sampler, why_not

CONFIGS = {"gpt": GptConfig, "moe": MoeConfig}


def build(family: str):
    return models.build(CONFIGS[family](size="tiny", dtype="fp32", layers=2, seq_len=16))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be, that is the question. é ✓\n" * 40, encoding="utf-8")
    return path


def settings(**changes) -> SampleSettings:
    fields = {"num_tokens": 8, "prompt": "to be", "temperature": 0.0, "top_k": 0, "seed": 3}
    return SampleSettings(**fields | changes)


def sampler_of(model, text, tokenizer="bytes", **changes):
    dataset = data.build(TextDataConfig(path=str(text), tokenizer=tokenizer), model, 0)
    return make_sampler(settings(**changes), model, dataset, None)


def spread(array):
    """On four devices, in shards where its first dim divides."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("all",))
    spec = PartitionSpec("all") if array.ndim and array.shape[0] % 4 == 0 else PartitionSpec()
    return jax.device_put(array, NamedSharding(mesh, spec))


@pytest.mark.parametrize("family", CONFIGS)
def test_the_likeliest_tokens_are_those_of_the_models_own_logits(family, text):
    model = build(family)
    params, state = model.init(0)
    arrays = {path: spread(array) for path, array in {**params, **state}.items()}
    found = sampler_of(model, text, num_tokens=20).text(arrays)
    assert found.startswith(b"to be")
    assert len(found) == 25
    ids = list(b"to be")
    for _ in range(20):  # beyond the window of 16
        window = ids[-16:]
        padded = jnp.array([window + [0] * (16 - len(window))])
        scores = model.logits(params, state, padded)[0, len(window) - 1, :256]
        ids.append(int(jnp.argmax(scores)))
    assert found == bytes(ids)


def test_logits_are_those_that_the_loss_is_made_of():
    model = build("gpt")
    params, state = model.init(0)
    tokens = jnp.arange(32).reshape(2, 16)
    scores = jax.nn.log_softmax(model.logits(params, state, tokens))
    wanted = -jnp.mean(jnp.take_along_axis(scores, tokens[..., None] + 1, axis=-1))
    loss, _ = model.eval_loss(params, state, {"tokens": tokens, "targets": tokens + 1})
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)


def test_a_seed_gives_one_text_and_another_seed_another(text):
    model = build("gpt")
    arrays = model.init(0)[0]
    texts = [
        sampler_of(model, text, temperature=1.0, seed=seed).text(arrays)
        for seed in (1, 1, 2, 2**63 - 1)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def draws(scores, **changes) -> np.ndarray:
    one = jax.jit(lambda key: drawn(scores, settings(**changes), key))
    keys = np.stack([np.zeros(4000, np.uint32), np.arange(4000, dtype=np.uint32)], axis=1)
    return np.bincount(np.asarray(jax.vmap(one)(keys)), minlength=len(scores)) / 4000


def test_draws_follow_the_softmax_of_temperature_and_top_k():
    scores = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    # Four standard deviations of a share of 4000 draws are below 0.032.
    np.testing.assert_allclose(draws(scores, temperature=1.0), [0.1, 0.4, 0.2, 0.3], atol=0.032)
    cut = draws(scores, temperature=1.0, top_k=2)
    np.testing.assert_allclose(cut, [0, 4 / 7, 0, 3 / 7], atol=0.032)
    assert cut[0] == cut[2] == 0
    squares = np.array([0.01, 0.16, 0.04, 0.09])
    wanted = squares / squares.sum()
    np.testing.assert_allclose(draws(scores, temperature=0.5), wanted, atol=0.032)
    assert draws(scores, temperature=0.0)[1] == 1


def test_only_tokens_that_can_be_written_are_drawn(text):
    model = models.build(
        GptConfig(size="tiny", dtype="fp32", layers=1, seq_len=16, vocab_size=1000)
    )
    arrays = model.init(0)[0]
    assert len(sampler_of(model, text, temperature=1e6, num_tokens=40).text(arrays)) == 45


def test_a_bpe_is_turned_back_byte_for_byte(text):
    model = models.build(GptConfig(size="tiny", dtype="fp32", layers=1, seq_len=16, vocab_size=300))
    sampler = sampler_of(model, text, tokenizer="bpe", num_tokens=5, prompt="é ✓ be")
    assert sampler.text(model.init(0)[0]).startswith("é ✓ be".encode())


@pytest.mark.parametrize(
    ("model", "source", "memory_bytes", "words"),
    [
        (WrnConfig(size="tiny", dtype="fp32"), None, None, "wants text of model=wrn, which writes"),
        (GptConfig(size="tiny", dtype="fp32"), None, None, "only data=text has a tokenizer"),
        (GptConfig(size="tiny", dtype="fp32"), "text", 2**20, "takes 1.01 MiB, and one has 1 MiB"),
    ],
)
def test_what_cannot_be_sampled_is_refused(text, model, source, memory_bytes, words):
    model = models.build(model)
    config = TextDataConfig(path=str(text)) if source else SyntheticDataConfig()
    dataset = data.build(config, model, 0)
    with pytest.raises(ConfigError, match=f"train.sample_tokens=8 .*{words}") as caught:
        make_sampler(settings(), model, dataset, memory_bytes)
    assert caught.value.exit_status == 2


def test_weights_that_fit_no_device_any_more_leave_the_sample_out(tmp_path, caplog):
    class Full:
        id = 0

        def memory_stats(self):
            return {"bytes_limit": 2**30, "bytes_in_use": 2**30 - 2**20}

    device = Full()
    part = SimpleNamespace(device=device, data=SimpleNamespace(nbytes=2**19))
    array = SimpleNamespace(
        addressable_shards=[part], devices=lambda: {device}, size=2**20, dtype=np.dtype("f4"),
        sharding=SimpleNamespace(is_fully_replicated=False),
    )  # fmt: skip
    reason = "the weights take 4.8 MiB more on one device, and 1 MiB are free there"
    assert why_not({"a": array}) == reason
    ending = RunEnd(
        run_dir=tmp_path, model=None, plan=None, arrays=lambda: {"a": array}, exports=False,
        sampler="never called",
    )  # fmt: skip
    ending(3, interrupted=False)
    assert f"train.sample_tokens is left out: {reason}" in caplog.text
    assert not list(tmp_path.iterdir())
