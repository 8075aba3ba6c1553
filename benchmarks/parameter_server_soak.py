"""Does a run of parameter servers stay as large as it is, for as long as one likes, while members come and go?

A coordinator, shards, trainers and a reader of the serving feed, each a process. Trainers push to ids out of a window
that slides, so that rows are born, and evicted some seconds later. Every so often a trainer or a shard is killed and
started again, a trainer leaves for another one, or a shard joins and is drained later. The resident memory of each
process that is never killed (`coordinator`, `shard-0`, `trainer-0`, `reader`) must not grow after the warm-up, which is
the first third: a line through it must rise by less than `--bound` MiB a minute. The status is 1 where one does not.

In seconds of wall clock, on a machine that may be shared: the pushes per second say how much load there was.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dlrm.asynchronous.crew import Member, Role

if TYPE_CHECKING:
    from parameter_server.control.coordinator_client import GrpcCoordinatorClient
    from parameter_server.description import RunDescription

LASTING = ("coordinator", "shard-0", "trainer-0", "reader")
MEASURE_SECONDS = 5.0
WINDOW_SECONDS = 5.0  # of ids that a trainer draws from
IDS_PER_SECOND = 2_000  # by which the window slides
EVICT_AFTER_SECONDS = 15.0
IDS_PER_BATCH = 1_000
MIB = float(1 << 20)


def main() -> None:
    """Run the parent, or one of the processes that it starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--churn-seconds", type=float, default=15.0, help="between members that come or go")
    parser.add_argument("--batches-per-second", type=float, default=5.0, help="of each trainer")
    parser.add_argument("--bound", type=float, default=0.5, help="MiB a minute that a process may grow by")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--role", choices=["trainer", "reader"], help=argparse.SUPPRESS)
    parser.add_argument("--name", default="", help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "trainer":
        _train(arguments.name, arguments.coordinator, arguments.batches_per_second)
    elif arguments.role == "reader":
        _read(arguments.coordinator)
    else:
        result = Soak(arguments).run()
        print(json.dumps(result))
        sys.exit(0 if result["flat"] else 1)


class Soak:
    """The run, its churn and its measurements."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._draw = random.Random(arguments.seed)
        self._folder = Path(tempfile.mkdtemp(prefix="soak"))
        self._address = f"unix:{self._folder}/c"
        self._members: dict[str, Member] = {}
        self._resident: dict[str, list[tuple[float, float]]] = defaultdict(list)  # minutes, MiB
        self._rows: list[tuple[float, float]] = []
        self._pushed: dict[str, float] = defaultdict(float)
        self._last_pushed: dict[str, float] = {}
        self._events: dict[str, int] = defaultdict(int)
        self._next_number = 2
        self._ends: dict[str, float] = {}

    def run(self) -> dict[str, object]:
        """Runs for as long as was asked, and gives the figures."""
        with ExitStack() as stack:
            stack.callback(self._end)
            self._start_coordinator()
            for number in range(2):
                self._start_shard(number)
                self._start_own("trainer", number)
            self._start_own("reader")
            client = self._connect()
            stack.callback(client.close)
            began = time.monotonic()
            end, next_churn = began + 60 * self._arguments.minutes, began + 60.0
            while (now := time.monotonic()) < end:
                time.sleep(max(0.0, MEASURE_SECONDS - time.monotonic() % MEASURE_SECONDS))
                self._measure((now - began) / 60, client)
                self._check()
                if now > next_churn:
                    self._churn(client)
                    next_churn = now + self._arguments.churn_seconds
            return self._figures((time.monotonic() - began) / 60)

    def _figures(self, minutes: float) -> dict[str, object]:
        warm = minutes / 3
        slopes, sizes = {}, {}
        for name in LASTING:
            times, sizes_then = zip(*[m for m in self._resident[name] if m[0] > warm], strict=True)
            slopes[name] = statistics.linear_regression(times, sizes_then).slope
            sizes[name] = statistics.median(sizes_then)
        rows = [count for minute, count in self._rows if minute > warm]
        figures: dict[str, object] = {f"{name}_mib": round(size, 1) for name, size in sizes.items()}
        figures |= {f"{name}_mib_per_minute": round(slope, 3) for name, slope in slopes.items()}
        return figures | {
            "minutes": round(minutes, 1),
            "bound_mib_per_minute": self._arguments.bound,
            "flat": max(slopes.values()) < self._arguments.bound,
            "rows_lowest": min(rows),
            "rows_highest": max(rows),
            "pushed_rows_per_second": round(sum(self._pushed.values()) / minutes / 60),
            "folder_mib": round(sum(file.stat().st_size for file in self._folder.rglob("*") if file.is_file()) / MIB),
            **self._events,
        }

    def _measure(self, minute: float, client: GrpcCoordinatorClient) -> None:
        import psutil

        for name, member in self._members.items():
            if member.pid is not None:
                with suppress(psutil.NoSuchProcess):
                    self._resident[name].append((minute, psutil.Process(member.pid).memory_info().rss / MIB))
        try:
            status = client.status()
        except (ConnectionError, ValueError):
            return
        self._rows.append((minute, status.rows))
        for shard in status.members:
            if (pushed := shard.facts.get("pushed_rows")) is not None:
                more = pushed - self._last_pushed.get(shard.name, 0.0)
                self._pushed[shard.name] += more if more >= 0 else pushed  # from 0 after a restart
                self._last_pushed[shard.name] = pushed
        print(f"{minute:6.1f} min: {self._tell()}; {status.rows:,} rows", file=sys.stderr, flush=True)

    def _tell(self) -> str:
        alive = [name for name, member in self._members.items() if member.pid is not None]
        return ", ".join(f"{name} {self._resident[name][-1][1]:.0f} MiB" for name in alive if self._resident[name])

    def _churn(self, client: GrpcCoordinatorClient) -> None:
        kinds = [self._kill_shard, self._kill_trainer, self._exchange_trainer, self._add_shard]
        self._draw.choice(kinds)()
        for name, at in list(self._ends.items()):
            if time.monotonic() > at:
                with suppress(ConnectionError, ValueError):
                    numbers = [m.shard for m in client.status().members if m.name == name and m.shard is not None]
                    for shard in numbers:  # none as long as it is slow to start: it is asked for again
                        client.drain(shard)
                        self._events["drained_shards"] += 1
                        del self._ends[name]

    def _kill_shard(self) -> None:
        self._kill(self._members["shard-1"])
        self._events["killed_shards"] += 1
        self._members["shard-1"].start()

    def _kill_trainer(self) -> None:
        self._kill(self._others("trainer")[0])
        self._events["killed_trainers"] += 1
        self._start_own("trainer", self._number())

    def _exchange_trainer(self) -> None:
        import signal

        self._start_own("trainer", self._number())
        leaving = self._others("trainer")[0]
        leaving.send(signal.SIGTERM)
        self._events["left_trainers"] += 1

    def _add_shard(self) -> None:
        if len(self._others("shard")) < 2:
            number = self._number()
            self._start_shard(number)
            self._events["joined_shards"] += 1
            self._ends[f"shard-{number}"] = time.monotonic() + 2 * self._arguments.churn_seconds

    def _others(self, role: str) -> list[Member]:
        named = [(name, member) for name, member in self._members.items() if name.startswith(role)]
        return [member for name, member in named if name not in LASTING and member.pid is not None]

    def _kill(self, member: Member) -> None:
        import signal

        member.send(signal.SIGKILL)
        member.reap()

    def _check(self) -> None:
        for name, member in self._members.items():
            if member.status() not in (None, 0, -9):
                raise RuntimeError(
                    f"{name}: expected it to run, it ended with {member.status()}: {member.last_words()}"
                )

    def _number(self) -> int:
        self._next_number += 1
        return self._next_number

    def _start_coordinator(self) -> None:
        flags = ["--folder", str(self._folder / "run"), "--address", self._address, "--shards", "2"]
        self._start("coordinator", ["-m", "deploy.cli", "ps", "coordinator", *flags, "--snapshot-seconds", "10"])

    def _start_shard(self, number: int) -> None:
        name = f"shard-{number}"
        flags = ["--coordinator", self._address, "--name", name, "--folder", str(self._folder / name)]
        flags += ["--address", f"unix:{self._folder}/s{number}", "--eviction-seconds", "2"]
        self._start(name, ["-m", "deploy.cli", "ps", "shard", *flags])

    def _start_own(self, role: str, number: int | None = None) -> None:
        name = role if number is None else f"{role}-{number}"
        flags = ["--role", role, "--name", name, "--coordinator", self._address]
        flags += ["--batches-per-second", str(self._arguments.batches_per_second)]
        self._start(name, ["-m", "benchmarks.parameter_server_soak", *flags])

    def _start(self, name: str, program: list[str]) -> None:
        role = Role(name=name, program=program, order=0, environment={"OMP_NUM_THREADS": "1"})
        self._members[name] = Member(role, self._folder)
        self._members[name].start()

    def _connect(self) -> GrpcCoordinatorClient:
        from parameter_server.control.coordinator_client import GrpcCoordinatorClient

        client = GrpcCoordinatorClient(self._address, deadline_seconds=30.0)
        client.routes(deadline_seconds=120)
        return client

    def _end(self) -> None:
        for member in self._members.values():
            self._kill(member)
        shutil.rmtree(self._folder)


def describe() -> RunDescription:
    """Describes the run: two tables whose rows go when they were not pushed to for a while."""
    from embeddings.row_optimizers import RowAdam, RowWiseAdagrad
    from embeddings.tables import UNBOUNDED, TableConfig
    from parameter_server.description import Growth, RunDescription

    growth = Growth(evict_after_seconds=EVICT_AFTER_SECONDS)
    tables = (
        TableConfig(
            name="users", num_rows=UNBOUNDED, dim=32, init_scale=0.1, optimizer=RowWiseAdagrad(learning_rate=0.1)
        ),
        TableConfig(name="items", num_rows=UNBOUNDED, dim=16, init_scale=0.1, optimizer=RowAdam(learning_rate=0.01)),
    )
    return RunDescription(
        run_id=0,
        seed=0,
        tables=tables,
        growth={table.name: growth for table in tables},
        durability="journal",
        samples=1 << 40,
        epoch_samples=1 << 40,
        batch_size=100,
        chunk_batches=20,
    )


def _train(name: str, coordinator: str, batches_per_second: float) -> None:
    """Pushes until killed or asked to leave; whatever happens to others, it begins anew."""
    import signal

    from parameter_server.control.coordinator_client import GrpcCoordinatorClient
    from parameter_server.errors import LaneLostError

    leaving: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: leaving.append(number))
    while not leaving:
        client = GrpcCoordinatorClient(coordinator, deadline_seconds=60.0)
        try:
            _train_as_member(client, name, batches_per_second, leaving)
        except (LaneLostError, ConnectionError, TimeoutError, ValueError) as error:
            print(f"begins anew: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            time.sleep(0.5)
        finally:
            client.close()


def _train_as_member(client: GrpcCoordinatorClient, name: str, batches_per_second: float, leaving: list[int]) -> None:
    import numpy as np

    from dlrm.asynchronous.membership import Membership
    from parameter_server.client.rows_client import LaneLease, Push, RowsClient
    from parameter_server.control.routes_source import CoordinatorRoutes
    from parameter_server.coordinator.answers import Chunk
    from parameter_server.transports import GrpcConnection

    draw = np.random.default_rng()
    with Membership(client, name, describe()) as member, ExitStack() as stack:
        rows = RowsClient(member.description, CoordinatorRoutes(client), GrpcConnection, deadline_seconds=60)
        stack.callback(rows.close)
        while not leaving:
            chunk = member.next_chunk()
            if not isinstance(chunk, Chunk):
                time.sleep(0.5)
                continue
            for index in range(-(-chunk.num_samples // chunk.batch_size)):
                last = time.time() * IDS_PER_SECOND
                drawn = last - draw.random((2, IDS_PER_BATCH)) ** 2 * WINDOW_SECONDS * IDS_PER_SECOND
                wanted = [(table, np.unique(drawn[table].astype(np.int64))) for table in range(2)]
                pulled = rows.pull(wanted).result()
                pushes = [
                    Push(table, ids, draw.normal(size=values.rows.shape).astype(np.float32), values.versions)
                    for (table, ids), values in zip(wanted, pulled, strict=True)
                ]
                rows.push(LaneLease(chunk.lane, chunk.lease), chunk.first_clock + index, pushes)
                time.sleep(1 / batches_per_second)
                if leaving:
                    return
            rows.wait()
            member.complete_chunk(chunk)


def _read(coordinator: str) -> None:
    """Follows all shards, as a server of predictions does, until killed."""
    from embeddings.allocation import share_free_memory
    from parameter_server.control.coordinator_client import GrpcCoordinatorClient
    from parameter_server.control.routes_source import CoordinatorRoutes
    from parameter_server.description import RunDescription
    from parameter_server.feed.connections import GrpcFeed
    from parameter_server.feed.reader import FeedReader
    from parameter_server.feed.tables import ServedTables

    share_free_memory()
    client = GrpcCoordinatorClient(coordinator, deadline_seconds=60.0)
    description = RunDescription.from_json(client.describe())
    served = ServedTables(description)
    with FeedReader(description, CoordinatorRoutes(client), GrpcFeed, served, seconds=0.5) as reader:
        while True:
            time.sleep(30)
            print(f"{reader.delay_seconds:.2f} s behind, {sum(served.num_rows)} rows", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
