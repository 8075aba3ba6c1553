"""What this process may use of its machine: asked for here alone, so that a container's limits count everywhere."""

from __future__ import annotations

import os
from pathlib import Path

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes(groups: Path = GROUPS, own_groups: Path = OWN_GROUPS) -> int:
    """Return the bytes of memory that this process may use: the machine's, or less where control groups say so.

    Args:
        groups: Linux's folder of control groups, of version 1 or 2.
        own_groups: its file that names this process's groups.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in _limit_files(groups, own_groups):
        try:
            limits.append(int(file.read_text(encoding="utf-8")))
        except (OSError, ValueError):  # no such group here, or "max": it has no limit
            continue
    return min(limits)


def _limit_files(groups: Path, own_groups: Path) -> list[Path]:
    """Return where a limit may stand: those of outer groups hold too, and a container sees its own as the outermost."""
    try:
        lines = own_groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    files = [groups / "memory.max", groups / "memory" / "memory.limit_in_bytes"]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        own = Path(path.lstrip("/"))
        inner = [folder for folder in (own, *own.parents) if folder != Path()]
        if not controllers:
            files += [groups / folder / "memory.max" for folder in inner]
        elif "memory" in controllers.split(","):
            files += [groups / "memory" / folder / "memory.limit_in_bytes" for folder in inner]
    return files
