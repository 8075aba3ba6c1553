"""A disk that takes no more ends a process with one line that says so; what it had acknowledged is there afterwards."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from embeddings.row_optimizers import RowSGD
from embeddings.tables import TableConfig
from parameter_server.client.frame_cutting import Push
from parameter_server.client.rows_client import LaneLease, RowsClient
from parameter_server.control.coordinator_client import GrpcCoordinatorClient
from parameter_server.control.routes_source import CoordinatorRoutes
from parameter_server.coordinator.answers import Chunk
from parameter_server.description import RunDescription
from parameter_server.errors import RefusedError
from parameter_server.transports import GrpcConnection

TABLE = TableConfig(name="t", num_rows=100, dim=4, init_scale=0.0, optimizer=RowSGD(learning_rate=1.0))
RUN = RunDescription(
    run_id=7, seed=1, tables=(TABLE,), durability="journal", samples=10**6, batch_size=1, chunk_batches=1
)
LINE = "; what was acknowledged is still "


@contextmanager
def started(part: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """A process with its state in `PART`, at `unix:PART.socket`, that is ready."""
    own = ["--folder", part, "--address", f"unix:{part}.socket"]
    with (
        Path(f"{part}.err").open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "dlrm", "ps", part, *own, *flags],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process,
    ):
        try:
            assert process.stdout is not None
            if part == "coordinator":
                assert process.stdout.readline().startswith("ready")
            yield process
        finally:
            process.kill()


def fill_disk(process: subprocess.Popen[str], file: Path, more: int) -> None:
    """Lets no file of a process grow beyond what one has now, and some bytes, as a full disk does."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (file.stat().st_size + more, resource.RLIM_INFINITY))


def ends_with_one_line(process: subprocess.Popen[str], part: str) -> None:
    assert process.wait(30) == 2
    *_, last = Path(f"{part}.err").read_text().splitlines()
    assert last.startswith("recforge: error: ")
    assert LINE in last


def test_a_coordinator_ends_and_what_it_had_answered_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with closing(GrpcCoordinatorClient("unix:coordinator.socket", deadline_seconds=30)) as client:
        done = 0
        with started("coordinator") as process:
            member = client.register("trainer", "t", description_json=RUN.to_json()).member
            fill_disk(process, Path("coordinator/coordinator.sqlite-wal"), 100_000)
            with suppress(RefusedError):
                for _ in range(1000):
                    chunk = client.next_chunk(member)
                    assert isinstance(chunk, Chunk)
                    client.complete_chunk(member, chunk.lane, chunk.lease, chunk.index)
                    done += 1
            ends_with_one_line(process, "coordinator")
        assert 0 < done < 1000
        with started("coordinator"):
            assert client.status().chunks_completed == done


def test_a_shard_ends_and_what_it_had_acknowledged_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shard_of = ("--coordinator", "unix:coordinator.socket", "--name", "a")
    ids, ones = np.arange(100), np.ones((100, 4), np.float32)
    address = "unix:coordinator.socket"
    with started("coordinator"), closing(GrpcCoordinatorClient(address, deadline_seconds=60)) as client:
        member = client.register("client", "c", description_json=RUN.to_json()).member
        lane, done = client.client_lane(member), 0
        with started("shard", *shard_of) as process:
            source = CoordinatorRoutes(client)
            with closing(RowsClient(RUN, source, GrpcConnection, deadline_seconds=30)) as rows:
                rows.pull([(0, ids)]).result(60)
                (segment,) = Path("shard/journal").iterdir()
                fill_disk(process, segment, 20_000)
                for clock in range(1, 100):
                    pushed = rows.push(LaneLease(lane.lane, lane.lease), clock, [Push(0, ids, ones)])
                    if not wait([pushed], timeout=2).done:
                        break
                    pushed.result()
                    done = clock
                ends_with_one_line(process, "shard")
        assert 0 < done < 99
        with started("shard", *shard_of), closing(RowsClient(RUN, CoordinatorRoutes(client), GrpcConnection)) as rows:
            (pulled,) = rows.pull([(0, ids)]).result(60)
            assert (pulled.rows == -done).all()
