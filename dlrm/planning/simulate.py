"""Foresees steps on other numbers of ranks, each with a plan of its own, and what becomes of a rank's efficiency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dlrm.planning.foresee import Foresight

# Plans and foresees for (ranks, global batch size).
Foresee = Callable[[int, int], Foresight]


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """One number of ranks.

    Attributes:
        ranks: number of ranks.
        weak: with as many samples per rank as in the plan.
        weak_efficiency: samples per second and rank, over those of one rank with as many samples.
        strong: with the plan's global batch; None where there are more ranks than samples.
        strong_efficiency: samples per second and rank, over those of one rank with the whole batch.
        misfit: why there is no plan, for which all others are None then.
    """

    ranks: int
    weak: Foresight | None = None
    weak_efficiency: float | None = None
    strong: Foresight | None = None
    strong_efficiency: float | None = None
    misfit: str | None = None


def parse_counts(text: str, ranks_per_node: int) -> list[int]:
    """Read ``--simulate 8,64,512``.

    Raises:
        ValueError: naming the flag.
    """
    try:
        counts = sorted({int(count) for count in text.replace(",", " ").split()})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1:
        raise ValueError(f"--simulate: expected numbers of ranks such as 8,64,512, got '{text}'")
    uneven = [count for count in counts if count > ranks_per_node and count % ranks_per_node]
    if uneven:
        raise ValueError(
            f"--simulate: expected multiples of --ranks-per-node {ranks_per_node} beyond one node, got {uneven[0]}"
        )
    return counts


def simulate(counts: Sequence[int], foresee: Foresee, *, ranks: int, global_batch_size: int) -> list[Scaling]:
    """Foresee steps on every number of ranks.

    Weak scaling keeps the samples per rank that ``ranks`` have of ``global_batch_size``; strong scaling keeps the
    global batch. Both are compared with one rank that has room for everything.

    Args:
        counts: numbers of ranks.
        foresee: plans and foresees; one rank is asked for without a limit of memory.
        ranks: of the plan.
        global_batch_size: of the plan.
    """
    share = max(1, global_batch_size // ranks)
    alone, alone_with_all = foresee(1, share).samples_per_second, foresee(1, global_batch_size).samples_per_second
    found = []
    for count in counts:
        try:
            weak = foresee(count, share * count)
            strong = foresee(count, global_batch_size) if global_batch_size >= count else None
        except ValueError as error:
            found.append(Scaling(ranks=count, misfit=str(error)))
            continue
        found.append(
            Scaling(
                ranks=count,
                weak=weak,
                weak_efficiency=weak.samples_per_second / count / alone,
                strong=strong,
                strong_efficiency=strong.samples_per_second / count / alone_with_all if strong else None,
            )
        )
    return found
