"""Known picks cost the same, priced alone or among all choices; where they cannot be taken, both say so."""

import pytest

from launcher import models
from launcher.autopar import load_cluster
from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.clusters.mesh import logical_mesh
from launcher.autopar.intra_op.intra_op import IntraOpPlanner
from launcher.autopar.intra_op.picked_fragment import NotOfferedError
from launcher.autopar.intra_op.stage_problem import StageSettings
from launcher.autopar.realized.realize import layered_model
from launcher.autopar.sharding.restrictions import Restrictions
from launcher.config import GptConfig, MoeConfig, WrnConfig

MODELS = {
    "gpt": GptConfig(size="tiny", dtype="fp32"),
    "moe": MoeConfig(size="tiny", dtype="fp32"),
    "wrn": WrnConfig(size="tiny", dtype="fp32"),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return models.build(MODELS[request.param])


@pytest.fixture(scope="module")
def settings():
    cluster = load_cluster("1xp3")

    def made(data, tensor, **fields):
        return StageSettings(
            mesh=logical_mesh(cluster, hosts=1, devices=data * tensor, data=data),
            compute=ComputeModel(cluster.device),
            restrictions=Restrictions(frozenset({0}) if data > 1 else frozenset()),
            **{"num_microbatches": 8, **fields},
        )

    return made


def solved(model, settings, microbatch_size=16):
    planner = IntraOpPlanner(layered_model(model, microbatch_size))
    return planner.solve(0, len(planner.model.layers), settings).picks


def with_all_choices(model, microbatch_size, settings, picks):
    """The price of picks after the problem of all choices has been built."""
    planner = IntraOpPlanner(layered_model(model, microbatch_size))
    whole = (0, len(planner.model.layers))
    problem = planner.problem(*whole, settings)
    if any(picks.get(key) not in choices for key, choices in problem.choices.items()):
        return None
    return planner.reprice(*whole, settings, picks)


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("mesh", [(4, 1), (2, 2), (1, 4)])
def test_the_price_is_that_among_all_choices(model, settings, mesh, zero):
    picks = solved(model, settings(*mesh, zero=3 if zero == 3 else 0))
    now = settings(*mesh, zero=zero, num_microbatches=4)
    planner = IntraOpPlanner(layered_model(model, 32))
    whole = (0, len(planner.model.layers))
    alone = planner.reprice_if_possible(*whole, now, picks)
    among = with_all_choices(model, 32, now, picks)
    assert alone.group_seconds == among.group_seconds
    assert alone.seconds == among.seconds
    assert planner.reduce_s(*whole, alone) == planner.reduce_s(*whole, among)


@pytest.mark.parametrize("mesh", [(4, 1), (2, 2)])
def test_nothing_else_is_built(model, settings, mesh):
    """Or all of it, where a value goes by a spec that neither its maker nor a reader has."""
    picks = solved(model, settings(*mesh))
    planner = IntraOpPlanner(layered_model(model, 32))
    problem = planner.problem(0, len(planner.model.layers), settings(*mesh), picks)
    inside = {key: found for key, found in problem.choices.items() if key[0] == "op"}
    assert inside
    assert all(found == (picks[key],) for key, found in inside.items())


def test_a_microbatch_that_the_data_axis_does_not_divide(model, settings):
    now = settings(4, 1)
    picks = solved(model, now)
    planner = IntraOpPlanner(layered_model(model, 2))
    whole = (0, len(planner.model.layers))
    with pytest.raises(NotOfferedError):
        planner.problem(*whole, now, picks)
    assert planner.reprice_if_possible(*whole, now, picks) is None
    assert with_all_choices(model, 2, now, picks) is None


def test_picks_of_nothing(model, settings):
    planner = IntraOpPlanner(layered_model(model, 16))
    assert planner.reprice_if_possible(0, len(planner.model.layers), settings(2, 2), {}) is None
