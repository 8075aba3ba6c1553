"""What tables on shards ask of a client, and when: each row once, ahead if staleness allows, never without a place."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings import RowCowClip, RowOptimizer, RowWiseAdagrad, TableConfig
from embeddings.build import build_sequence_tables, build_tables
from embeddings.local.local_rows import Bags, LocalRows, whole_table
from embeddings.tables import UNBOUNDED, IdOutOfRangeError
from parameter_server.client.remote_rows import PushPlace
from parameter_server.client.remote_tables import RemoteSequenceTables, RemoteTables
from parameter_server.client.rows_client import LaneLease, Pulled, Push
from parameter_server.description import RunDescription
from parameter_server.errors import ShardUnreachableError

SEED = 5
LANE = LaneLease(0, 1)
FEATURES = ("a", "a2", "b", "c")
ROW_WISE = RowWiseAdagrad(learning_rate=0.1)


def describe(optimizer: RowOptimizer = ROW_WISE, *, staleness: int | None = 0, num_rows: int = 40) -> RunDescription:
    tables = (
        TableConfig(name="a", num_rows=num_rows, dim=16, features=("a", "a2"), optimizer=optimizer, init_scale=0.1),
        TableConfig(name="b", num_rows=6, dim=5, pooling="mean", optimizer=optimizer),
        TableConfig(name="c", num_rows=3000, dim=16, pooling="mean", optimizer=optimizer),
    )
    return RunDescription(run_id=9, seed=SEED, tables=tables, staleness=staleness, durability="none")


def draw_batch(random: np.random.Generator) -> KeyedJaggedTensor:
    """Draws bags of 0 to 3 ids; those of the last table are far between, so that each step brings new ones."""
    lengths = random.integers(0, 4, (len(FEATURES), 12))
    counts = lengths.sum(axis=1)
    ids = [random.integers(0, most, n) for most, n in zip((40, 40, 6, 3000), counts, strict=True)]
    return KeyedJaggedTensor(
        keys=list(FEATURES),
        values=torch.from_numpy(np.concatenate(ids)),
        lengths=torch.from_numpy(lengths.reshape(-1)),
    )


class LocalClient:
    """A client of rows in this process, which answers when it is told to; it counts what it is asked."""

    def __init__(self, description: RunDescription) -> None:
        self.tables = description.tables
        self.rows = LocalRows([whole_table(config) for config in description.tables], seed=description.seed)
        self.pulled: list[dict[int, np.ndarray[Any, Any]]] = []
        self.pushed: list[tuple[LaneLease, int, Sequence[Push]]] = []
        self.is_held = False
        self.held: list[Future[None]] = []
        self.refusal: Exception | None = None

    def pull(self, wanted: Sequence[tuple[int, np.ndarray[Any, Any]]]) -> Future[list[Pulled]]:
        self.pulled.append(dict(wanted))
        weights = [rows.weight.numpy() for rows in self.rows.rows()]
        answer: Future[list[Pulled]] = Future()
        answer.set_result([Pulled(weights[table][ids], {0: len(self.pushed)}) for table, ids in wanted])
        return answer

    def push(self, lane: LaneLease, clock: int, given: Sequence[Push]) -> Future[None]:
        self.pushed.append((lane, clock, given))
        self._apply(given)
        answer: Future[None] = Future()
        if self.refusal is not None:
            answer.set_exception(self.refusal)
        elif self.is_held:
            self.held.append(answer)
        else:
            answer.set_result(None)
        return answer

    def _apply(self, given: Sequence[Push]) -> None:
        sizes = [push.gradients.size for push in given]
        segments, cell = [], 0
        for push, start in zip(given, np.cumsum([0, *sizes]).tolist(), strict=False):
            segments.append((push.table, cell, push.ids.size, start, push.gradients.shape[1]))
            cell += push.ids.size
        ids, offsets = np.concatenate([push.ids for push in given]), torch.arange(cell + 1)
        bags = Bags(ids=torch.from_numpy(ids), offsets=offsets, weights=None, segments=np.array(segments))
        gradients = np.concatenate([push.gradients.reshape(-1) for push in given])
        self.rows.update(bags, torch.from_numpy(gradients))


@pytest.fixture
def client() -> LocalClient:
    return LocalClient(describe())


def test_unpooled_tables_equal_those_in_this_process(client: LocalClient) -> None:
    remote = RemoteSequenceTables(describe(), client)  # type: ignore[arg-type]
    local = build_sequence_tables(describe().tables, seed=SEED)
    random = np.random.default_rng(0)
    for step in range(5):
        batch = draw_batch(random)
        remote.enter(batch, PushPlace(LANE, step + 1))
        here, there = local(batch), remote(batch)
        for name in FEATURES:
            assert torch.equal(here[name].values(), there[name].values())
            assert torch.equal(here[name].lengths(), there[name].lengths())
        for found in (here, there):
            sum((found[name].values() ** 2).sum() for name in FEATURES).backward()
    for expected, rows in zip(local.rows(), client.rows.rows(), strict=True):
        assert torch.equal(rows.weight, expected.weight)


def test_ids_that_come_again_travel_once(client: LocalClient) -> None:
    tables = RemoteTables(describe(), client)  # type: ignore[arg-type]
    batch = KeyedJaggedTensor(
        keys=list(FEATURES),
        values=torch.tensor([7, 3, 7, 3, 7, 5, 0]),
        lengths=torch.tensor([2, 1, 2, 0, 0, 0, 1, 1]),
    )
    tables.enter(batch, PushPlace(LANE, 1))
    tables(batch).values().sum().backward()
    (pulled,) = client.pulled
    assert {table: ids.tolist() for table, ids in pulled.items()} == {0: [3, 7], 2: [0, 5]}
    ((lane, clock, given),) = client.pushed
    assert (lane, clock) == (LANE, 1)
    assert {push.table: push.ids.tolist() for push in given} == {0: [3, 7], 2: [0, 5]}
    assert given[0].gradients[:, 0].tolist() == [2.0, 3.0]


def test_ids_outside_their_tables_are_named_as_elsewhere(client: LocalClient) -> None:
    local, remote = build_tables(describe().tables), RemoteTables(describe(), client)  # type: ignore[arg-type]
    batch = draw_batch(np.random.default_rng(0))
    batch.values()[5] = 4000
    remote.enter(batch, PushPlace(LANE, 1))
    messages = []
    for tables in (local, remote):
        tables.prefetch(batch)
        with pytest.raises(IdOutOfRangeError) as caught:
            tables(batch)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert not client.pulled


def test_ids_of_unbounded_tables_may_be_any() -> None:
    run = describe(staleness=0, num_rows=UNBOUNDED)
    tables = RemoteTables(run, RecordingClient(run))  # type: ignore[arg-type]
    batch = KeyedJaggedTensor(
        keys=list(FEATURES), values=torch.tensor([-1, 2**63 - 1, -(2**63)]), lengths=torch.tensor([2, 1, 0, 0])
    )
    with pytest.raises(LookupError):
        tables.eval()(batch)


class RecordingClient(LocalClient):
    """Answers nothing."""

    def __init__(self, description: RunDescription) -> None:
        super().__init__(replace(description, tables=description.tables[1:]))

    def pull(self, wanted: Sequence[tuple[int, np.ndarray[Any, Any]]]) -> Future[list[Pulled]]:
        assert [ids.tolist() for _, ids in wanted] == [[-(2**63), -1, 2**63 - 1]]
        raise LookupError


def test_what_has_no_place_is_not_trained(client: LocalClient) -> None:
    tables = RemoteTables(describe(), client)  # type: ignore[arg-type]
    batch = draw_batch(np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"expected enter\(features, place\)"):
        tables(batch)
    tables.enter(batch, PushPlace(LANE, 1))
    pooled = tables(batch).values().sum()
    with pytest.raises(ValueError, match=r"expected enter\(features, place\)"):
        tables(batch)
    pooled.backward(retain_graph=True)
    with pytest.raises(ValueError, match="expected one backward per look-up"):
        pooled.backward()
    assert [clock for _, clock, _ in client.pushed] == [1]


@pytest.mark.parametrize(
    ("optimizer", "counts"), [(RowCowClip(learning_rate=0.1, l2_mode="lazy"), ([2, 4], [1, 1])), (ROW_WISE, ([], []))]
)
def test_optimizers_that_count_ids_are_told_how_often_each_occurred(
    client: LocalClient, optimizer: RowOptimizer, counts: tuple[list[int], list[int]]
) -> None:
    tables = RemoteTables(describe(optimizer), client)  # type: ignore[arg-type]
    batch = KeyedJaggedTensor(
        keys=list(FEATURES),
        values=torch.tensor([7, 3, 7, 3, 7, 7, 5, 0]),
        lengths=torch.tensor([3, 0, 2, 1, 0, 0, 1, 1]),
    )
    tables.enter(batch, PushPlace(LANE, 1))
    tables(batch).values().sum().backward()
    ((_, _, given),) = client.pushed
    assert [push.ids.tolist() for push in given] == [[3, 7], [0, 5]]
    assert tuple(push.counts.tolist() for push in given) == counts


def test_tables_that_shards_could_not_hold_are_refused_before_anybody_hears_of_them() -> None:
    with pytest.raises(ValueError, match=r"table 'a': expected an optimizer .* RowCowClip\(l2_mode='lazy'\)"):
        describe(RowCowClip(learning_rate=0.1))


@pytest.fixture
def train(client: LocalClient) -> Callable[..., list[tuple[int, int]]]:
    """Trains three batches, each prefetched before the backward of the one before it, as the loop does.

    Returns:
        How many pulls had begun and how many pushes had been sent as each backward began.
    """

    def run(tables: RemoteTables, steps: int = 3) -> list[tuple[int, int]]:
        random = np.random.default_rng(0)
        batches = [draw_batch(random) for _ in range(steps)]
        for clock, batch in enumerate(batches, start=1):
            tables.enter(batch, PushPlace(LANE, clock))
        seen = []
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            pooled = tables(batch).values().sum()
            if following is not None:
                tables.prefetch(following)
            seen.append((len(client.pulled), len(client.pushed)))
            pooled.backward()
        return seen

    return run


def test_free_running_rows_of_the_next_batch_come_while_gradients_are_computed(
    client: LocalClient, train: Callable[..., list[tuple[int, int]]]
) -> None:
    client.is_held = True  # no push is ever acknowledged
    tables = RemoteTables(describe(staleness=None), client)  # type: ignore[arg-type]
    assert train(tables) == [(2, 0), (3, 1), (3, 2)]
    assert not tables.last_push.done()


def test_in_lock_step_each_pull_waits_for_the_push_before_it(
    client: LocalClient, train: Callable[..., list[tuple[int, int]]]
) -> None:
    passed: list[tuple[int, int]] = []
    tables = RemoteTables(
        describe(staleness=0),
        client,  # type: ignore[arg-type]
        gate=lambda: passed.append((len(client.pulled), len(client.pushed))),
    )
    assert train(tables) == [(1, 0), (2, 1), (3, 2)]
    assert passed == [(0, 0), (1, 1), (2, 2)]  # through the gate before each pull


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_as_many_pushes_as_staleness_allows_may_be_under_way(
    client: LocalClient, train: Callable[..., list[tuple[int, int]]], staleness: int
) -> None:
    client.is_held = True
    tables = RemoteTables(describe(staleness=staleness), client)  # type: ignore[arg-type]
    thread = threading.Thread(target=train, args=(tables, 7), daemon=True)
    thread.start()
    for acknowledged in range(4):
        expected = acknowledged + max(1, staleness)
        end = time.monotonic() + 10
        while len(client.held) < expected and time.monotonic() < end:
            time.sleep(0.001)
        thread.join(0.03)
        assert len(client.pushed) == expected
        # The newest pull has seen all pushes but those that it may be behind.
        assert len(client.pulled) <= acknowledged + staleness + 1
        client.held[acknowledged].set_result(None)
    for at in range(4, 7):
        end = time.monotonic() + 10
        while len(client.held) <= at and time.monotonic() < end:
            time.sleep(0.001)
        client.held[at].set_result(None)
    thread.join(10)
    assert not thread.is_alive()


def test_a_push_that_has_failed_ends_training_until_it_is_forgotten(client: LocalClient) -> None:
    tables = RemoteTables(describe(staleness=None), client)  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    lost = ShardUnreachableError("shard 1 at local:1: no answer for 5 s")
    first, second, third = (draw_batch(random) for _ in range(3))
    tables.enter(first, PushPlace(LANE, 1))
    tables.enter(second, PushPlace(LANE, 2))
    pooled = [tables(batch).values().sum() for batch in (first, second)]
    client.refusal = lost
    pooled[0].backward()
    with pytest.raises(ShardUnreachableError, match="no answer for 5 s"):
        pooled[1].backward()
    with pytest.raises(ShardUnreachableError):
        tables.drain()
    tables.enter(third, PushPlace(LANE, 3))
    with pytest.raises(ShardUnreachableError):
        tables(third)
    assert [clock for _, clock, _ in client.pushed] == [1]  # no later one of a lane with a gap
    client.refusal = None
    tables.forget()
    tables.enter(first, PushPlace(LaneLease(0, 2), 1))
    tables(first).values().sum().backward()
    tables.close()
    assert [clock for _, clock, _ in client.pushed] == [1, 1]
