"""What a coordinator counts of its run since it started."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RunFigures:
    """What moves of buckets have cost since the coordinator started, and how many leases have expired."""

    moves_done: int = 0
    moving_buckets: int = 0
    longest_freeze_seconds: float = 0.0
    expired_leases: int = 0
    trouble: str = ""
