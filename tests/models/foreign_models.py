"""Models of a user, for test_custom.py: they share no code with ours."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

NOT_A_FUNCTION = 3


class Perceptron(nnx.Module):
    """Classify vectors of integers, with everything that a module can carry."""

    vocab_size = 11

    def __init__(self, rngs: nnx.Rngs, hidden: int = 16):
        self.embed = nnx.Embed(self.vocab_size, hidden, rngs=rngs)
        self.inner = nnx.Linear(hidden, hidden, rngs=rngs)
        self.norm = nnx.BatchNorm(hidden, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(hidden, 3, rngs=rngs)
        self.offsets = nnx.data(jnp.arange(3.0))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def loss(self, batch):
        self.calls[...] += 1
        x = jnp.mean(self.embed(batch["words"]), axis=1)
        x = self.dropout(nnx.relu(self.norm(self.inner(x))))
        logits = self.head(x) + self.offsets
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(losses), {"right": jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])}

    def example_batch(self, batch_size):
        return {
            "words": jax.ShapeDtypeStruct((batch_size, 5), jnp.int32),
            "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        }


def build(rngs, **args):
    return Perceptron(rngs, **args)


class Line(nnx.Module):
    """A line through points; what its methods return is for each test to spoil."""

    def __init__(self, rngs, result="good", batch="good"):
        self.slope = nnx.Param(rngs.normal(()))
        self.result = result
        self.batch = batch

    def loss(self, batch):
        errors = (self.slope[...] * batch["x"] - batch["y"]) ** 2
        if self.result == "raises":
            raise RuntimeError("the first line\nthe second line")
        if self.result == "grows":
            self.extra = nnx.Variable(jnp.mean(errors))
        if self.result == "evaluates":
            assert self.is_training
        return {
            "vector": (errors, {}),
            "integer": (jnp.sum(batch["x"] > 0), {}),
            "scalar": jnp.mean(errors),
            "list": [jnp.mean(errors), {}],
            "metric": (jnp.mean(errors), {"errors": errors}),
        }.get(self.result, (jnp.mean(errors), {}))

    def example_batch(self, batch_size):
        spec = jax.ShapeDtypeStruct((batch_size,), jnp.float32)
        return {
            "good": {"x": spec, "y": spec},
            "tuple": (spec, spec),
            "empty": {},
            "arrays": {"x": jnp.zeros(batch_size), "y": spec},
            "transposed": {"x": jax.ShapeDtypeStruct((4, batch_size), jnp.float32), "y": spec},
            "scalar": {"x": jax.ShapeDtypeStruct((), jnp.float32), "y": spec},
        }[self.batch]


def line(rngs, **args):
    return Line(rngs, **args)


def line_with_vocabulary(rngs, vocab_size):
    module = Line(rngs)
    module.vocab_size = vocab_size
    return module


def no_module(rngs):
    return {"slope": 1.0}


class WithoutLoss(nnx.Module):
    def example_batch(self, batch_size):
        return {}


def without_loss(rngs):
    return WithoutLoss()


class WithoutExample(nnx.Module):
    def loss(self, batch):
        return 0.0, {}


def without_example(rngs):
    return WithoutExample()


class PlainArray(Line):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.inner = nnx.Linear(2, 2, rngs=rngs)
        self.inner.mask = jnp.ones(3)


def plain_array(rngs):
    return PlainArray(rngs)


class EvaluationFails(Line):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def loss(self, batch):
        if self.dropout.deterministic:
            raise ValueError("no evaluation here")
        return super().loss(batch)


def evaluation_fails(rngs):
    return EvaluationFails(rngs)


def raising(rngs):
    raise KeyError("no such layer")


class Underivable(Line):
    """Its loss has a value, and JAX has no gradient for it."""

    def __init__(self, rngs, kind):
        super().__init__(rngs)
        self.kind = kind

    def loss(self, batch):
        value = jnp.mean(self.slope[...] * batch["x"])
        if self.kind == "stopped":
            value = value + _halved(jax.lax.stop_gradient(value))
        if self.kind == "loop":
            value = _halved(value)
        if self.kind == "callback":
            value = jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((), value.dtype), value)
        if self.kind == "svd":
            left, _, _ = jnp.linalg.svd(value * jnp.ones((2, 3)))
            value = jnp.sum(left)
        if self.kind == "rule":
            value = _with_broken_rule(value)
        return value, {}


def _halved(value):
    return jax.lax.while_loop(lambda x: x > 1, lambda x: x / 2, value)


@jax.custom_vjp
def _with_broken_rule(value):
    return value


_with_broken_rule.defvjp(lambda value: (value, None), lambda _, cotangent: [][0])


def underivable(rngs, kind):
    return Underivable(rngs, kind)
