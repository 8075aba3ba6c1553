"""How fast are rows on demand pulled, pushed and born, against local tables' rows and a dict of their ids?

One thread, a table of 1,000,000 rows x 64 with random ids of 63 bits and row-wise Adagrad, 20,000 unique ids a call, in
ascending order as they arrive over the wire. Times are the processor's, of this process, the median of calls; all take
turns. `LocalRows` look up, and update, the same number of rows of a table of that size with one id per bag. The dict
gives a list of slots for a list of ids. Births are pushes of rows that do not exist, into memory that was touched.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from embeddings import TableConfig

ROWS, IDS, DIM = 1_000_000, 20_000, 64
SMALL_ROWS, SMALL_IDS = 2000, 100
_INT_BYTES = 32  # of a Python int of 31 to 60 bits, rounded up by the allocator

Call = Callable[[int], Any]


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="calls of each kind that are measured")
    parser.add_argument("--small", action="store_true", help="a table of nearly nothing, to see that it runs")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it when it is imported
    rows, ids = (SMALL_ROWS, SMALL_IDS) if arguments.small else (ROWS, IDS)
    print(json.dumps({name: round(figure, 3) for name, figure in measure(rows, ids, arguments.rounds).items()}))


def measure(rows: int, ids: int, rounds: int) -> dict[str, float]:
    """Measure a table of so many rows, with so many ids a call."""
    import numpy as np
    import torch

    from embeddings import RowWiseAdagrad, TableConfig

    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    config = TableConfig(
        name="rows", num_rows=1 << 62, dim=DIM, init_scale=0.01, optimizer=RowWiseAdagrad(learning_rate=0.01)
    )
    everything = np.unique(random.integers(0, config.num_rows, rows + rows // 100))
    everything = random.permutation(everything)[:rows]
    asked = [np.sort(random.choice(everything, ids, replace=False)) for _ in range(8)]
    gradients = random.normal(size=(ids, DIM)).astype(np.float32)
    births, table = _bear(config, everything, gradients)
    calls = {
        **_table_calls(table, asked, gradients),
        **_local_calls(rows, ids, gradients),
        **_dict_calls(everything, asked),
    }
    seconds = _take_turns(calls, rounds) | {"births": births}
    result = {f"{name}_million_per_second": ids / 1e6 / its for name, its in seconds.items()}
    for name, other in (("pull", "local_look_up"), ("push", "local_update"), ("find", "dict")):
        result[f"{name}_vs_{other}"] = seconds[other] / seconds[name]
    map_bytes = table._rows.memory.entries.nbytes / rows
    dict_bytes = (sys.getsizeof(dict.fromkeys(everything.tolist())) + 2 * rows * _INT_BYTES) / rows
    record_bytes = 4 * table._rows.memory.stride
    return result | {"map_bytes_per_row": map_bytes, "dict_bytes_per_row": dict_bytes, "bytes_per_row": record_bytes}


def _bear(config: TableConfig, ids: NDArray[np.int64], gradients: NDArray[np.float32]) -> tuple[float, Any]:
    import numpy as np

    from embeddings.allocation import keep_freed_memory
    from embeddings.hashed.hashed_table import HashedTable

    keep_freed_memory()
    table = HashedTable(config, seed=0, salt=np.uint64(1))
    seconds: list[float] = []
    for _ in range(2):  # the first time the system finds memory, and kernels are compiled
        seconds.clear()
        table.drop(np.ones(4096, np.bool_))
        for some in np.array_split(ids, max(1, ids.size // len(gradients))):
            some = np.sort(some)[: len(gradients)]
            start = time.process_time()
            table.push(some, gradients[: some.size], updates=1, now=1.0)
            seconds.append((time.process_time() - start) / some.size * len(gradients))
    return statistics.median(seconds), table


def _table_calls(table: Any, asked: list[NDArray[np.int64]], gradients: NDArray[np.float32]) -> dict[str, Call]:
    import numpy as np

    wide, narrow, halves = (gradients.astype(kind) for kind in (np.float32, np.float16, np.float16))
    return {
        "pull": lambda turn: table.pull(asked[turn % 8], wide),
        "pull_fp16": lambda turn: table.pull(asked[turn % 8], narrow),
        "push": lambda turn: table.push(asked[turn % 8], gradients, updates=1, now=1.0),
        "push_fp16": lambda turn: table.push(asked[turn % 8], halves, updates=1, now=1.0),
        "find": lambda turn: table._rows.memory.find(asked[turn % 8]),
    }


def _local_calls(rows: int, ids: int, gradients: NDArray[np.float32]) -> dict[str, Call]:
    import numpy as np
    import torch

    from embeddings import RowWiseAdagrad, TableConfig
    from embeddings.local.local_rows import Bags, LocalRows, whole_table

    config = TableConfig(name="local", num_rows=rows, dim=DIM, optimizer=RowWiseAdagrad(learning_rate=0.01))
    local, random = LocalRows([whole_table(config)]), np.random.default_rng(1)
    segments = np.array([[0, 0, ids, 0, DIM]])
    bags = [
        Bags(
            ids=torch.from_numpy(np.sort(random.choice(rows, ids, replace=False))),
            offsets=torch.arange(ids + 1),
            weights=None,
            segments=segments,
        )
        for _ in range(8)
    ]
    out, given = torch.empty(ids * DIM), torch.from_numpy(gradients).reshape(-1)
    return {
        "local_look_up": lambda turn: local.look_up(bags[turn % 8], out),
        "local_update": lambda turn: local.update(bags[turn % 8], given),
    }


def _dict_calls(ids: NDArray[np.int64], asked: list[NDArray[np.int64]]) -> dict[str, Call]:
    slots = {id: slot for slot, id in enumerate(ids.tolist())}
    lists = [some.tolist() for some in asked]
    return {"dict": lambda turn: [slots[id] for id in lists[turn % 8]]}


def _take_turns(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn, (name, call) in _turns(calls, rounds + 2):
        start = time.process_time()
        call(turn)
        seconds[name].append(time.process_time() - start)
    return {name: statistics.median(its[2:]) for name, its in seconds.items()}  # without the first: they warm up


def _turns(calls: dict[str, Call], rounds: int) -> Iterator[tuple[int, tuple[str, Call]]]:
    for turn in range(rounds):
        for pair in calls.items():
            yield turn, pair


if __name__ == "__main__":
    main()
