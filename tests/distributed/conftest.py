"""Ranks that are processes of their own, as in a real run: started afresh, joined over gloo, ended when one fails."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("run_rank.py")
REPOSITORY = PROGRAM.parents[2]


class StartedRanks:
    """Running ranks; `processes` may be killed by a test that is about that."""

    def __init__(
        self, folder: Path, function: Callable[..., Any], count: int, arguments: tuple[Any, ...], seconds: float
    ):
        self.folder, self.count, self.end = folder, count, time.monotonic() + seconds
        call = (inspect.getsourcefile(function), function.__name__, arguments)
        (folder / "call.pickle").write_bytes(pickle.dumps(call))
        own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPOSITORY)}
        self.processes = []
        for rank in range(count):
            command = [sys.executable, str(PROGRAM), *map(str, (folder, rank, count, seconds))]
            with self._log(rank).open("wb") as log:
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | own))

    def output(self, rank: int) -> str:
        return self._log(rank).read_text(errors="replace")

    def wait(self) -> list[int]:
        """Waits for all ranks to end, of themselves or by a signal, and returns their exit codes."""
        while any(process.poll() is None for process in self.processes):
            self._check_time()
        return [process.returncode for process in self.processes]

    def results(self) -> list[Any]:
        """Waits for what the function returned, by rank; the first rank that fails ends all and fails the test."""
        while any(process.poll() is None for process in self.processes):
            self._check_failures()
            self._check_time()
        self._check_failures()
        return [pickle.loads((self.folder / f"result_{rank}.pickle").read_bytes()) for rank in range(self.count)]

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _log(self, rank: int) -> Path:
        return self.folder / f"output_{rank}.txt"

    def _check_failures(self) -> None:
        failed = [rank for rank, process in enumerate(self.processes) if process.poll() not in (None, 0)]
        if failed:
            # What brought one down often shows in the next rank only as a lost connection.
            outputs = "\n".join(f"rank {rank}:\n{self.output(rank)[-4000:]}" for rank in failed)
            pytest.fail(f"expected {self.count} ranks to end well, got failures of {failed}\n{outputs}", pytrace=False)

    def _check_time(self) -> None:
        time.sleep(0.02)
        if time.monotonic() > self.end:
            running = [rank for rank, process in enumerate(self.processes) if process.poll() is None]
            outputs = "\n".join(f"rank {rank}:\n{self.output(rank)[-2000:]}" for rank in running)
            pytest.fail(f"expected {self.count} ranks to end in time, ranks {running} still run\n{outputs}")


@pytest.fixture(scope="session")
def start_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., StartedRanks]]:
    """Starts ranks that call `function(rank, count, *arguments)`, a function at the top of a test's file.

    Each is a new process with one thread, joined to `torch.distributed`'s default group over gloo. Arguments and
    results are pickled; they must not be of classes of the test's file.
    """
    started: list[StartedRanks] = []

    def start(function: Callable[..., Any], count: int, *arguments: Any, seconds: float = 120) -> StartedRanks:
        folder = tmp_path_factory.mktemp(f"ranks_{count}_")
        started.append(StartedRanks(folder, function, count, arguments, seconds))
        return started[-1]

    yield start
    for ranks in started:
        ranks.stop()


@pytest.fixture(scope="session")
def run_ranks(start_ranks: Callable[..., StartedRanks]) -> Callable[..., list[Any]]:
    """Does as `start_ranks`, waits, and returns the results by rank."""

    def run(function: Callable[..., Any], count: int, *arguments: Any, seconds: float = 120) -> list[Any]:
        ranks = start_ranks(function, count, *arguments, seconds=seconds)
        try:
            return ranks.results()
        finally:
            ranks.stop()

    return run
