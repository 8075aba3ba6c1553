"""The work of `prepare`: stages of independent tasks, each of which leaves one output, whole or not at all.

A task whose output exists is not run again; that is all there is to going on after a kill.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait as wait_for_process
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import pyarrow as pa

Task = TypeVar("Task")
Result = TypeVar("Result")

SCRATCH_SUFFIX = ".tmp"


class WorkerDied(ValueError):
    """A worker process ended before its task did."""


Progress = Callable[[str, float, int], None]
"""Is told the stage, the share of it that is done, and how many rows it has done."""


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a scratch folder, which becomes `folder` when all is written."""
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}{SCRATCH_SUFFIX}")
    scratch.mkdir(parents=True)
    yield scratch
    os.replace(scratch, folder)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the path of a scratch file, which becomes `path` when all is written."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}{SCRATCH_SUFFIX}")
    scratch.parent.mkdir(parents=True, exist_ok=True)
    yield scratch
    os.replace(scratch, path)


def remove_scratch(folder: Path) -> None:
    """Delete what a killed process left half written."""
    for path in [*folder.rglob(f"*{SCRATCH_SUFFIX}")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class Workers:
    """Runs tasks in processes of one thread each; with one process, in this one.

    Args:
        processes: how many.
        progress: is told how far a stage has come.
    """

    def __init__(self, processes: int, progress: Progress) -> None:
        self.processes, self.progress = processes, progress
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.processes > 1:
            # spawn: a fork would copy the threads' locks of pyarrow and of whoever calls us in any state
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.processes, mp_context=context, initializer=_start_worker)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def run_stage(
        self,
        stage: str,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        *,
        total_rows: int,
        count_rows: Callable[[Task], int],
    ) -> list[tuple[Task, Result]]:
        """Run all tasks of a stage and return them with their results, in any order."""
        rows, results = 0, []
        self.progress(stage, 0.0, 0)
        for task, result in self.run(function, tasks):
            results.append((task, result))
            rows += count_rows(task)
            self.progress(stage, min(rows / max(total_rows, 1), 1.0), rows)
        self.progress(stage, 1.0, rows)
        return results

    def run(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """Yield each task with its result as they come; takes tasks only as fast as they are worked on.

        Raises:
            WorkerDied: a process was killed.
        """
        try:
            if self._pool is None:
                for task in tasks:
                    yield task, function(task)
            else:
                yield from self._run_in_pool(self._pool, function, tasks)
        except BrokenProcessPool as error:
            raise WorkerDied(
                "a worker process was killed (out of memory?) or could not start (call `prepare` under "
                "`if __name__ == '__main__':`); what is done is kept: run the command again, with fewer --processes"
            ) from error

    def _run_in_pool(
        self, pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Iterable[Task]
    ) -> Iterator[tuple[Task, Result]]:
        running: dict[Future[Result], Task] = {}
        for task in tasks:
            with _hold_interrupts():  # the pool starts its processes as tasks come
                future = pool.submit(function, task)
            running[future] = task
            if len(running) > 2 * self.processes:
                yield from _collect(running)
        while running:
            yield from _collect(running)


def _collect(running: dict[Future[Result], Task]) -> Iterator[tuple[Task, Result]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        yield running.pop(future), future.result()


@contextmanager
def _hold_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait until processes are started, which inherit that and stay silent before they reach our code."""
    resource_tracker.ensure_running()  # it would let interrupts in again if it were started meanwhile
    held: list[int] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    # Another thread may take the signal, and have it handled in this one for all that.
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number)) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if held:
            signal.raise_signal(signal.SIGINT)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    pa.set_cpu_count(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    wait_for_process([parent.sentinel])
    os._exit(1)


@contextmanager
def named_full_disk(folder: Path) -> Iterator[None]:
    """Turn a full disk into one line that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"the disk of {folder} is full; what is done is kept: make room and run the same command again"
        ) from error
