"""Brute force over every choice of small functions: none is cheaper than what was found."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from launcher import autopar
from launcher.autopar.whole_graph.sharded_graph import collectives
from launcher.autopar.whole_graph.solve_step import write_step


def random_function(seed):
    """A small function with shared values, products, sums and reductions."""
    choice = np.random.default_rng(seed).integers(0, 5, size=2)

    def function(x, w):
        values = [x, w]
        for kind in choice:
            a = values[-1]
            match kind:
                case 0:
                    values.append(a @ w)
                case 1:
                    values.append(jnp.tanh(a) + values[0])
                case 2:
                    values.append(a.T)
                case 3:
                    values.append(a * a.sum(0))
                case 4:
                    values.append(x.T @ a)
        return values[-1]

    return function


def check_no_choice_is_cheaper(zoo, seed):
    mesh = autopar.LogicalMesh(shape=(2,), alpha=(1.0,), beta=(1.0,))
    function = random_function(seed)
    sharded = autopar.auto_shard(function, zoo.shape(4, 4), zoo.shape(4, 4), mesh=mesh)
    step, choices = sharded.problem, sharded.problem.problem.choices
    keys = list(choices)
    assert np.prod([len(choices[key]) for key in keys]) <= 600_000
    best = min(
        sum(c.cost for c in collectives(write_step(step, dict(zip(keys, picks, strict=True)))))
        for picks in itertools.product(*(choices[key] for key in keys))
    )
    assert sharded.objective == pytest.approx(best)


class TestRegret:
    @pytest.mark.parametrize("seed", range(4))
    def test_no_choice_is_cheaper(self, zoo, seed):
        check_no_choice_is_cheaper(zoo, seed)

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(4, 60))
    def test_no_choice_is_cheaper_for_many(self, zoo, seed):
        check_no_choice_is_cheaper(zoo, seed)
