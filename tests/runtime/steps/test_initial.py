"""Initial values one at a time: those of the model's own initialiser, and never many at once."""

import gc

import jax
import numpy as np
import pytest

from launcher import models
from launcher.autopar.graphs.trace import Role
from launcher.config import GptConfig, MoeConfig, WrnConfig
from launcher.runtime.steps.initial import initial_values

CONFIGS = {
    "gpt": GptConfig(size="tiny", dtype="fp32"),
    "moe": MoeConfig(size="tiny", dtype="fp32"),
    "wrn": WrnConfig(size="tiny", dtype="fp32"),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_values_are_those_of_the_initialiser_bit_for_bit(family):
    model = models.build(CONFIGS[family])
    params, state = model.init(7)
    found = {Role.PARAM: {}, Role.STATE: {}}
    for source, array in initial_values(model, 7):
        assert source.path not in found[source.role]
        found[source.role][source.path] = np.asarray(array)
    for role, wanted in ((Role.PARAM, params), (Role.STATE, state)):
        assert found[role].keys() == wanted.keys()
        for path, array in wanted.items():
            assert found[role][path].dtype == array.dtype
            np.testing.assert_array_equal(found[role][path], array, err_msg=path)


def test_a_value_is_let_go_when_the_next_ones_are_made():
    model = models.build(GptConfig(size="tiny", dtype="fp32", layers=12))
    total = 4 * model.num_parameters
    largest = max(4 * np.prod(leaf.shape) for leaf in model.abstract_params.values())
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    most = 0
    for _, array in initial_values(model, 7):
        del array
        most = max(most, sum(a.nbytes for a in jax.live_arrays()) - before)
    assert most <= 4 * largest < total / 4
