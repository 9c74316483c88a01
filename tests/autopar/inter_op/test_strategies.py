"""What is taken over from another number of microbatches, and where a price on memory changes nothing."""

from dataclasses import replace

import pytest

from launcher import models
from launcher.autopar import load_cluster
from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.clusters.mesh import logical_mesh
from launcher.autopar.inter_op.strategies import Strategies
from launcher.autopar.intra_op.intra_op import IntraOpPlanner
from launcher.autopar.intra_op.stage_problem import StageSettings
from launcher.autopar.realized.realize import layered_model
from launcher.autopar.sharding.restrictions import Restrictions
from launcher.config import GptConfig, MoeConfig, WrnConfig

CONFIGS = {
    "gpt": GptConfig(size="tiny", dtype="fp32"),
    "moe": MoeConfig(size="tiny", dtype="fp32"),
    "wrn": WrnConfig(size="250m", dtype="fp32"),
}
MESHES = [(1, 8), (2, 2), (4, 2)]


@pytest.fixture(scope="module")
def layered():
    return {name: layered_model(models.build(config), 8) for name, config in CONFIGS.items()}


def settings_on(mesh, **fields):
    data, tensor = mesh
    cluster = load_cluster("1xp3")
    return StageSettings(
        mesh=logical_mesh(cluster, hosts=1, devices=data * tensor, data=data),
        compute=ComputeModel(cluster.device),
        restrictions=Restrictions(frozenset({0}) if data > 1 else frozenset()),
        **{"num_microbatches": 8, **fields},
    )


def num_solved(model, num_microbatches, known, mesh=(2, 2)):
    planner = IntraOpPlanner(model)
    Strategies(planner, num_microbatches, known).of(settings_on(mesh), 0.0)
    return planner.num_solved


def test_what_was_solved_for_much_smaller_microbatches_is_not_taken_over(layered):
    known = {}
    assert num_solved(layered["gpt"], 64, known) == 1
    (first,) = known.values()
    assert num_solved(layered["gpt"], 64, known) == 0
    assert num_solved(layered["gpt"], 16, known) == 0
    assert num_solved(layered["gpt"], 256, known) == 0
    assert list(known.values()) == [first]
    assert num_solved(layered["gpt"], 8, known) == 1
    assert [solution.num_microbatches for solution in known.values()] == [8]


@pytest.fixture(scope="module")
def priced(layered):
    """(is lean, what others could save at most, what the solver saves) by model, mesh and price."""
    found = {}
    for name, model in layered.items():
        planner = IntraOpPlanner(model)
        whole = (0, len(model.layers))
        for mesh in MESHES:
            plain = settings_on(mesh)
            fastest = planner.solve(*whole, plain)
            for price in (1e-14, 1e-9):
                dear = replace(plain, memory_s_per_byte=price)
                problem = planner.problem(*whole, dear)
                frugal = planner.solve(*whole, dear)
                is_lean = Strategies(planner, 8, {}).is_lean(dear)
                could = planner.could_save(*whole, dear, fastest.picks)
                saved = 1 - problem.penalty(frugal.picks) / problem.penalty(fastest.picks)
                found[name, mesh, price] = is_lean, could, saved
    return found


def test_no_price_saves_more_than_is_said(priced):
    assert all(saved <= could + 1e-12 for _, could, saved in priced.values())
    assert any(saved > 0.1 for _, _, saved in priced.values())


def test_where_strategies_are_lean_a_price_saves_nothing_worth_having(priced):
    lean = [saved for is_lean, _, saved in priced.values() if is_lean]
    others = [saved for is_lean, _, saved in priced.values() if not is_lean]
    assert lean
    assert max(lean) <= 0.01
    assert max(others) > 0.1


@pytest.mark.parametrize(("name", "mesh"), [("gpt", (2, 2)), ("wrn", (4, 2))])
def test_strategies_that_are_solved_anew_are_looked_at_anew(layered, priced, name, mesh):
    known, dear = {}, replace(settings_on(mesh), memory_s_per_byte=1e-9)
    planner = IntraOpPlanner(layered[name])
    expected, *_ = priced[name, mesh, 1e-9]
    assert Strategies(planner, 48, known).is_lean(dear) == expected
    (first,) = known.values()
    # Taken over, with what is known of it.
    assert Strategies(planner, 8, known).is_lean(dear) == expected
    assert list(known.values()) == [first]
    assert Strategies(planner, 1, known).is_lean(dear) == expected
    (anew,) = known.values()
    assert anew is not first
    assert anew.is_lean == expected
