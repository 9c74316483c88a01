"""What a caller may ask for, and what it is told when it asks for what cannot be."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from launcher import autopar
from launcher.autopar.whole_graph import solve_step
from launcher.errors import ClusterError, ConfigError, InfeasiblePlanError


class TestOptions:
    def test_forbidden_collectives_are_not_used(self, zoo):
        step, params, batch = zoo.moe(1)
        options = autopar.IntraOpOptions(allow_all_to_all=False)
        sharded = autopar.auto_shard(step, params, batch, mesh=zoo.FLAT, options=options)
        assert "all-to-all" not in zoo.kinds(sharded)
        options = autopar.IntraOpOptions(allow_all_gather=False)
        sharded = autopar.auto_shard(step, params, batch, mesh=zoo.FLAT, options=options)
        assert "all-gather" not in zoo.kinds(sharded)

    @pytest.mark.parametrize(
        ("mesh_forbids", "options", "words"),
        [
            (
                (),
                {"allow_all_gather": False, "allow_all_to_all": False, "batch_axis": 0, "zero": 3},
                "without all-gather and all-to-all (allow_all_gather=False, allow_all_to_all=False): "
                "allow them or drop batch_axis=0 or drop zero=3",
            ),
            (
                (),
                {"allow_all_gather": False, "zero": 3},
                "without all-gather (allow_all_gather=False): allow it or drop zero=3",
            ),
            (
                ("all-gather",),
                {"zero": 3},
                "without all-gather (mesh.forbidden): allow it or drop zero=3",
            ),
        ],
    )
    def test_forbidden_collectives_that_leave_nothing(self, zoo, mesh_forbids, options, words):
        params, batch = zoo.mlp(2, 512, 16)
        step = zoo.training_step(zoo.mlp_loss)
        mesh = dataclasses.replace(zoo.SQUARE, forbidden=frozenset(mesh_forbids))
        found = autopar.IntraOpOptions(**options)
        with pytest.raises(InfeasiblePlanError, match=re.escape(words)):
            autopar.auto_shard(step, params, batch, mesh=mesh, options=found)
        allowed = {"allow_all_gather": True, "allow_all_to_all": True}
        found = autopar.IntraOpOptions(**(options | allowed))
        autopar.auto_shard(step, params, batch, mesh=zoo.SQUARE, options=found)

    def test_without_forbidden_collectives_the_solver_says_what_failed(self, zoo, monkeypatch):
        def give_up(*_, **__):
            raise InfeasiblePlanError("no choice was found within 5 s")

        monkeypatch.setattr(solve_step, "solve", give_up)
        options = autopar.IntraOpOptions(batch_axis=0)
        with pytest.raises(InfeasiblePlanError, match="^no choice was found within 5 s$"):
            autopar.auto_shard(jnp.sin, zoo.shape(4), mesh=zoo.FLAT, options=options)

    def test_the_batch_is_held_to_its_axis(self, zoo):
        params, batch = zoo.mlp(2, 8, 512)
        options = autopar.IntraOpOptions(batch_axis=0)
        step = zoo.training_step(zoo.mlp_loss)
        sharded = autopar.auto_shard(step, params, batch, mesh=zoo.SQUARE, options=options)
        name = zoo.SQUARE.axis_names[0]
        assert all(name in spec[0] for spec in sharded.in_specs[1])
        assert not any(name in zoo.axes_of(spec) for spec in jax.tree.leaves(sharded.in_specs[0]))

    def test_one_dim_over_both_axes_only_where_allowed(self, zoo):
        params, batch = zoo.mlp(2, 4096, 16)
        step = zoo.training_step(zoo.mlp_loss)
        both = autopar.auto_shard(step, params, batch, mesh=zoo.SQUARE)
        assert both.in_specs[1][0][0] == zoo.SQUARE.axis_names
        options = autopar.IntraOpOptions(allow_dim_over_axes=False)
        one = autopar.auto_shard(step, params, batch, mesh=zoo.SQUARE, options=options)
        split = [entry for spec in jax.tree.leaves(one.in_specs) for entry in spec if entry]
        assert all(isinstance(entry, str) for entry in split)
        assert both.objective <= one.objective

    def test_the_memory_limit_holds(self, zoo):
        optimizer = optax.adam(1e-3)
        params, batch = zoo.mlp(4, 256, 64)
        step = zoo.training_step(zoo.mlp_loss, optimizer)
        args = (params, jax.eval_shape(optimizer.init, params), batch)
        free = autopar.auto_shard(step, *args, mesh=zoo.FLAT)
        limit = 0.9 * free.peak_bytes_per_device
        options = autopar.IntraOpOptions(memory_limit_bytes=limit)
        tight = autopar.auto_shard(step, *args, mesh=zoo.FLAT, options=options)
        assert tight.peak_bytes_per_device <= limit
        assert tight.objective >= free.objective
        true_gap = 1 - free.objective / tight.objective
        assert tight.gap_fraction == pytest.approx(true_gap, abs=1e-3)
        state = optimizer.init(zoo.random_arrays(params))
        zoo.check_runs_as_priced(
            step,
            args,
            tight,
            arrays=(*zoo.random_arrays((params,)), state, zoo.random_arrays(batch)),
        )

    def test_a_limit_that_cannot_be_met_names_the_least(self, zoo):
        params, batch = zoo.mlp(2, 64, 64)
        options = autopar.IntraOpOptions(memory_limit_bytes=1000)
        with pytest.raises(InfeasiblePlanError, match=r"memory_limit_bytes=1000 .* \d{5,} bytes"):
            autopar.auto_shard(
                zoo.training_step(zoo.mlp_loss), params, batch, mesh=zoo.FLAT, options=options
            )

    @pytest.mark.parametrize("solver", ["auto", "ilp_highs", "search"])
    def test_out_of_time_the_best_found_stands_with_its_gap(self, zoo, solver, caplog):
        step, params, batch = zoo.transformer(1, 8)
        best = autopar.auto_shard(step, params, batch, mesh=zoo.EIGHT)
        options = autopar.IntraOpOptions(time_limit_s=1e-3, solver=solver)
        rough = autopar.auto_shard(step, params, batch, mesh=zoo.EIGHT, options=options)
        assert rough.objective * (1 - rough.gap_fraction) <= best.objective <= rough.objective
        assert rough.gap_fraction > 0
        assert "from optimal" in caplog.text

    def test_all_solvers_agree(self, zoo):
        params, batch = zoo.mlp(2, 64, 64)
        found = [
            autopar.auto_shard(
                zoo.training_step(zoo.mlp_loss), params, batch, mesh=zoo.SQUARE,
                options=autopar.IntraOpOptions(solver=solver),
            ).objective
            for solver in ("auto", "ilp_highs", "ilp_cbc", "search")
        ]  # fmt: skip
        assert found == pytest.approx([found[0]] * 4, rel=1e-5)

    def test_explain_prices_the_alternatives(self, zoo):
        params, batch = zoo.mlp(2, 4, 512)
        sharded = autopar.auto_shard(zoo.training_step(zoo.mlp_loss), params, batch, mesh=zoo.FLAT)
        explanation = sharded.explain("params/0/w")
        best, *others = explanation.alternatives
        assert best.chosen
        assert best.cost == pytest.approx(sharded.objective)
        assert all(other.cost >= best.cost for other in others)
        assert "axis0:1" in str(explanation)
        assert sharded.explain("dot_general").alternatives[0].chosen

    def test_explain_knows_what_is_near(self, zoo):
        params, batch = zoo.mlp(2, 4, 512)
        sharded = autopar.auto_shard(zoo.training_step(zoo.mlp_loss), params, batch, mesh=zoo.FLAT)
        with pytest.raises(ConfigError, match="params/0/w"):
            sharded.explain("params/0/ww")


class TestBadInput:
    def test_a_mesh_that_does_not_match_the_devices(self, zoo):
        params, batch = zoo.mlp(1, 4, 16)
        sharded = autopar.auto_shard(zoo.training_step(zoo.mlp_loss), params, batch, mesh=zoo.FLAT)
        with pytest.raises(ClusterError, match=r"4 devices, but 3"):
            sharded.compile(jax.devices()[:3])

    def test_a_function_that_cannot_be_traced(self, zoo):
        with pytest.raises(ConfigError, match="cannot be traced"):
            autopar.auto_shard(lambda x: float(x.sum()), zoo.shape(4), mesh=zoo.FLAT)

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ((), "AssertionError"),
            (("",), "AssertionError"),
            (("\n one\n two",), "AssertionError: one"),
        ],
    )
    def test_what_a_function_raises_is_named_whatever_its_message(self, zoo, arguments, reason):
        def function(x):
            raise AssertionError(*arguments)

        with pytest.raises(ConfigError, match=f"cannot be traced: {reason}$") as caught:
            autopar.auto_shard(function, zoo.shape(4), mesh=zoo.FLAT)
        assert isinstance(caught.value.__cause__, AssertionError)

    def test_an_argument_without_a_shape(self, zoo):
        with pytest.raises(ConfigError, match="has no shape"):
            autopar.auto_shard(lambda x, y: x, zoo.shape(4), "text", mesh=zoo.FLAT)

    def test_options_that_make_no_sense(self, zoo):
        with pytest.raises(ConfigError, match="zero=4"):
            autopar.IntraOpOptions(zero=4)
        options = autopar.IntraOpOptions(batch_axis=2)
        with pytest.raises(ConfigError, match="batch_axis=2"):
            autopar.auto_shard(jnp.sin, zoo.shape(4), mesh=zoo.FLAT, options=options)

    def test_a_mesh_with_entries_missing(self):
        with pytest.raises(ValueError, match="one entry per axis"):
            autopar.LogicalMesh(shape=(2, 2), alpha=(1.0,), beta=(1.0, 1.0))
