"""How long collectives take: the alpha-beta model, in which a message of n bytes takes latency + n / bandwidth.

Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH": direct
all-to-all, ring and tree all-reduce. Over several nodes an all-reduce runs within nodes, between them and within again.
"""

from __future__ import annotations

import math

from embeddings.planning.machine import Link, Machine


def all_to_all_seconds(machine: Machine, ranks: int, ranks_per_node: int, bytes_per_rank: float) -> float:
    """Return the time in which every rank sends ``bytes_per_rank`` in equal parts to all ranks, itself among them.

    A rank sends its messages one after the other; those to its own node and those to others go side by side.
    """
    near, far = _partners(ranks, ranks_per_node)
    part = bytes_per_rank / ranks
    within = near * (machine.near.latency_seconds + part / machine.near.bytes_per_second)
    between = far * (machine.far.latency_seconds + part / machine.far.bytes_per_second)
    return max(within, between) * machine.link_slowdown(min(ranks, ranks_per_node))


def all_to_all_seconds_per_byte(machine: Machine, ranks: int, ranks_per_node: int) -> float:
    """Return what a byte more adds to an all-to-all, where it goes to any rank alike: latencies are left out."""
    near, far = _partners(ranks, ranks_per_node)
    slowest = max(near / machine.near.bytes_per_second, far / machine.far.bytes_per_second)
    return slowest / ranks * machine.link_slowdown(min(ranks, ranks_per_node))


def barrier_seconds(machine: Machine, ranks: int) -> float:
    """Return the time in which all ranks of one node know that all have come: each round doubles who knows."""
    return math.ceil(math.log2(ranks)) * machine.near.latency_seconds * machine.link_slowdown(ranks)


def all_reduce_seconds(
    machine: Machine, ranks: int, ranks_per_node: int, num_bytes: float, *, latency: bool = True
) -> float:
    """Return the time to sum ``num_bytes`` over ranks, so that each has the sum."""
    per_node = min(ranks, ranks_per_node)
    nodes = ranks // per_node
    # Within a node each rank sums one part, which it then sums over nodes with its likes.
    within = _fastest_all_reduce(machine.near_sums or machine.near, per_node, num_bytes, latency=latency)
    between = _fastest_all_reduce(machine.far, nodes, num_bytes / per_node, latency=latency)
    return (within + between) * machine.link_slowdown(per_node)


def _fastest_all_reduce(link: Link, ranks: int, num_bytes: float, *, latency: bool) -> float:
    if ranks == 1:
        return 0.0
    alpha, beta = (link.latency_seconds if latency else 0.0), num_bytes / link.bytes_per_second
    ring = 2 * (ranks - 1) * (alpha + beta / ranks)
    tree = 2 * math.ceil(math.log2(ranks)) * (alpha + beta)
    return min(ring, tree)


def _partners(ranks: int, ranks_per_node: int) -> tuple[int, int]:
    near = min(ranks, ranks_per_node) - 1
    return near, ranks - 1 - near
