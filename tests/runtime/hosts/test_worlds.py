"""Which hosts share a world, and that the devices of a world are those that the cluster has."""

import jax
import pytest

from launcher.autopar.clusters.cluster import load_cluster
from launcher.errors import ClusterError
from launcher.runtime.hosts.worlds import world_grid, worlds


def test_a_stage_inside_a_host_needs_nobody():
    assert worlds([(0,), (1,), (0,)], 2) == [(0,), (1,)]


def test_the_hosts_of_a_stage_share_a_world_and_stages_connect_worlds():
    assert worlds([(0, 1), (2,), (4, 3)], 5) == [(0, 1), (0, 1), (2,), (3, 4), (3, 4)]
    assert worlds([(0, 1), (1, 2), (3,)], 4) == [(0, 1, 2)] * 3 + [(3,)]


def test_the_grid_has_the_devices_of_the_world_alone():
    grid = world_grid((1,), 1, load_cluster("cpu8"), emulated=True)
    assert grid.shape == (2, 4)
    assert not any(grid[0])
    assert list(grid[1]) == jax.local_devices()[:4]


def test_hosts_with_other_devices_than_the_cluster_has_are_refused():
    with pytest.raises(ClusterError, match="cluster=8xp3 has 8 devices on host 0, and 8 .cpu. are"):
        world_grid((0,), 0, load_cluster("8xp3"), emulated=False)
    with pytest.raises(
        ClusterError, match="cluster=cpu8 has 4 devices on host 1, and 0 .none. are"
    ):
        world_grid((0, 1), 0, load_cluster("cpu8"), emulated=True)
