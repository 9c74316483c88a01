"""Cases of runs over several hosts."""

from collections.abc import Sequence

import jax
import pytest
from host_cases import Case, plan_text


@pytest.fixture
def case(no_new_backend, tmp_path):
    """Make the case of some overrides."""
    before = jax.config.jax_enable_x64
    yield lambda *overrides: Case(tmp_path, overrides)
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def from_plan(case, tmp_path):
    """Make the case of a plan that is written by hand."""

    def make(stages: Sequence[dict], *overrides: str, hosts: int = 2, devices: int = 2, **fields):
        path = tmp_path / "given.json"
        path.write_text(plan_text(stages, hosts, devices, **fields))
        return case(
            "parallel=from_file", f"parallel.path={path}", f"cluster.hosts={hosts}",
            f"cluster.devices_per_host={devices}", *overrides,
        )  # fmt: skip

    return make
