"""The other processes of the parameter server's benchmark: a shard, a raw socket, and trainers of which one is slow.

They are started with ``python -m``, say on their first line of output where they listen, and end with their input.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from parameter_server.client.rows_client import RowsClient
    from parameter_server.description import RunDescription
    from parameter_server.partition import Routes

PHASE_SECONDS = 2.0
COMPUTE_SECONDS = 0.04
SLOWER = 10
_SERVER_MODULE = "benchmarks.parameter_server_processes"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large the table and its calls are."""

    rows: int = 500_000
    dim: int = 64
    rows_per_call: int = 20_000
    calls: int = 40
    turns: int = 5
    phases: int = 6


QUICK = Shape(rows=4_000, rows_per_call=500, calls=3, turns=1, phases=2)


@dataclass
class Other:
    """A process that was started."""

    process: subprocess.Popen[str]
    address: str

    def cpu_seconds(self) -> float:
        """Gives what it has used so far, of all its threads."""
        import psutil

        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)


@contextmanager
def start(*arguments: str, module: str = _SERVER_MODULE) -> Iterator[Other]:
    """Starts a process, and ends it."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with contextlib.closing(process.stdin), contextlib.closing(process.stdout):
            first = process.stdout.readline().strip()
            if not first:
                raise RuntimeError(f"{arguments}: ended with status {process.wait()}")
            yield Other(process, first)
    finally:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def describe(shape: Shape, durability: Literal["none", "snapshot", "journal"]) -> RunDescription:
    """Describes a run with one table under row-wise Adagrad."""
    from embeddings import RowWiseAdagrad, TableConfig
    from parameter_server.description import RunDescription

    table = TableConfig(
        name="C1", num_rows=1 << 40, dim=shape.dim, optimizer=RowWiseAdagrad(learning_rate=0.01), init_scale=0.01
    )
    return RunDescription(run_id=1, seed=0, tables=(table,), durability=durability)


def make_routes(address: str) -> Routes:
    """Makes routes to one shard."""
    import numpy as np

    from parameter_server.partition import Routes

    return Routes(epoch=1, owners=np.zeros(4096, np.int32), addresses={0: address})


def open_client(
    description: RunDescription, address: str, value_type: Literal["fp32", "fp16"], max_in_flight: int = 4
) -> RowsClient:
    """Opens a client of one shard."""
    from parameter_server.client.rows_client import RowsClient
    from parameter_server.control.routes_source import FixedRoutes
    from parameter_server.transports import GrpcConnection

    routes = FixedRoutes(make_routes(address))
    return RowsClient(description, routes, GrpcConnection, value_type=value_type, max_in_flight=max_in_flight)


def serve_shard(shape: Shape, durability: Literal["none", "snapshot", "journal"], address: str) -> None:
    """Serves one shard until the input ends."""
    from pathlib import Path

    from embeddings.allocation import keep_freed_memory
    from parameter_server.processes.rows_service import add_rows_service, make_server
    from parameter_server.security.security import ServerSecurity
    from parameter_server.shard.shard import Shard

    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) if durability == "journal" else None
        shard = Shard(describe(shape, durability), 0, folder=kept)
        server = make_server()
        where = ServerSecurity().listen(server, address)
        shard.set_routes(make_routes(where))
        add_rows_service(server, shard)
        server.start()
        print(where, flush=True)
        sys.stdin.read()
        server.stop(1.0).wait()
        shard.close()


def serve_socket() -> None:
    """Reads messages from a socket, as long as their first 8 bytes say, and answers with as many as the next 8."""
    with socket.create_server(("localhost", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
        connection, _ = listening.accept()
        with connection:
            answer, room = bytes(16 << 20), memoryview(bytearray(16 << 20))
            while receive(connection, room[:16]):
                length, wanted = (int.from_bytes(room[at : at + 8], "little") for at in (0, 8))
                receive(connection, room[:length])
                connection.sendall(memoryview(answer)[:wanted])


def receive(connection: socket.socket, room: memoryview) -> bool:
    """Fills memory from a socket; says whether the other side is still there."""
    at = 0
    while at < len(room):
        if not (count := connection.recv_into(room[at:])):
            return False
        at += count
    return True


def train(shape: Shape, address: str, lane: int, is_slow: bool) -> None:
    """Pulls, sleeps in place of computing, and pushes; prints when each step ended.

    Every other phase, a slow one sleeps longer.
    """
    import numpy as np

    from parameter_server.client.rows_client import LaneLease, Push

    random, ends = np.random.default_rng(lane), list[float]()
    client = open_client(describe(shape, "none"), address, "fp32")
    clock = 1
    first = np.arange(lane * 1000, lane * 1000 + 500)  # compiles, and connects
    client.push(LaneLease(lane, 1), clock, [Push(0, first, client.pull([(0, first)]).result()[0].rows)]).result()
    print("ready", flush=True)
    start = float(sys.stdin.readline())
    end = start + PHASE_SECONDS * shape.phases
    while (now := time.time()) < end:
        slower = SLOWER if is_slow and int((now - start) / PHASE_SECONDS) % 2 else 1
        ids = random.choice(shape.rows, shape.rows_per_call // 10, replace=False)
        rows = client.pull([(0, ids)]).result()[0].rows
        time.sleep(COMPUTE_SECONDS * slower)
        clock += 1
        client.push(LaneLease(lane, 1), clock, [Push(0, ids, rows)])
        ends.append(time.time() - start)
    client.wait()
    client.close()
    print(json.dumps(ends), flush=True)


def shape_of(text: str) -> Shape:
    """Reads what ``json_of`` wrote."""
    return Shape(**json.loads(text))


def json_of(shape: Shape) -> str:
    """Writes a shape for another process."""
    return json.dumps(asdict(shape))


def main() -> None:
    """Is one of the processes."""
    kind, *arguments = sys.argv[1:]
    kinds: dict[str, Callable[..., Any]] = {
        "shard": lambda shape, durability, address: serve_shard(shape_of(shape), durability, address),
        "socket": serve_socket,
        "trainer": lambda shape, address, lane, slow: train(shape_of(shape), address, int(lane), slow == "slow"),
    }
    kinds[kind](*arguments)


if __name__ == "__main__":
    main()
