"""The ranks that tests start: results come back by rank, and one that fails or hangs fails the test at once."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist


def sum_over_ranks(rank, count, start):
    total = torch.tensor([start + rank])
    dist.all_reduce(total)
    return rank, total.tolist()


def fail_on_the_last(rank, count):
    if rank == count - 1:
        raise ValueError("this rank does not want to")
    time.sleep(60)


def sleep(rank, count):
    time.sleep(60)


def test_results_come_back_by_rank(run_ranks):
    assert run_ranks(sum_over_ranks, 2, 10) == [(0, [21]), (1, [21])]


def test_one_that_fails_fails_the_test_at_once_and_is_shown(run_ranks):
    start = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"(?s)failures of \[1\].*this rank does not want to"):
        run_ranks(fail_on_the_last, 2)
    assert time.monotonic() - start < 40


def test_one_that_hangs_or_is_killed(start_ranks):
    ranks = start_ranks(sleep, 1, seconds=1)
    with pytest.raises(pytest.fail.Exception, match=r"ranks \[0\] still run"):
        ranks.results()
    os.kill(ranks.processes[0].pid, signal.SIGKILL)
    ranks.end += 30
    assert ranks.wait() == [-signal.SIGKILL]
