"""Ranks that are processes of their own, as in a real run: started afresh, joined over gloo, ended when one fails.

And what their tables are compared with.
"""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embeddings import RowAdagrad, RowCowClip, RowLamb, RowSGD, RowWiseAdagrad, TableConfig
from embeddings.row_optimizers import moves_all_rows

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


@dataclass
class PlainTable:
    """One table in float64 and written the plain way: bags are a matrix, and so are sums over them.

    A batch has lists of bags by feature, `ids` and `weights`; what it touched is kept until `update`.
    """

    config: TableConfig
    w: NDArray[np.float64]
    state: dict[str, NDArray[np.float64]]
    updates: int = 0
    bags: list[NDArray[np.float64]] = field(default_factory=list)
    touched: list[int] = field(default_factory=list)

    def look_up(self, batch: Any, *, weighted: bool) -> list[NDArray[np.float64]]:
        self.bags, self.touched = [], []
        for feature in self.config.features:
            matrix = np.zeros((len(batch.ids[feature]), self.config.num_rows))
            for bag, (ids, weights) in enumerate(zip(batch.ids[feature], batch.weights[feature], strict=True)):
                scale = max(1, len(ids)) if self.config.pooling == "mean" else 1
                np.add.at(matrix[bag], ids, weights.astype(np.float32) / scale if weighted else 1 / scale)
                self.touched += ids.tolist()
            self.bags.append(matrix)
        return [matrix @ self.w for matrix in self.bags]

    def update(self, gradients: list[NDArray[np.float64]], factor: float, eps_factor: float) -> None:
        rule = self.config.optimizer
        eps = eps_factor * getattr(rule, "eps", 0)
        rows = list(range(self.config.num_rows)) if moves_all_rows(rule) else sorted(set(self.touched))
        w, rate, decay = self.w[rows], rule.learning_rate * factor, getattr(rule, "weight_decay", 0)
        g = sum(bags.T @ gradient for bags, gradient in zip(self.bags, gradients, strict=True))[rows]
        self.updates += 1
        if isinstance(rule, RowSGD):
            step = g + decay * w
        elif isinstance(rule, RowAdagrad | RowWiseAdagrad):
            g = g + decay * w
            root = np.sqrt(self._keep("sum_of_squares", rows, 1, 1, g**2))
            step = g / (root + eps)
        else:
            g = self._clip(rule, g, rows) if isinstance(rule, RowCowClip) else g
            m = self._keep("first_moment", rows, rule.betas[0], 1 - rule.betas[0], g)
            v = self._keep("second_moment", rows, rule.betas[1], 1 - rule.betas[1], g**2)
            corrected = np.sqrt(v / (1 - rule.betas[1] ** self.updates)) + eps
            step = m / (1 - rule.betas[0] ** self.updates) / corrected + decay * w
        if isinstance(rule, RowLamb) and rows:
            axis = 1 if rule.trust == "row" else None
            norms = [np.sqrt((x**2).sum(axis=axis, keepdims=True)) for x in (w, step)]
            step = step * np.where((norms[0] > 0) & (norms[1] > 0), norms[0] / norms[1], 1)
        self.w[rows] = w - rate * step

    def _clip(self, rule: RowCowClip, g: NDArray[Any], rows: list[int]) -> NDArray[np.float64]:
        last = self.state.get("last_update", np.full(len(self.w), self.updates - 1))
        g = g + 2 * rule.l2 * (self.updates - last[rows])[:, None] * self.w[rows]
        last[rows] = self.updates
        counts = np.maximum(np.bincount(self.touched, minlength=self.config.num_rows)[rows], 1)
        lengths = np.maximum(np.linalg.norm(self.w[rows], axis=1), rule.clip * self.config.dim**0.5 * rule.zeta)
        return g * np.minimum(1, rule.clip * counts * lengths / np.linalg.norm(g, axis=1))[:, None]

    def _keep(self, name: str, rows: list[int], old: float, new: float, g: NDArray[Any]) -> NDArray[np.float64]:
        kept = self.state[name]
        kept[rows] = old * kept[rows] + new * (g if kept.ndim == 2 else g.mean(axis=1))
        return kept[rows] if kept.ndim == 2 else kept[rows][:, None]


@pytest.fixture(scope="session")
def plain_table() -> type[PlainTable]:
    """The rules of row optimizers, written once more."""
    return PlainTable
