"""A model goes on where another mode has left it: checkpoints of tables on shards are those of any other run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.batch import Batch
from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.checkpoints.run_state import load_model, take_model
from dlrm.model import DLRM
from dlrm.training.table_statistics import describe_rows
from embeddings import RowAdam, RowLamb, RowOptimizer, RowWiseAdagrad, TableConfig
from embeddings.rescaling import rescale_states
from embeddings.tables import UNBOUNDED
from parameter_server.client.remote_rows import PushPlace
from parameter_server.client.remote_storage import RemoteStorage
from parameter_server.client.remote_tables import RemoteTables
from parameter_server.client.rows_client import LaneLease, RowsClient
from parameter_server.control.routes_source import CoordinatorRoutes, FixedRoutes
from parameter_server.description import RunDescription
from parameter_server.errors import ConnectionLost, Refusal, RefusedError, ShardUnreachableError
from parameter_server.partition import Routes, spread_evenly
from parameter_server.processes.local_run import LocalRun
from parameter_server.shard.shard import Shard
from parameter_server.transports import LocalConnection
from parameter_server.wire import Header, Op, encode, join

SEED = 3
LANE = LaneLease(2, 1)


def describe_tables(optimizer: RowOptimizer) -> tuple[TableConfig, ...]:
    return (
        TableConfig(name="a", num_rows=50, dim=8, features=("f", "g"), optimizer=optimizer),
        TableConfig(name="b", num_rows=1000, dim=8, pooling="mean", optimizer=RowWiseAdagrad(learning_rate=0.2)),
    )


def draw_batches(count: int) -> list[Batch]:
    random = np.random.default_rng(0)
    batches = []
    for _ in range(count):
        lengths = random.integers(0, 4, (3, 16))
        ids = [random.integers(0, most, n) for most, n in zip((50, 50, 1000), lengths.sum(axis=1), strict=True)]
        sparse = KeyedJaggedTensor(
            keys=["f", "g", "b"],
            values=torch.from_numpy(np.concatenate(ids)),
            lengths=torch.from_numpy(lengths.reshape(-1)),
        )
        dense = torch.from_numpy(random.normal(size=(16, 2)).astype(np.float32))
        labels = torch.from_numpy(random.integers(0, 2, 16).astype(np.float32))
        batches.append(Batch(dense=dense, sparse=sparse, labels=labels, rows=torch.arange(16)))
    return batches


def make_model(tables: tuple[TableConfig, ...], remote: RemoteTables | None = None) -> DLRM:
    torch.manual_seed(1)
    return DLRM(num_numeric=2, tables=tables, dim=8, bottom=(8,), top=(8,), seed=SEED, built_tables=remote)


def train(model: DLRM, batches: list[Batch], first_clock: int = 1) -> None:
    optimizer = torch.optim.SGD(model.dense.parameters(), lr=0.1)
    for clock, batch in enumerate(batches, start=first_clock):
        if isinstance(model.tables, RemoteTables):
            model.tables.enter(batch.sparse, PushPlace(LANE, clock))
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(batch), batch.labels).backward()
        optimizer.step()


def save(model: DLRM, folder: Path) -> None:
    store = CheckpointStore(folder)
    store.save(take_model(model), samples=1)
    store.wait()


def load(model: DLRM, folder: Path) -> None:
    restored = CheckpointStore(folder).restore_latest()
    assert restored is not None
    load_model(model, restored.state)


@pytest.fixture
def start() -> Iterator[Callable[..., RemoteTables]]:
    """Starts a coordinator and shards within the process, and tables on them."""
    with ExitStack() as stack:

        def begin(tables: tuple[TableConfig, ...], shards: int = 2) -> RemoteTables:
            description = RunDescription(run_id=4, seed=SEED, tables=tables, staleness=0, durability="none")
            run = stack.enter_context(LocalRun(description, shards=shards))
            routes = CoordinatorRoutes(run.client)
            rows = stack.enter_context(closing(RowsClient(run.description, routes, run.connect)))
            storage = RemoteStorage(run.description, routes, run.connect, deadline_seconds=0.3)
            return RemoteTables(run.description, rows, storage=stack.enter_context(closing(storage)))

        yield begin


@pytest.mark.parametrize("optimizer", [RowAdam(learning_rate=0.05), RowLamb(learning_rate=0.05, partial=True)])
def test_ten_steps_here_and_ten_on_shards_are_twenty_steps(
    optimizer: RowOptimizer, tmp_path: Path, start: Callable[..., RemoteTables]
) -> None:
    tables, batches = describe_tables(optimizer), draw_batches(20)
    whole, first, last = (make_model(tables) for _ in range(3))
    train(whole, batches)

    train(first, batches[:10])
    save(first, tmp_path / "first")
    on_shards = make_model(tables, start(tables))
    load(on_shards, tmp_path / "first")
    train(on_shards, batches[10:])
    save(on_shards, tmp_path / "second")
    load(last, tmp_path / "second")

    for expected, found in zip(whole.tables.rows(), last.tables.rows(), strict=True):
        assert torch.equal(found.weight, expected.weight)
        for name, state in expected.state.items():
            assert torch.equal(found.state[name], state), name
    for expected_parameter, parameter in zip(whole.dense.parameters(), last.dense.parameters(), strict=True):
        assert torch.equal(parameter, expected_parameter)


def test_a_checkpoint_is_the_same_file_whoever_saved_it(tmp_path: Path, start: Callable[..., RemoteTables]) -> None:
    tables, batches = describe_tables(RowAdam(learning_rate=0.05)), draw_batches(5)
    here, there = make_model(tables), make_model(tables, start(tables))
    contents = []
    for name, model in (("here", here), ("there", there)):
        train(model, batches)
        save(model, tmp_path / name)
        (file,) = (tmp_path / name).glob("*/tables.safetensors")
        with safe_open(file, framework="pt") as tensors:
            contents.append({key: tensors.get_tensor(key) for key in tensors.keys()})  # noqa: SIM118 (no mapping)
    assert contents[0].keys() == contents[1].keys()
    assert all(torch.equal(tensor, contents[1][key]) for key, tensor in contents[0].items())
    assert contents[0]["a.updates"] == 5


def test_whole_tables_are_never_in_memory_and_each_row_is_read_once(
    tmp_path: Path, start: Callable[..., RemoteTables], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parameter_server.client.remote_storage.BLOCK_BYTES", 2000)
    monkeypatch.setattr("dlrm.checkpoints.pieces.BLOCK_BYTES", 2000)
    tables = describe_tables(RowAdam(learning_rate=0.05))
    model = make_model(tables, start(tables))
    longest = asked = 0
    read = RemoteStorage.read

    def watch(storage: RemoteStorage, table: int, ids: np.ndarray) -> np.ndarray:
        nonlocal longest, asked
        rows = read(storage, table, ids)
        longest, asked = max(longest, rows.nbytes), asked + len(ids)
        return rows

    monkeypatch.setattr(RemoteStorage, "read", watch)
    save(model, tmp_path)
    assert 0 < longest <= 2000
    assert asked == sum(config.num_rows for config in tables)


def test_statistics_are_those_of_tables_here(start: Callable[..., RemoteTables]) -> None:
    tables, batches = describe_tables(RowAdam(learning_rate=0.05)), draw_batches(5)
    here, there = make_model(tables), make_model(tables, start(tables))
    for model in (here, there):
        train(model, batches)
    for expected, found in zip(describe_rows([here.tables]), describe_rows([there.tables]), strict=True):
        assert found == expected | {"mean_row_norm": pytest.approx(expected["mean_row_norm"])}


def test_nothing_is_done_to_half_of_the_rows(tmp_path: Path, start: Callable[..., RemoteTables]) -> None:
    tables = describe_tables(RowAdam(learning_rate=0.05))
    model = make_model(tables, start(tables))
    with pytest.raises(ValueError, match="rescale_states: expected rows in this process"):
        rescale_states(model.tables, 16, 32)
    far = model.tables.far_tables()[1]
    broken = far.read(10, 12)
    broken["weight"][1, 3] = float("nan")
    far.write(10, broken)
    with pytest.raises(ValueError, match=r"finite values in tables/b\.weight, got nan in row 11"):
        save(model, tmp_path)
    assert not list(tmp_path.glob("samples-*"))


def test_what_cannot_be_saved_is_said(tmp_path: Path, start: Callable[..., RemoteTables]) -> None:
    unbounded = (TableConfig(name="a", num_rows=UNBOUNDED, dim=8, init_scale=0.1),)
    with pytest.raises(ValueError, match=r"table 'a': expected at most 4294967296 rows in a checkpoint of all rows"):
        save(make_model(unbounded, start(unbounded)), tmp_path)
    bounded = describe_tables(RowAdam(learning_rate=0.05))
    remote = start(bounded)
    remote._storage = None
    with pytest.raises(ValueError, match=r"expected storage=RemoteStorage"):
        save(make_model(bounded, remote), tmp_path)


def test_shards_that_are_gone_are_not_taken_for_a_full_disk(
    tmp_path: Path, start: Callable[..., RemoteTables], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = describe_tables(RowAdam(learning_rate=0.05))
    model = make_model(tables, start(tables))

    def refuse(*_: object) -> None:
        raise RefusedError(Refusal.UNAVAILABLE, "shard 1 is restarting")

    monkeypatch.setattr(RemoteStorage, "_ask_owners", refuse)
    with pytest.raises(ValueError, match=r"was not written: table 'a': rows: .*shard 1 is restarting") as caught:
        save(model, tmp_path)
    assert "bytes of room" not in str(caught.value)
    with pytest.raises(ShardUnreachableError, match="shard 1 is restarting"):
        model.tables.far_tables()[0].read(0, 1)


@pytest.mark.parametrize(
    ("changes", "ids", "columns", "message"),
    [
        ({"op": Op.PULL}, [1], None, "expected RECORDS frames"),
        ({"run_id": 5}, [1], None, "expected run 4, got 5"),
        ({"table": 2}, [1], None, "expected a table below 2, got 2"),
        ({"dim": 8}, [1], None, "expected rows of 24 numbers, got 8"),
        ({"dim": 24}, [50], None, r"expected ids in \[0, 50\), got 50"),
        ({"dim": 24}, [-1, 3], None, r"expected ids in \[0, 50\), got -1"),
        ({"dim": 24}, [3, 3], None, "expected ids that ascend"),
        ({"codec": 2}, None, None, "expected a known request"),
        ({}, [1], 8, "expected rows of 24 numbers, got 8"),
        ({}, None, 24, "expected float32 rows with their ids"),
    ],
)
def test_shards_say_what_is_wrong_with_a_request_for_rows(
    changes: dict[str, int], ids: list[int] | None, columns: int | None, message: str
) -> None:
    tables = describe_tables(RowAdam(learning_rate=0.05))
    with closing(Shard(RunDescription(run_id=4, seed=SEED, tables=tables, durability="none"), 0)) as shard:
        shard.set_routes(Routes(epoch=1, owners=spread_evenly([0]), addresses={0: "local:0"}))
        header = Header(op=Op.RECORDS, run_id=4)._replace(**changes)
        values = None if columns is None else np.ones((1, columns), np.float32)
        frame = encode(header, None if ids is None else np.array(ids), values)
        with pytest.raises(RefusedError, match=message) as caught:
            shard.store(join([frame]))
        assert caught.value.refusal is Refusal.INVALID_ARGUMENT
        assert shard.num_rows == [0, 0]


class TroubledConnection(LocalConnection):
    """Answers with trouble first."""

    def __init__(self, shard: Shard, troubles: list[Exception | None]) -> None:
        super().__init__(shard)
        self.troubles = troubles

    def store(self, message: bytes) -> Future[bytes]:
        whole = super().store(message)
        if not self.troubles:
            return whole
        answer: Future[bytes] = Future()
        if error := self.troubles.pop():
            answer.set_exception(error)
        else:
            answer.set_result(whole.result(timeout=10)[:-1])  # damaged on its way
        return answer


def test_rows_are_asked_for_again_whatever_the_coordinator_does() -> None:
    tables = describe_tables(RowAdam(learning_rate=0.05))
    routes = Routes(epoch=1, owners=spread_evenly([0]), addresses={0: "local:0"})
    came_back = threading.Event()

    class AwayRoutes(FixedRoutes):
        def newer_than(self, epoch: int) -> Routes:
            came_back.wait(10)
            raise ConnectionLost("coordinator: away")

    troubles: list[Exception | None] = [
        RefusedError(Refusal.FAILED_PRECONDITION, "moved", moved=True),
        None,
        RefusedError(Refusal.DATA_LOSS, "the disk is full"),
        ConnectionLost("reset"),
    ]
    description = RunDescription(run_id=4, seed=SEED, tables=tables, durability="none")
    with closing(Shard(description, 0)) as shard, ExitStack() as stack:
        shard.set_routes(routes)
        storage = RemoteStorage(description, AwayRoutes(routes), lambda _: TroubledConnection(shard, troubles))
        stack.enter_context(closing(storage))
        stack.callback(came_back.set)
        rows = np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32)
        storage.write(0, np.arange(3), rows)
        assert not troubles
        np.testing.assert_array_equal(storage.read(0, np.arange(3)), rows)
        troubles.append(RefusedError(Refusal.INVALID_ARGUMENT, "wrong for good"))
        with pytest.raises(RefusedError, match="wrong for good"):
            storage.read(0, np.arange(3))
        assert not came_back.is_set()


def test_what_is_loaded_into_shards_outlives_them(tmp_path: Path) -> None:
    tables = describe_tables(RowAdam(learning_rate=0.05))
    description = RunDescription(run_id=4, seed=SEED, tables=tables, staleness=0, durability="journal")
    found = []
    for start in range(2):
        with ExitStack() as stack:
            run = stack.enter_context(LocalRun(description, shards=2, folder=tmp_path))
            storage = RemoteStorage(run.description, CoordinatorRoutes(run.client), run.connect)
            (table, _) = stack.enter_context(closing(storage)).tables()
            if not start:
                states = {"first_moment": torch.randn(50, 8), "second_moment": torch.rand(50, 8)}
                table.write(0, {"weight": torch.randn(50, 8), **states})
                table.write_counters({"updates": torch.tensor(7.0)})
            found.append(table.read(0, 50) | table.read_counters())
    assert found[0]["updates"] == 7
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
