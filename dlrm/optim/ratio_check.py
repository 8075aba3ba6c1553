"""Finds out whether ranks have come apart: LAMB's ratios, which each computes alone, must agree bit for bit."""

from __future__ import annotations

from dlrm.distributed.ranks import Ranks
from dlrm.optim.lamb import Lamb


def check_ratios_agree(optimizer: Lamb, ranks: Ranks) -> None:
    """Check that the ratios of the optimizer's last step are the same on all ranks (a collective call).

    They stand for all weights and gradients, at a few bytes per layer: norms of what differs hardly ever agree.

    Raises:
        ValueError: on all ranks, naming the first layer and a rank that differ.
    """
    own = [] if optimizer.ratios is None else optimizer.ratios.tolist()
    gathered = ranks.gather(own)
    for rank, others in enumerate(gathered):
        if others == gathered[0]:
            continue
        place = next((i for i, pair in enumerate(zip(others, gathered[0], strict=False)) if pair[0] != pair[1]), None)
        where = f"{len(others)} layers, rank 0 {len(gathered[0])}"
        if place is not None:
            where = f"{others[place]!r} for {_name(optimizer, place)}, rank 0 {gathered[0][place]!r}"
        raise ValueError(
            f"lamb: expected the same ratio of norms on all ranks, got on rank {rank} {where}; weights or gradients of "
            "the dense part differ between ranks"
        )


def _name(optimizer: Lamb, place: int) -> str:
    names: list[str] = []
    for group in optimizer.param_groups:
        numbers = range(len(names), len(names) + len(group["params"]))
        given = group.get("param_names") or [f"parameter {number}" for number in numbers]
        names += [
            name for name, p in zip(given, group["params"], strict=True) if p.grad is not None or group["sharded"]
        ]
    return str(names[place])
