"""The user's own model: `model=custom model.target=my_package.my_module:build`.

`build(rngs, **args)` returns an `nnx.Module` with `loss(batch)` and `example_batch(batch_size)`. It
is foreign code, so what it gives is checked here, once, on shapes alone: all that follows may rely
on it.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from launcher.config import CustomConfig
from launcher.errors import ConfigError, LauncherError
from launcher.models.layers import Precision
from launcher.models.model import Model, fingerprint, make_model

DEFAULT_GLOBAL_BATCH = 32

# The samples in the batch that checks look at: a number that few other dims have.
_SAMPLES = 7

Build = Callable[..., Any]


@runtime_checkable
class _HasLoss(Protocol):
    def loss(self, batch: Any) -> Any: ...


@runtime_checkable
class _HasExampleBatch(Protocol):
    def example_batch(self, batch_size: int) -> Any: ...


@runtime_checkable
class _HasVocabulary(Protocol):
    vocab_size: int


def build_custom(config: CustomConfig, precision: Precision) -> Model:
    """Build the user's model from shapes alone, and check that it can be trained."""
    build = _load(config.target)
    with _blaming(config, "building the module"):
        model = make_model(
            functools.partial(_make_module, build, config),
            precision=precision,
            casts=True,
            name="custom",
            size="custom",
            dtype=config.dtype,
            sample_unit="samples",
            units_per_sample=1,
            vocab_size=None,
            default_global_batch=DEFAULT_GLOBAL_BATCH,
            fingerprint=fingerprint(config.target, config.args),
            overrides={
                "target": config.target,
                **{f"args.{name}": value for name, value in config.args.items()},
            },
        )
    _check_batch(config, model)
    _check_loss(config, model)
    return _with_vocabulary(config, model)


def _load(target: str) -> Build:
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ConfigError(
            f"{target!r} does not name a function (model.target={target}): "
            f"write it as my_package.my_module:build"
        )
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module does
        raise ConfigError(
            f"{module_name} cannot be imported: {_one_line(error)} (model.target={target}): "
            f"install it, or put its folder on PYTHONPATH"
        ) from error
    try:
        build = attrgetter(attribute)(module)
    except AttributeError as error:
        raise ConfigError(
            f"{module_name} has no {attribute} (model.target={target}): "
            f"name a function of it that builds the model"
        ) from error
    if not callable(build):
        raise ConfigError(
            f"{target} is a {type(build).__name__}, not a function (model.target={target}): "
            f"name a function build(rngs, **args)"
        )
    return build


def _make_module(build: Build, config: CustomConfig, rngs: nnx.Rngs) -> nnx.Module:
    module = build(rngs, **config.args)
    where = f"what {config.target} returned"
    if not isinstance(module, nnx.Module):
        raise ConfigError(
            f"{where} is a {type(module).__name__}, not an nnx.Module "
            f"(model.target={config.target}): return a Flax module"
        )
    for name, protocol in (
        ("loss(batch)", _HasLoss),
        ("example_batch(batch_size)", _HasExampleBatch),
    ):
        if not isinstance(module, protocol):
            raise ConfigError(
                f"{where}, a {type(module).__name__}, has no method {name} "
                f"(model.target={config.target}): add it, see docs/models.md"
            )
    _check_attributes(config, module)
    return module


def _check_attributes(config: CustomConfig, module: nnx.Module) -> None:
    """Refuse arrays that Flax takes for constants: made while tracing, they cannot leave it."""
    for path, node in nnx.iter_graph(module):
        if not isinstance(node, nnx.Pytree):
            continue
        _, state = nnx.split(node)
        known = {leaf_path[0] for leaf_path, _ in nnx.to_flat_state(state)}
        for name, value in vars(node).items():
            if isinstance(value, jax.core.Tracer) and name not in known:
                place = "/".join(map(str, (*path, name)))
                raise ConfigError(
                    f"the attribute {place} is an array that Flax would take for a constant "
                    f"(model.target={config.target}): wrap it in nnx.data(...) or nnx.Variable(...)"
                )


def _check_batch(config: CustomConfig, model: Model) -> None:
    with _blaming(config, f"example_batch({_SAMPLES})"):
        batch = model.example_batch(_SAMPLES)
    if not isinstance(batch, dict) or not batch:
        raise ConfigError(
            f"example_batch returned a {type(batch).__name__}, not a dict with an entry for each "
            f"input (model.target={config.target}): return name -> jax.ShapeDtypeStruct"
        )
    for name, shape in batch.items():
        if not isinstance(name, str) or not isinstance(shape, jax.ShapeDtypeStruct):
            raise ConfigError(
                f"example_batch has {name!r}: {type(shape).__name__}, not a name and a shape "
                f"(model.target={config.target}): return name -> jax.ShapeDtypeStruct"
            )
        if shape.shape[:1] != (_SAMPLES,):
            raise ConfigError(
                f"example_batch({_SAMPLES}) gives {name!r} the shape {shape.shape}, without the "
                f"{_SAMPLES} samples as dim 0 (model.target={config.target}): put them first"
            )


def _check_loss(config: CustomConfig, model: Model) -> None:
    arguments = (model.abstract_params, model.abstract_state, model.example_batch(_SAMPLES))
    key_data = jax.ShapeDtypeStruct((2,), jnp.uint32)
    with _blaming(config, "loss(batch)"):
        result, new_state = jax.eval_shape(model.skeleton.call_loss, *arguments, key_data)
    _check_result(config, result)
    if new_state != model.abstract_state:
        changed = set(new_state.items()) ^ set(model.abstract_state.items())
        raise ConfigError(
            f"loss changes the variable {min(changed, key=str)[0]!r} in shape or dtype, or adds or "
            f"drops it (model.target={config.target}): make all variables in the constructor"
        )
    with _blaming(config, "loss(batch) in evaluation, after module.eval(),"):
        jax.eval_shape(model.eval_loss, *arguments)
    _check_gradient(config, model, (*arguments, key_data))


def _check_gradient(config: CustomConfig, model: Model, arguments: tuple[Any, ...]) -> None:
    """Refuse a loss that JAX cannot differentiate: plans are made of both passes."""
    differentiate = jax.grad(model.loss, has_aux=True, allow_int=True)
    try:
        jax.eval_shape(differentiate, *arguments)
    except Exception as error:  # JAX's own of many kinds, or whatever a rule of the user's raises
        raise ConfigError(
            f"JAX cannot differentiate loss(batch): {_one_line(error)} "
            f"(model.target={config.target} model.args={config.args}): replace that operation, give "
            f"it a derivative with jax.custom_vjp, or put jax.lax.stop_gradient around what it reads; "
            f"debug=true shows where"
        ) from error


def _check_result(config: CustomConfig, result: Any) -> None:
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
        raise ConfigError(
            f"loss returned {_kind(result)}, not a scalar and a dict of metrics "
            f"(model.target={config.target}): return (loss, {{}}) where there are none"
        )
    loss, metrics = result
    if not _is_scalar(loss) or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ConfigError(
            f"loss returned {_kind(loss)}, not a floating-point scalar "
            f"(model.target={config.target}): reduce it, for example with jnp.mean"
        )
    for name, metric in metrics.items():
        if not isinstance(name, str) or not _is_scalar(metric):
            raise ConfigError(
                f"loss has the metric {name!r}, which is {_kind(metric)}, not a scalar with a name "
                f"(model.target={config.target}): reduce it, or leave it out"
            )


def _with_vocabulary(config: CustomConfig, model: Model) -> Model:
    module = model.skeleton.hollow()
    if not isinstance(module, _HasVocabulary):
        return model
    if not isinstance(module.vocab_size, int) or module.vocab_size < 1:
        raise ConfigError(
            f"the attribute vocab_size is {module.vocab_size!r}, not a positive integer "
            f"(model.target={config.target}): set how many values integers of a batch take"
        )
    return dataclasses.replace(model, vocab_size=module.vocab_size)


@contextmanager
def _blaming(config: CustomConfig, doing: str) -> Iterator[None]:
    """Report whatever the user's code raises as an error in the user's model."""
    try:
        yield
    except LauncherError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{doing} failed: {_one_line(error)} (model.target={config.target} "
            f"model.args={config.args}): correct it; debug=true shows where"
        ) from error


def _is_scalar(value: Any) -> bool:
    return isinstance(value, jax.ShapeDtypeStruct) and value.shape == ()


def _kind(value: Any) -> str:
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"{value.dtype}{list(value.shape)}"
    return f"a {type(value).__name__}"


def _one_line(error: BaseException) -> str:
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}"
