"""What a machine can do, in the few numbers that decide where tables should lie and how long a step takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Link:
    """What lies between two ranks: a message of n bytes takes ``latency_seconds + n / bytes_per_second``."""

    latency_seconds: float
    bytes_per_second: float  # of one rank, in each direction


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One rank's share of a machine, as if the other ranks were idle.

    Attributes:
        name: for who reads a plan.
        near: the link between ranks of one node.
        far: the link between nodes.
        copy_bytes_per_second: of large copies; what is read and what is written both count.
        row_bytes_per_second: of reading and writing rows at random places.
        lookup_seconds_per_id: to look up an id, beside its bytes.
        update_seconds_per_id: to sort an id and sum its gradient, beside its bytes.
        seconds_per_shard: of a step, for each shard that a rank holds, however small it is.
        seconds_per_step: of a step, for what is neither arithmetic nor bytes.
        flops: of the dense part's matrix products.
        overlap: share of the dense backward pass behind which an all-reduce can hide.
        cores_per_node: ranks of a node that can compute at full speed at the same time.
        padded: whether empty bags and partial sums of bags without ids travel too, as in torchrec's sharded tables.
        memory_bytes: of a rank, for tables; None is not known.
    """

    name: str
    near: Link
    far: Link
    copy_bytes_per_second: float
    row_bytes_per_second: float
    lookup_seconds_per_id: float
    update_seconds_per_id: float
    seconds_per_shard: float
    seconds_per_step: float
    flops: float
    overlap: float = 0.0
    cores_per_node: int = 1 << 30
    padded: bool = False
    memory_bytes: int | None = None

    def slowdown(self, ranks_per_node: int) -> float:
        """Return how much longer a rank computes when ``ranks_per_node`` share the cores of a node."""
        return max(1.0, ranks_per_node / self.cores_per_node)


# Two cores of a cloud machine and gloo over its loopback; `recforge plan --calibrate` measures the machine at hand.
CPU = Machine(
    name="cpu",
    near=Link(latency_seconds=60e-6, bytes_per_second=1.2e9),
    far=Link(latency_seconds=100e-6, bytes_per_second=1.2e9),  # 10 Gbit/s Ethernet
    copy_bytes_per_second=10e9,
    row_bytes_per_second=8e9,
    lookup_seconds_per_id=15e-9,
    update_seconds_per_id=60e-9,
    seconds_per_shard=20e-6,
    seconds_per_step=1e-3,
    flops=60e9,
)
