"""How many rows a second does a parameter server's core pull and push, against other ways to write it?

One table of 500,000 rows x 64 in a process of its own, row-wise Adagrad, 20,000 different rows a call, four calls under
way, over TCP on this machine; torch has one thread. Seconds are those of processors: of the server's process alone for
`_per_core_second`, and of server and client together for ratios, so that a busy neighbour takes turns away but is not
counted. All ways take turns on the same ids; a figure is the median of its turns.

The headline is fp16 (`pull_rows_per_core_second`, ...), rows and gradients as they travel; fp32 is beside it. The peer
of `pull_vs_rpc` and `push_vs_rpc` is `torch.distributed.rpc` over TCP with rows in a tensor, `_own_table` our own table
behind it, and `_shm` the first over shared memory, as rpc does within one machine. `share_of_tcp` is a bare socket's
seconds for as many bytes, over ours. `journal_vs_none` compares pushes that a shard also writes to its journal, synced.
`slow_trainer_cost` is the share of their steps that two trainers lose while a third one is ten times slower.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from benchmarks.parameter_server_processes import (
    PHASE_SECONDS,
    QUICK,
    Other,
    Shape,
    describe,
    json_of,
    open_client,
    receive,
    start,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IN_FLIGHT = 4
WARM_UP = 1
ValueType = Literal["fp32", "fp16"]
TYPES: tuple[ValueType, ...] = ("fp16", "fp32")
Call = Callable[[int], Any]  # of a call's number: begins it; its result has ``result`` or ``wait``


class Way(NamedTuple):
    """One way to pull or push."""

    name: str
    server: Other
    begin: Call


class Used(NamedTuple):
    """Seconds of processors, for one row."""

    server: float
    both: float


class Calls(NamedTuple):
    """What is asked for and given, by number of the call modulo theirs."""

    ids: Sequence[NDArray[np.int64]]
    gradients: NDArray[np.float32]


def main() -> None:
    """Measure everything, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=Shape.turns, help="turns of each way that are measured")
    parser.add_argument("--quick", action="store_true", help="tables of nearly nothing, to see that it runs")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it when it is imported
    shape = QUICK if arguments.quick else Shape(turns=arguments.turns)
    import torch

    from embeddings.allocation import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    figures: dict[str, float] = {}
    for name in arguments.parts:
        figures |= PARTS[name](shape)
        print(f"{name}: {json.dumps(_rounded(figures))}", file=sys.stderr)
    print(json.dumps(_rounded(figures)))


def measure_rows(shape: Shape) -> dict[str, float]:
    """Measure a shard alone, and against a socket and rpc over TCP."""
    calls, figures = draw_calls(shape), dict[str, float]()
    with ExitStack() as stack:
        ways = list(stack.enter_context(our_ways(shape, calls)))
        ways += stack.enter_context(rpc_ways(shape, calls, over_tcp=True))
        ways += stack.enter_context(socket_ways(shape))
        used = take_turns(ways, shape)
    for verb in ("pull", "push"):
        for kind in TYPES:
            suffix, ours = "" if kind == "fp16" else f"_{kind}", used[f"{verb}_{kind}"]
            figures[f"{verb}_rows_per_core_second{suffix}"] = 1 / ours.server
            figures[f"{verb}_rows_per_both_second{suffix}"] = 1 / ours.both
            figures[f"{verb}_vs_rpc{suffix}"] = used[f"{verb}_{kind}_tensor"].both / ours.both
            figures[f"{verb}_vs_rpc_own_table{suffix}"] = used[f"{verb}_{kind}_ours"].both / ours.both
            share = used[f"{verb}_{kind}_socket"].both / ours.both
            figures["share_of_tcp" if (verb, kind) == ("push", "fp16") else f"share_of_tcp_{verb}_{kind}"] = share
    return figures


def measure_shm(shape: Shape) -> dict[str, float]:
    """Measure against rpc over shared memory."""
    calls = draw_calls(shape)
    with our_ways(shape, calls) as ours, rpc_ways(shape, calls, over_tcp=False) as theirs:
        used = take_turns([*ours, *theirs], shape)
    return {
        f"{verb}_vs_rpc_shm{'' if kind == 'fp16' else '_fp32'}": used[f"{verb}_{kind}_tensor"].both
        / used[f"{verb}_{kind}"].both
        for verb in ("pull", "push")
        for kind in TYPES
    }


def measure_journal(shape: Shape) -> dict[str, float]:
    """Measure pushes to a shard that keeps a journal against pushes to one that does not."""
    calls = draw_calls(shape)
    with our_ways(shape, calls) as none, our_ways(shape, calls, "journal") as journal:
        pushes = [way for way in (*none, *journal) if way.name.startswith("push")]
        used, walls = take_turns(pushes, shape), dict[str, float]()
        for way in pushes:
            began = time.perf_counter()
            for number in range(IN_FLIGHT):
                run_calls(way.begin, number * shape.calls, shape.calls)
            walls[way.name] = time.perf_counter() - began
    return {
        "journal_vs_none": used["push_fp16"].both / used["push_fp16_journal"].both,
        "journal_vs_none_fp32": used["push_fp32"].both / used["push_fp32_journal"].both,
        "journal_vs_none_wall": walls["push_fp16"] / walls["push_fp16_journal"],
    }


def measure_slow_trainer(shape: Shape) -> dict[str, float]:
    """Measure what two trainers lose while a third one is slow, in every other phase."""
    text = json_of(shape)
    with ExitStack() as stack:
        server = stack.enter_context(start("shard", text, "none", "localhost:0"))
        trainers = [
            stack.enter_context(start("trainer", text, server.address, str(lane), "slow" if lane == 2 else "steady"))
            for lane in range(3)
        ]
        begin, told = time.time() + 0.5, []
        for trainer in trainers:
            print(begin, file=trainer.process.stdin, flush=True)
        for trainer in trainers:
            assert trainer.process.stdout is not None
            told.append(json.loads(trainer.process.stdout.readline()))
    steps: dict[bool, int] = defaultdict(int)
    for end in (end for ends in told[:2] for end in ends if end < PHASE_SECONDS * shape.phases):
        steps[bool(int(end / PHASE_SECONDS) % 2)] += 1
    return {"slow_trainer_cost": 1 - steps[True] / max(1, steps[False]), "slow_trainer_steps": float(len(told[2]))}


def draw_calls(shape: Shape) -> Calls:
    """Draw different ids for each call, and a gradient for all."""
    import numpy as np

    random = np.random.default_rng(0)
    ids = [random.choice(shape.rows, shape.rows_per_call, replace=False) for _ in range(8)]
    return Calls(ids, random.standard_normal((shape.rows_per_call, shape.dim), np.float32))


@contextmanager
def our_ways(shape: Shape, calls: Calls, durability: Literal["none", "journal"] = "none") -> Iterator[Sequence[Way]]:
    """Start a shard whose rows are all there, and give both verbs with both types of values."""
    import numpy as np

    from parameter_server.client.rows_client import LaneLease, Push

    with ExitStack() as stack:
        server = stack.enter_context(start("shard", json_of(shape), durability, "localhost:0"))
        clients = {kind: open_client(describe(shape, durability), server.address, kind, IN_FLIGHT) for kind in TYPES}
        for client in clients.values():
            stack.callback(client.close)
        clocks = dict.fromkeys(TYPES, 0)

        def pull_call(kind: ValueType, number: int) -> Any:
            return clients[kind].pull([(0, calls.ids[number % 8])])

        def push_call(kind: ValueType, number: int) -> Any:
            return push(kind, calls.ids[number % 8], calls.gradients)

        def push(kind: ValueType, ids: NDArray[np.int64], gradients: NDArray[np.float32]) -> Future[None]:
            clocks[kind] += 1
            lane = LaneLease(TYPES.index(kind), 1)
            return clients[kind].push(lane, clocks[kind], [Push(0, ids, gradients)])

        for first in range(0, shape.rows, shape.rows_per_call):
            ids = np.arange(first, min(first + shape.rows_per_call, shape.rows))
            push("fp16", ids, np.zeros((ids.size, shape.dim), np.float32)).result()
        suffix = "" if durability == "none" else f"_{durability}"
        yield [
            Way(f"{verb}_{kind}{suffix}", server, partial(call, kind))
            for verb, call in (("pull", pull_call), ("push", push_call))
            for kind in TYPES
        ]


@contextmanager
def rpc_ways(shape: Shape, calls: Calls, *, over_tcp: bool) -> Iterator[Sequence[Way]]:
    """Start a server of rpc, and give both verbs with both types of values, on both of its tables."""
    import torch
    from torch.distributed import rpc

    from benchmarks import parameter_server_rpc as peer

    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    all_ids, gradients = [torch.from_numpy(ids) for ids in calls.ids], torch.from_numpy(calls.gradients)
    with (
        start(str(port), "tcp" if over_tcp else "shm", module="benchmarks.parameter_server_rpc") as server,
        peer.joined(1, port, over_tcp=over_tcp),
    ):
        rpc.rpc_sync("server", peer.fill, (shape.rows, shape.dim))

        def pull_call(table: str, is_half: bool, number: int) -> Any:
            asked = rpc.rpc_async("server", peer.pull, (table, all_ids[number % 8], is_half))
            return asked.then(lambda rows: rows.value().float()) if is_half else asked

        def push_call(table: str, is_half: bool, number: int) -> Any:
            given = gradients.half() if is_half else gradients
            return rpc.rpc_async("server", peer.push, (table, all_ids[number % 8], given))

        yield [
            Way(
                f"{verb}_{kind}_{table}",
                server,
                partial(call, table, kind == "fp16"),
            )
            for verb, call in (("pull", pull_call), ("push", push_call))
            for kind in TYPES
            for table in ("tensor", "ours")
        ]


@contextmanager
def socket_ways(shape: Shape) -> Iterator[Sequence[Way]]:
    """Start a plain socket, and give as many bytes in both directions as each verb has."""
    room, message = memoryview(bytearray(16 << 20)), bytes(16 << 20)
    with start("socket") as server, socket.create_connection(("localhost", int(server.address))) as connection:

        def exchange(length: int, wanted: int, number: int) -> None:
            connection.sendall(length.to_bytes(8, "little") + wanted.to_bytes(8, "little"))
            connection.sendall(memoryview(message)[:length])
            receive(connection, room[:wanted])

        ways = []
        for kind in TYPES:
            values = shape.rows_per_call * shape.dim * (2 if kind == "fp16" else 4)
            for verb, extra in (("pull", (0, values)), ("push", (values, 0))):
                asked, answered = shape.rows_per_call * 8 + extra[0], 80 + extra[1]
                ways.append(Way(f"{verb}_{kind}_socket", server, partial(exchange, asked, answered)))
        yield ways


def take_turns(ways: Sequence[Way], shape: Shape) -> dict[str, Used]:
    """Measure all ways, turn by turn."""
    seconds: dict[str, list[Used]] = defaultdict(list)
    for turn in range(shape.turns + WARM_UP):
        for way in ways:
            began, server_began = time.process_time(), way.server.cpu_seconds()
            run_calls(way.begin, turn * shape.calls, shape.calls)
            server, rows = way.server.cpu_seconds() - server_began, shape.calls * shape.rows_per_call
            both = server + time.process_time() - began
            if turn >= WARM_UP:
                # a process's seconds are counted in hundredths
                seconds[way.name].append(Used(max(server, 0.005) / rows, both / rows))
    return {
        name: Used(statistics.median(its.server for its in taken), statistics.median(its.both for its in taken))
        for name, taken in seconds.items()
    }


def run_calls(begin: Call, first: int, count: int) -> None:
    """Make calls, some of which are under way at a time."""
    under_way: deque[Any] = deque()
    for number in range(first, first + count):
        under_way.append(begin(number))
        if len(under_way) >= IN_FLIGHT:
            _finish(under_way.popleft())
    while under_way:
        _finish(under_way.popleft())


def _finish(call: Any) -> None:
    if call is not None:
        call.result() if isinstance(call, Future) else call.wait()


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(figure, 4 if figure < 100 else 0) for name, figure in figures.items()}


PARTS: dict[str, Callable[[Shape], dict[str, float]]] = {
    "rows": measure_rows,
    "shm": measure_shm,
    "journal": measure_journal,
    "slow_trainer": measure_slow_trainer,
}


if __name__ == "__main__":
    main()
