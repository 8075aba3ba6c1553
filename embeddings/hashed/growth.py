"""When rows come into being and when they go, as a plain description without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Growth:
    """When a table's rows come into being and when they go.

    Attributes:
        admit_after: A row is kept, and trained, from its so many-th push on; until then it stays as it was born.
        admit_probability: With which each push of a row that is not kept admits it; a function of (seed, id, count).
        evict_after_seconds: Rows without a push for so long go; None keeps them.
        evict_below_count: Among those, only rows with fewer pushes go; None: all of them.
        max_bytes: Of rows on one shard, above which the least recently pushed go; None is no limit.
        spill: Keep rows beyond ``max_bytes`` on disk instead of dropping them (needs ``pip install recforge[spill]``).
    """

    admit_after: int = 1
    admit_probability: float = 1.0
    evict_after_seconds: float | None = None
    evict_below_count: int | None = None
    max_bytes: int | None = None
    spill: bool = False

    def __post_init__(self) -> None:
        if self.admit_after < 1:
            raise ValueError(f"admit_after: expected at least 1, got {self.admit_after}")
        if not 0 < self.admit_probability <= 1:
            raise ValueError(f"admit_probability: expected a number in (0, 1], got {self.admit_probability}")
        for name in ("evict_after_seconds", "evict_below_count", "max_bytes"):
            number = getattr(self, name)
            if number is not None and not number > 0:
                raise ValueError(f"{name}: expected a number above 0, got {number}")
        if self.evict_below_count is not None and self.evict_after_seconds is None:
            raise ValueError(
                f"evict_below_count: expected evict_after_seconds beside it, after which rows of fewer than "
                f"{self.evict_below_count} pushes go, got none"
            )
        if self.spill and self.max_bytes is None:
            raise ValueError("spill: expected max_bytes beside it, above which rows go to disk, got none")
