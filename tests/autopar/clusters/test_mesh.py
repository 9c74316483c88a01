"""Logical meshes of a cluster, and every collective on them against its closed form."""

import math
from dataclasses import replace

import pytest

from launcher.autopar.clusters.collective_costs import RingCosts
from launcher.autopar.clusters.curves import Curve
from launcher.autopar.clusters.device import Link
from launcher.autopar.clusters.mesh import LogicalMesh, logical_mesh

NEAR, FAR = 1e-6, 1e-5  # seconds per message
FAST, SLOW = 1e9, 1e8  # bytes per second: of a device inside its host, of a host's network link
S = 1e6
TINY = 8.0


@pytest.fixture(scope="module")
def links(cpu8):
    """Hosts of 4 devices."""
    near, far = Link(bytes_per_s=FAST, latency_s=NEAR), Link(bytes_per_s=SLOW, latency_s=FAR)
    return replace(cpu8, num_hosts=8, intra_host=near, inter_host=far)


def test_inside_a_host_collectives_go_round_a_ring(links):
    mesh = logical_mesh(links, hosts=1, devices=4, data=1)
    one_way = 3 * NEAR + 3 / 4 * S / FAST
    assert mesh.all_gather(1, S) == pytest.approx(one_way)
    assert mesh.reduce_scatter(1, S) == pytest.approx(one_way)
    assert mesh.all_to_all(1, S) == pytest.approx(one_way)
    assert mesh.all_reduce(1, S) == pytest.approx(2 * one_way)
    assert mesh.alpha == (NEAR, NEAR)
    assert mesh.beta == (1 / FAST, 1 / FAST)


def test_one_device_of_each_host_has_a_share_of_its_link(links):
    """A data axis over 8 hosts beside a tensor axis of 4: four rings through each host's link."""
    mesh = logical_mesh(links, hosts=8, devices=4, data=8)
    assert mesh.shape == (8, 4)
    assert mesh.all_gather(0, S) == pytest.approx(7 * FAR + 7 / 8 * S / (SLOW / 4))
    assert mesh.all_to_all(0, S) == pytest.approx(7 * FAR + 7 / 8 * S / (SLOW / 4))
    ring, tree = 14 * FAR + 7 / 4 * S * 4 / SLOW, 6 * FAR + 2 * S * 4 / SLOW
    assert ring < tree
    assert mesh.all_reduce(0, S) == pytest.approx(ring)
    assert mesh.all_gather(1, S) == pytest.approx(3 * NEAR + 3 / 4 * S / FAST)
    assert mesh.beta[0] == pytest.approx(4 / SLOW)


def test_small_sums_go_over_trees(links):
    mesh = logical_mesh(links, hosts=8, devices=4, data=8)
    assert mesh.all_reduce(0, TINY) == pytest.approx(2 * 3 * FAR + 2 * TINY * 4 / SLOW)
    whole = logical_mesh(links, hosts=8, devices=4, data=32)
    tree = 2 * (3 * NEAR + 3 * FAR) + 2 * TINY / SLOW
    assert whole.all_reduce(0, TINY) == pytest.approx(tree)


@pytest.mark.parametrize("hosts", [2, 3, 8])
def test_an_axis_over_hosts_and_their_devices_has_three_ways(links, hosts):
    n, costs = 4 * hosts, logical_mesh(links, hosts=hosts, devices=4, data=4 * hosts).wired[0]
    depth = math.ceil(math.log2(hosts))
    ring_latency = (n - hosts) * NEAR + (hosts - 1) * FAR
    ring = ring_latency + (n - 1) / n * S / SLOW
    assert costs.ring("all_gather", n, S) == pytest.approx(ring)
    assert costs.ring("all_reduce", n, S, rounds=2) == pytest.approx(2 * ring)
    assert costs.tree(n, S) == pytest.approx(2 * (3 * NEAR + depth * FAR) + 2 * S / SLOW)
    # Every device sends its quarter to its peers, and the four share the link of the host.
    inside = 3 * NEAR + 3 / 4 * S / FAST
    across = (hosts - 1) * FAR + (hosts - 1) / hosts * S / SLOW
    assert costs.hierarchical("all_gather", n, S) == pytest.approx(inside + across)
    by_tree = 2 * depth * FAR + 2 * S / SLOW
    summed = 2 * inside + min(2 * across, by_tree)
    assert costs.hierarchical("all_reduce", n, S) == pytest.approx(summed)


def test_the_fastest_way_is_taken(links):
    """Two hosts: a ring sends nearly everything between them, a hierarchy half."""
    mesh = logical_mesh(links, hosts=2, devices=4, data=8)
    costs = mesh.wired[0]
    assert costs.hierarchical("all_gather", 8, S) < costs.ring("all_gather", 8, S)
    assert mesh.all_gather(0, S) == costs.hierarchical("all_gather", 8, S)
    assert mesh.reduce_scatter(0, S) == costs.hierarchical("reduce_scatter", 8, S)
    assert mesh.all_reduce(0, S) == costs.hierarchical("all_reduce", 8, S)
    # Where the network is as fast as the devices' own links, the hierarchy's detour does not pay.
    even = replace(links, inter_host=Link(bytes_per_s=FAST, latency_s=NEAR))
    mesh = logical_mesh(even, hosts=2, devices=4, data=8)
    assert mesh.all_gather(0, S) == mesh.wired[0].ring("all_gather", 8, S)


def test_an_exchange_over_hosts_sends_most_pieces_over_the_shared_link(links):
    mesh = logical_mesh(links, hosts=2, devices=4, data=8)
    expected = 3 * NEAR + 4 * FAR + 4 * (4 / 8 * S) / SLOW
    assert mesh.all_to_all(0, S) == pytest.approx(expected)


def test_a_tensor_axis_may_leave_the_host(links):
    mesh = logical_mesh(links, hosts=4, devices=4, data=2)
    assert mesh.shape == (2, 8)
    assert (mesh.wired[1].per_host, mesh.wired[1].between.shared_by) == (4, 1)
    assert (mesh.wired[0].per_host, mesh.wired[0].between.shared_by) == (1, 4)
    assert mesh.all_gather(1, S) == mesh.wired[1].hierarchical("all_gather", 8, S)


def test_measured_curves_stand_for_the_whole_collective(links):
    """Their rates are those of the bytes that a device sends; what has no curve keeps its formula."""
    curve = Curve(((1e5, 1e7), (1e7, 5e7)))
    near = replace(links.intra_host, curves={"all_reduce": curve})
    mesh = logical_mesh(replace(links, intra_host=near), hosts=1, devices=4, data=1)
    assert mesh.all_reduce(1, S) == pytest.approx(curve.seconds(6 / 4 * S))
    assert mesh.all_reduce(1, TINY) == pytest.approx(1e5 / 1e7)
    assert mesh.all_gather(1, S) == pytest.approx(3 * NEAR + 3 / 4 * S / FAST)


def test_a_measured_network_is_shared_like_any_other(links):
    curve = Curve(((1e5, 1e7),))
    far = replace(links.inter_host, curves={"all_gather": curve})
    mesh = logical_mesh(replace(links, inter_host=far), hosts=8, devices=4, data=8)
    assert mesh.all_gather(0, S) == pytest.approx(4 * curve.seconds(7 / 8 * S))


def test_other_costs_ask_for_alpha_and_beta_alone(links):
    mesh = logical_mesh(links, hosts=2, devices=4, data=8).priced(RingCosts())
    plain = LogicalMesh(shape=(8, 1), alpha=mesh.alpha, beta=mesh.beta)
    assert mesh == plain
    assert mesh.all_reduce(0, S) == pytest.approx(14 * FAR + 14 / 8 * S / SLOW)


def test_meshes_of_one_cluster_are_equal_and_hash_alike(links):
    curve = {"send": Curve(((1.0, 1.0),))}
    measured = replace(links, intra_host=replace(links.intra_host, curves=curve))
    meshes = [
        logical_mesh(cluster, hosts=2, devices=4, data=8) for cluster in (links, links, measured)
    ]
    assert meshes[0] == meshes[1] != meshes[2]
    assert len({meshes[0], meshes[1], meshes[2]}) == 2
