"""The alpha-beta formulas, each worked out by hand, and what must hold of any of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings.planning.collectives import (
    all_reduce_seconds,
    all_to_all_seconds,
    all_to_all_seconds_per_byte,
    barrier_seconds,
)
from embeddings.planning.machine import CPU, Link, Machine

MACHINE = replace(
    CPU,
    near=Link(latency_seconds=1e-3, bytes_per_second=1e6),
    far=Link(latency_seconds=1e-2, bytes_per_second=1e5),
    links_take_cores=False,
)


def test_all_to_all_on_one_node() -> None:
    # 3 partners, each 1 ms and a quarter of 4,000 bytes at 1 MB/s.
    assert all_to_all_seconds(MACHINE, 4, 4, 4_000) == pytest.approx(3 * (1e-3 + 1e-3))
    assert all_to_all_seconds(MACHINE, 1, 1, 4_000) == 0


def test_all_to_all_over_nodes_waits_for_the_slower_link() -> None:
    # 8 ranks, 2 per node: 1 near partner and 6 far ones; 1,000 bytes for each.
    near, far = 1 * (1e-3 + 1e-3), 6 * (1e-2 + 1e-2)
    assert all_to_all_seconds(MACHINE, 8, 2, 8_000) == pytest.approx(max(near, far))


def test_all_reduce_is_a_ring_for_much_and_a_tree_for_little() -> None:
    # Ring of 4: 6 messages of a quarter. Tree of 4: 4 messages of the whole.
    assert all_reduce_seconds(MACHINE, 4, 4, 400_000) == pytest.approx(6 * (1e-3 + 0.1))
    assert all_reduce_seconds(MACHINE, 4, 4, 4) == pytest.approx(4 * (1e-3 + 4e-6))
    assert all_reduce_seconds(MACHINE, 1, 1, 400_000) == 0


def test_all_reduce_over_nodes_sums_within_them_first() -> None:
    # 4 nodes of 2: within 2 messages of a half; between, of half the numbers, a ring of 6 messages of a quarter.
    within, between = 2 * (1e-3 + 0.4), 6 * (1e-2 + 400_000 / 4 / 1e5)
    assert all_reduce_seconds(MACHINE, 8, 2, 800_000) == pytest.approx(within + between)


def test_sums_have_a_link_of_their_own_where_it_was_measured() -> None:
    machine = replace(MACHINE, near_sums=Link(latency_seconds=0.5, bytes_per_second=1e9))
    assert all_reduce_seconds(machine, 2, 2, 1_000) == pytest.approx(2 * (0.5 + 0.5e-6))
    assert all_to_all_seconds(machine, 2, 2, 0) == pytest.approx(1e-3)


def test_a_barrier_doubles_who_knows_in_each_round() -> None:
    assert [barrier_seconds(MACHINE, ranks) for ranks in (1, 2, 3, 4, 8)] == pytest.approx([0, 1e-3, 2e-3, 2e-3, 3e-3])


@given(st.integers(1, 6), st.integers(1, 8), st.floats(0, 1e9), st.floats(0, 1e9))
def test_more_bytes_never_take_less_and_a_byte_more_adds_its_share(
    per_node: int, nodes: int, few: float, more: float
) -> None:
    few, more = sorted((few, more))
    ranks = per_node * nodes
    for collective in (all_to_all_seconds, all_reduce_seconds):
        assert collective(MACHINE, ranks, per_node, few) <= collective(MACHINE, ranks, per_node, more)
    without_latency = replace(
        MACHINE, near=replace(MACHINE.near, latency_seconds=0.0), far=replace(MACHINE.far, latency_seconds=0.0)
    )
    exact = all_to_all_seconds(without_latency, ranks, per_node, more)
    assert more * all_to_all_seconds_per_byte(MACHINE, ranks, per_node) == pytest.approx(exact)


def _slowdowns(machine: Machine) -> list[float]:
    return [machine.slowdown(ranks) for ranks in (1, 2, 3, 4, 8)]


def test_ranks_beyond_the_cores_share_them() -> None:
    assert _slowdowns(replace(CPU, cores_per_node=2)) == pytest.approx([1, 1, 1.5, 2, 4])
    measured = replace(CPU, cores_per_node=2, slowdowns=((1, 1.0), (2, 1.2)))
    assert _slowdowns(measured) == pytest.approx([1, 1.2, 1.8, 2.4, 4.8])
    assert _slowdowns(CPU) == [1] * 5
    between = replace(CPU, cores_per_node=4, slowdowns=((1, 1.0), (2, 1.2), (4, 2.0)))
    assert _slowdowns(between) == pytest.approx([1, 1.2, 1.6, 2, 4])


def test_links_slow_down_only_where_they_take_cores() -> None:
    shared = replace(CPU, cores_per_node=2)
    assert all_to_all_seconds(shared, 4, 4, 1e6) == pytest.approx(2 * all_to_all_seconds(CPU, 4, 4, 1e6))
    free = replace(shared, links_take_cores=False)
    assert all_to_all_seconds(free, 4, 4, 1e6) == all_to_all_seconds(CPU, 4, 4, 1e6)
