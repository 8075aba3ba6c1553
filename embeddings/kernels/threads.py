"""A small pool of threads for kernels, which give up the interpreter's lock, as wide as torch's own.

Numba has threads as well, with a runtime of their own, which would compete with torch's for the cores.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

_pools: dict[int, ThreadPoolExecutor] = {}
# A forked process has the pool but not its threads.
os.register_at_fork(after_in_child=_pools.clear)


def run_all(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """Runs tasks on ``torch.get_num_threads()`` threads, this one among them; gives their results in order.

    A free thread takes the next task, so tasks must not depend on who runs them or when.
    """
    threads = min(torch.get_num_threads(), len(tasks))
    if threads <= 1:
        return [task() for task in tasks]
    results: dict[int, Result] = {}
    turn = itertools.count()

    def take_tasks() -> None:
        while (i := next(turn)) < len(tasks):
            results[i] = tasks[i]()

    others = [_pool(threads - 1).submit(take_tasks) for _ in range(threads - 1)]
    take_tasks()
    for other in others:
        # One that has not begun has nothing left to take.
        if not other.cancel():
            other.result()
    return [results[i] for i in range(len(tasks))]


def count_parts(work: Sequence[int]) -> list[int]:
    """Says into how many parts to cut each item, so that no part is more than one thread's share of all work."""
    threads = torch.get_num_threads()
    total = sum(work)
    return [max(1, -(-items * threads // total)) if total else 1 for items in work]


def _pool(threads: int) -> ThreadPoolExecutor:
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="rows")
    return _pools[threads]
