"""What a machine can do, in the few numbers that decide where tables should lie and how long a step takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from embeddings.tables import Memory

CACHED_SHARE = 0.2  # of the rows under uvm_caching, in the GPU's own memory: fbgemm's default


@dataclass(frozen=True, kw_only=True)
class Link:
    """What lies between two ranks: a message of n bytes takes ``latency_seconds + n / bytes_per_second``."""

    latency_seconds: float
    bytes_per_second: float  # of one rank, in each direction


@dataclass(frozen=True, kw_only=True)
class RowRate:
    """How fast rows at random places are worked on: n ids take ``n * seconds_per_id + bytes / bytes_per_second``."""

    seconds_per_id: float
    bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One rank's share of a machine, as if the other ranks were idle.

    Attributes:
        name: for who reads a plan.
        near: the link between ranks of one node.
        far: the link between nodes.
        near_sums: the link between ranks of one node as all-reduces find it; None is ``near``.
        copy_bytes_per_second: of large copies; what is read and what is written both count.
        lookup: of rows that are read and pooled.
        update: of gradients that are sorted by row and summed, and of rows and states that are read and written.
        cut_seconds_per_id: to pack an id for the rank that holds its row, and to unpack it there.
        seconds_per_shard: of a step, for each shard that a rank holds, however small it is.
        seconds_per_step: of a step, for what is neither arithmetic nor bytes.
        flops: of the dense part's matrix products.
        overlap: share of the dense backward pass behind which an all-reduce can hide.
        cores_per_node: ranks of a node that can compute at full speed at the same time.
        slowdowns: (ranks of a node, how much longer each then takes) where it was measured, ascending, with no more
            ranks than cores; more of them share the cores evenly.
        links_take_cores: whether ranks that share cores also send more slowly, as processes of one CPU do.
        shares_memory: whether ranks that are all on one node write vectors into memory that they share, in fp32: then
            nothing but a barrier is sent.
        padded: whether empty bags and partial sums of bags without ids travel too, as in torchrec's sharded tables.
        memory_bytes: of a rank, for tables; None is not known.
        host_memory_bytes: of a GPU's rank, for tables in the memory of its host; None is not known.
        host_bytes_per_second: of rows at random places there, over the bus; None is as fast as all others.
    """

    name: str
    near: Link
    far: Link
    copy_bytes_per_second: float
    lookup: RowRate
    update: RowRate
    cut_seconds_per_id: float
    seconds_per_shard: float
    seconds_per_step: float
    flops: float
    near_sums: Link | None = None
    overlap: float = 0.0
    cores_per_node: int = 1 << 30
    slowdowns: tuple[tuple[int, float], ...] = ()
    links_take_cores: bool = False
    shares_memory: bool = False
    padded: bool = False
    memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    host_bytes_per_second: float | None = None

    def memory_for(self, memory: Memory) -> int | None:
        """Return the bytes of a rank for tables that lie there; None is not known."""
        if memory == "device":
            return self.memory_bytes
        if memory == "uvm_caching" and self.host_memory_bytes is not None and self.memory_bytes is not None:
            return min(self.host_memory_bytes, int(self.memory_bytes / CACHED_SHARE))
        return self.host_memory_bytes

    def slowdown(self, ranks_per_node: int) -> float:
        """Return how much longer a rank computes when ``ranks_per_node`` share a node."""
        alone = min(ranks_per_node, self.cores_per_node)
        shared = ranks_per_node / alone
        if not self.slowdowns:
            return shared
        counts, factors = np.array(self.slowdowns, dtype=np.float64).T
        return float(np.interp(alone, counts, factors)) * shared

    def link_slowdown(self, ranks_per_node: int) -> float:
        """Return how much longer a message takes when ``ranks_per_node`` share a node."""
        return self.slowdown(ranks_per_node) if self.links_take_cores else 1.0


# Two cores of a cloud machine, gloo over its loopback and, between machines, 10 Gbit/s Ethernet.
# `recforge plan --calibrate` measures the machine at hand.
CPU = Machine(
    name="cpu",
    near=Link(latency_seconds=60e-6, bytes_per_second=1.2e9),
    far=Link(latency_seconds=100e-6, bytes_per_second=1.1e9),
    copy_bytes_per_second=12e9,
    lookup=RowRate(seconds_per_id=15e-9, bytes_per_second=8e9),
    update=RowRate(seconds_per_id=60e-9, bytes_per_second=8e9),
    cut_seconds_per_id=20e-9,
    seconds_per_shard=20e-6,
    seconds_per_step=1e-3,
    flops=60e9,
    links_take_cores=True,
    shares_memory=True,
)

# NVIDIA's data sheets for A100 80GB SXM, H100 SXM and H200 SXM name the peaks: memory 2.04, 3.35 and 4.8 TB/s; NVLink
# 600, 900 and 900 GB/s in both directions together, so half of it in each; float32 19.5, 67 and 67 TFLOPS. DGX systems
# have one InfiniBand port per GPU, of 200 Gbit/s (A100) or 400 Gbit/s, and 2 TB of memory for eight GPUs; PCIe 4 (A100)
# and 5 move 32 and 64 GB/s in each direction. What is reached of these, and all latencies, are assumptions of ours, not
# measurements: 80 % of copies and links, half for random rows, 70 % of the arithmetic. Of the host's memory tables get
# half, as a checkpoint takes a copy.
_ROWS, _COPIES, _LINKS, _ARITHMETIC = 0.5, 0.8, 0.8, 0.7
_HOST_BYTES = 2 * 10**12 // 8


def _gpu(
    name: str, *, memory: float, nvlink: float, infiniband: float, bus: float, flops: float, size: float
) -> Machine:
    return Machine(
        name=name,
        near=Link(latency_seconds=1e-6, bytes_per_second=_LINKS * nvlink),
        far=Link(latency_seconds=2e-6, bytes_per_second=_LINKS * infiniband),
        copy_bytes_per_second=_COPIES * memory,
        lookup=RowRate(seconds_per_id=0.05e-9, bytes_per_second=_ROWS * memory),
        update=RowRate(seconds_per_id=1e-9, bytes_per_second=_ROWS * memory),
        cut_seconds_per_id=0.2e-9,
        seconds_per_shard=1e-6,
        seconds_per_step=1e-3,
        flops=_ARITHMETIC * flops,
        overlap=0.8,
        padded=True,
        memory_bytes=int(0.8 * size),
        host_memory_bytes=_HOST_BYTES // 2,
        host_bytes_per_second=_ROWS * bus,
    )


MACHINES: dict[str, Machine] = {
    "cpu": CPU,
    "a100": _gpu("a100", memory=2.04e12, nvlink=300e9, infiniband=25e9, bus=32e9, flops=19.5e12, size=80e9),
    "h100": _gpu("h100", memory=3.35e12, nvlink=450e9, infiniband=50e9, bus=64e9, flops=67e12, size=80e9),
    "h200": _gpu("h200", memory=4.8e12, nvlink=450e9, infiniband=50e9, bus=64e9, flops=67e12, size=141e9),
}


def machine_for(device: str, kernel: str = "auto") -> Machine:
    """Return what a run is planned for: a CPU or a GPU, and whose sharded tables exchange the rows."""
    if device == "cuda":
        return MACHINES["h100"]
    return replace(CPU, padded=True) if kernel == "fbgemm" else CPU
