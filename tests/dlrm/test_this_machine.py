"""What a process may use of its machine: no more than the control groups round it allow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dlrm.this_machine import count_cores, memory_bytes

PHYSICAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("", {}, PHYSICAL),
        ("0::/\n", {"memory.max": "max\n"}, PHYSICAL),
        ("0::/\n", {"memory.max": "1000000\n"}, 1_000_000),
        ("0::/\n", {"memory.max": f"{10 * PHYSICAL}\n"}, PHYSICAL),
        ("0::/user/job\n", {"user/memory.max": "2000000\n", "user/job/memory.max": "3000000\n"}, 2_000_000),
        ("0::/user/job\n", {"user/memory.max": "max\n", "user/job/memory.max": "3000000\n"}, 3_000_000),
        ("0::/mine\n", {"other/memory.max": "5\n"}, PHYSICAL),
        ("3:cpu:/b\n4:memory:/job\n", {"memory/job/memory.limit_in_bytes": "4000000\n"}, 4_000_000),
        ("4:memory:/docker/1f\n", {"memory/memory.limit_in_bytes": "4000000\n"}, 4_000_000),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, PHYSICAL),
    ],
)
def test_the_smallest_limit_of_a_control_group_counts(
    tmp_path: Path, own: str, limits: dict[str, str], expected: int
) -> None:
    for name, value in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(value)
    (tmp_path / "own").write_text(own)
    assert memory_bytes(tmp_path, tmp_path / "own") == expected


def test_this_machine_has_memory_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1e8 < memory_bytes() <= PHYSICAL
    assert count_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")  # as where there is none
    assert count_cores() == os.cpu_count()
