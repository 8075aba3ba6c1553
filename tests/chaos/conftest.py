"""Runs of the command line on several ranks, in which something breaks."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dlrm.data.synthetic import SyntheticConfig, generate

PROGRAM = Path(__file__).with_name("run_with_faults.py")
REPOSITORY = PROGRAM.parents[2]
# As `recforge train --ranks` starts ranks, but of a program that may break.
LAUNCH = """
import json, sys
from dlrm.distributed.launch import launch_ranks
sys.exit(launch_ranks(**json.loads(sys.argv[1])))
"""
SETTINGS = {
    "epochs": 2,
    "seed": 5,
    "log-every-samples": 1,
    "model.dim": 8,
    "model.bottom": 16,
    "model.top": 16,
    "dense.name": "lamb",
    "dense.learning-rate": 0.01,
    "step.global-batch-size": 100,
    "step.threads": 1,
    "evaluation.every-samples": 1000,
    "evaluation.batch-size": 200,
    "checkpoint.every-samples": 300,
    "guards.chance-evaluations": 0,
    "parallel.replicate-below-rows": 50,  # so that some tables are sharded and others are not
}


class FaultyRun:
    """A run in a folder; it can be started again, on other ranks, with another fault."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.records: list[Path] = []  # of each launch
        self.errors = folder.with_suffix(".err")
        self.process: subprocess.Popen[bytes] | None = None
        self.other: subprocess.Popen[bytes] | None = None

    def start(self, ranks: int = 1, fault: str = "none", max_restarts: int = 3, **changed: Any) -> None:
        program = self._program(fault, changed)
        command = [sys.executable, *program]
        if ranks > 1:
            asked = {"program": program, "ranks": ranks, "max_restarts": max_restarts}
            command = [sys.executable, "-c", LAUNCH, json.dumps(asked)]
        self.process = self._start(command)

    def start_on_two_machines(self) -> None:
        """As torchrun would on two machines, of which one is enough: `process`, which keeps the store, and `other`."""
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        place = f"--nnodes 1:2 --nproc-per-node 1 --max-restarts 3 --rdzv-backend c10d --rdzv-id run{port}".split()
        place += ["--rdzv-endpoint", f"localhost:{port}", "--local-addr", "localhost"]
        command = [sys.executable, "-m", "torch.distributed.run", *place, *self._program("none", {})]
        self.process, end = self._start(command), time.monotonic() + 100
        while not _listens(port):
            assert time.monotonic() < end, self.errors.read_text()
            time.sleep(0.05)
        self.other = self._start(command)

    def _program(self, fault: str, changed: dict[str, Any]) -> list[str]:
        settings = SETTINGS | {name.replace("__", ".").replace("_", "-"): value for name, value in changed.items()}
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        place = ["--data", str(self.data), "--output", str(self.folder)]
        self.records.append(self.folder.with_name(f"launch-{len(self.records)}.jsonl"))
        return [str(PROGRAM), str(self.records[-1]), fault, "train", "synthetic", *place, *flags]

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        with self.errors.open("ab") as errors:
            return subprocess.Popen(command, stdout=errors, stderr=errors, env=env)

    def wait(self, seconds: float = 280) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def run(self, ranks: int = 1, fault: str = "none", **changed: Any) -> int:
        self.start(ranks, fault, **changed)
        return self.wait()

    def said(self) -> list[str]:
        """Lines of the program itself."""
        text = self.errors.read_text(errors="replace").replace("\r", "\n")
        return [line for line in text.splitlines() if line.startswith("recforge:")]

    def noted(self) -> list[list[dict[str, Any]]]:
        """Return what was noted by each start, in their order."""
        starts: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for launch, path in enumerate(self.records):
            for line in path.read_text().splitlines() if path.is_file() else ():
                record = json.loads(line)
                starts.setdefault((launch, record["start"]), []).append(record)
        return [records for _, records in sorted(starts.items())]

    def history(self) -> list[tuple[int, list[int]]]:
        """Return (samples, rows in the order of ranks) of the steps that count: what a restart undid does not."""
        lasting: dict[tuple[int, int], list[int]] = {}
        for records in self.noted():
            steps = [record for record in records if "rows" in record]
            resumed = min((record["samples"] - record["size"] for record in steps), default=math.inf)
            lasting = {key: rows for key, rows in lasting.items() if key[0] <= resumed}
            for step in steps:
                assert (step["samples"], step["rank"]) not in lasting, f"trained twice: {step}"
                lasting[step["samples"], step["rank"]] = step["rows"]
        return [
            (samples, [row for _, rows in group for row in rows])
            for samples, group in itertools.groupby(sorted(lasting.items()), key=lambda item: item[0][0])
        ]

    def stop(self) -> None:
        for process in (self.process, self.other):
            if process is not None and process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("localhost", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python code of any kind on ranks, through the launcher."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, ranks: int) -> subprocess.Popen[str]:
        asked = {"program": ["-c", code], "ranks": ranks, "max_restarts": 0}
        command = [sys.executable, "-c", LAUNCH, json.dumps(asked)]
        env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, env=env, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def click_log_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = SyntheticConfig(num_train=1_530, num_valid=800, num_test=400, max_ids=500, rows_per_part=500)
    return generate(config, tmp_path_factory.mktemp("click_log") / "data").folder


@pytest.fixture(scope="session")
def faulty_run(click_log_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], FaultyRun]]:
    """Makes a run in a folder of its own."""
    made: list[FaultyRun] = []

    def make() -> FaultyRun:
        made.append(FaultyRun(tmp_path_factory.mktemp("run") / "run", click_log_folder))
        return made[-1]

    yield make
    for run in made:
        run.stop()


@pytest.fixture(scope="session")
def left_alone(faulty_run: Callable[[], FaultyRun]) -> FaultyRun:
    """The same run on one process, to its end."""
    run = faulty_run()
    assert run.run() == 0, run.errors.read_text()
    return run


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for the files of a cluster, whose sockets' paths must be short, as those of pytest's folders are not."""
    made = Path(tempfile.mkdtemp(prefix="chaos"))
    yield made
    shutil.rmtree(made)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-minutes", type=float, default=5.0, help="how long the long form of tests/chaos lasts")
    parser.addoption("--chaos-seed", type=int, default=1, help="of its first round")


@pytest.fixture
def chaos_minutes(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--chaos-minutes", 5.0))


@pytest.fixture
def chaos_seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--chaos-seed", 1))
