"""Where among the ranks this process stands, as torchrun tells it: read before anything heavy is imported."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LAUNCHER = "RECFORGE_LAUNCHER"  # of the environment: number of the process that has started this one


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process among those that were started together.

    Attributes:
        rank: among all.
        count: of all.
        local_rank: among those of its machine.
        per_node: processes of its machine.
        is_launched: others were started with it, or could have been.
        has_agent: an elastic agent started it, keeps the store, and starts it again.
        notes: a folder that the processes of one machine and one start share; None without an agent.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    per_node: int = 1
    is_launched: bool = False
    has_agent: bool = False
    notes: Path | None = None

    @staticmethod
    def from_environment(environment: Mapping[str, str] | None = None) -> Place:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; a process on its own has none of them.

        Raises:
            ValueError: one of them makes no sense.
        """
        given = os.environ if environment is None else environment
        if "WORLD_SIZE" not in given or "RANK" not in given:
            return Place()
        try:
            rank, count = int(given["RANK"]), int(given["WORLD_SIZE"])
            per_node = int(given.get("LOCAL_WORLD_SIZE", count))
            local_rank = int(given.get("LOCAL_RANK", rank % per_node))
        except (ValueError, ZeroDivisionError):
            rank, count, per_node, local_rank = 0, 0, 0, 0
        if not 0 <= rank < count or not 0 <= local_rank < per_node:
            told = ", ".join(f"{name}={given.get(name)}" for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
            raise ValueError(f"expected a rank below the number of ranks in the environment, got {told}")
        error_file = given.get("TORCHELASTIC_ERROR_FILE")
        return Place(
            rank=rank,
            count=count,
            local_rank=local_rank,
            per_node=per_node,
            is_launched=True,
            has_agent=given.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            notes=Path(error_file).parents[1] if error_file else None,
        )

    def keep_torch_quiet(self) -> None:
        """Keep back what torch's own code prints of every connection that breaks, with its stack; call before it."""
        if self.is_launched and os.environ.get("RECFORGE_TRACEBACK") != "1":
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    def end_with_launcher(self) -> None:
        """Have the system ask this process to stop when its launcher dies, whom nobody would replace."""
        if self.has_agent:
            stop_with_parent()


def stop_with_parent() -> None:
    """Have the system ask this process to stop when the one dies that has started it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def stop_with_launcher() -> None:
    """Stop when the process dies that the environment names, if any; at once if it already has.

    Raises:
        ValueError: it has.
    """
    launcher = os.environ.pop(LAUNCHER, "")  # not for this process's own children
    if launcher:
        stop_with_parent()
        if os.getppid() != int(launcher):
            raise ValueError(f"expected process {launcher}, which has started this one, to be there; it has ended")
