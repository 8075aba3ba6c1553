"""Pieces of the dense part move as their formulas, written down again here in float64; each exchange counts once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from embeddings import RowSGD, TableConfig
from parameter_server.dense_codec import MAX_FRAME_PIECES, PIECE, PIECE_SALT, Combine, cut_pieces
from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError
from parameter_server.partition import buckets_of
from parameter_server.shard.dense_pieces import DensePieces
from parameter_server.shard.dense_update import OPTIONS, ServerUpdate
from parameter_server.wire import Frame, Header, Op, decode, encode, join

NUMBERS = 2 * PIECE + 100  # the third piece is filled up
IDS = np.arange(3, dtype=np.int64)
ALL = np.ones(4096, bool)
LANES, OWN = 4, 4  # lanes of the data, and the first of the trainers' own
Vector = Any


def describe(mode: str, **options: object) -> RunDescription:
    table = TableConfig(name="a", num_rows=10, dim=4, optimizer=RowSGD(learning_rate=1.0))
    settings = {OPTIONS: options} if options else {}
    written = RunDescription(run_id=7, seed=0, tables=(table,), lanes=LANES, dense=mode, settings=settings)
    return RunDescription.from_json(written.to_json())


def frame_of(combine: int, values: Vector = None, ids: Vector = IDS, *, lane: int = OWN, **head: Any) -> Frame:
    header = Header(**{"op": Op.DENSE, "codec": combine, "lane": lane, "lease": 1, "version": NUMBERS} | head)
    if values is not None and values.ndim == 1:
        values = cut_pieces(values)[ids]
    return decode(join([encode(header, np.asarray(ids, np.int64), values)]))[0]


def vector(generator: np.random.Generator) -> Vector:
    return generator.normal(size=NUMBERS).astype(np.float32)


def begun(mode: str, start: Vector, **options: object) -> DensePieces:
    pieces = DensePieces(describe(mode, **options))
    pieces.apply(frame_of(Combine.SET_IF_ABSENT, start))
    return pieces


def flat(pieces: Vector) -> Vector:
    return pieces.reshape(-1)[:NUMBERS]


def master_of(pieces: DensePieces) -> Vector:
    return flat(pieces.apply(frame_of(Combine.READ)))


def same(one: DensePieces, other: DensePieces) -> bool:
    taken, its = one.take(ALL), other.take(ALL)
    return taken.keys() == its.keys() and all(np.array_equal(taken[name], its[name]) for name in taken)


# What a rule does to the master in float64, given x of a trainer: a generator that is sent x and gives (m, answer).
Rule = Callable[[Vector], Iterator[Any]]


def elastic(m: Vector) -> Iterator[Any]:
    x = yield
    while True:
        d = 0.3 * (x - m)
        m = m + d
        x = yield m, d


def blocks(m: Vector) -> Iterator[Any]:
    v, x = 0.0, (yield)
    while True:
        v = 0.6 * v + 0.25 * x
        m = m + v
        x = yield m, m


def follow(m: Vector) -> Iterator[Any]:
    x = yield
    while True:
        m = 0.7 * m + 0.3 * x
        x = yield m, m


def sgd(m: Vector) -> Iterator[Any]:
    v, g = 0.0, (yield)
    while True:
        v = 0.9 * v + g
        m = m - 0.02 * v
        g = yield m, m


def adagrad(m: Vector) -> Iterator[Any]:
    total, g = 0.0, (yield)
    while True:
        total = total + g * g
        m = m - 0.02 * g / (np.sqrt(total) + 1e-3)
        g = yield m, m


def adam(m: Vector) -> Iterator[Any]:
    first, second, g = 0.0, 0.0, (yield)
    for t in itertools.count(1):
        first, second = 0.8 * first + 0.2 * g, 0.99 * second + 0.01 * g * g
        m = m - 0.02 * (first / (1 - 0.8**t)) / (np.sqrt(second / (1 - 0.99**t)) + 1e-3)
        g = yield m, m


RULES: list[Any] = [
    ("easgd", {}, Combine.EASGD, {"factor": 0.3}, elastic),
    ("easgd", {}, Combine.FOLLOW, {"factor": 0.3}, follow),
    ("average", {}, Combine.AVERAGE, {"factor": 0.25, "eps_factor": 0.6}, blocks),
    ("sgd", {"lr": 0.2, "momentum": 0.9}, Combine.GRADIENT, {"factor": 0.1}, sgd),
    ("adagrad", {"lr": 0.2, "eps": 1e-3}, Combine.GRADIENT, {"factor": 0.1}, adagrad),
    ("adam", {"lr": 0.2, "betas": (0.8, 0.99), "eps": 1e-3}, Combine.GRADIENT, {"factor": 0.1}, adam),
]
by_name = pytest.mark.parametrize(("mode", "options", "combine", "head", "rule"), RULES, ids=lambda v: str(v)[:12])


@by_name
def test_twenty_exchanges_of_three_trainers_are_as_in_float64(
    mode: str, options: Any, combine: Combine, head: Any, rule: Rule
) -> None:
    generator = np.random.default_rng(1)
    start = vector(generator)
    pieces, reference = begun(mode, start, **options), rule(start.astype(np.float64))
    next(reference)
    clocks = dict.fromkeys(range(OWN, OWN + 3), 0)
    for lane in generator.integers(OWN, OWN + 3, 20).tolist():
        clocks[lane] += 1
        given = vector(generator)
        answer = pieces.apply(frame_of(combine, given, lane=lane, clock=clocks[lane], **head))
        master, expected = reference.send(given.astype(np.float64))
        np.testing.assert_allclose(flat(answer), expected, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(master_of(pieces), master, rtol=2e-6, atol=2e-6)
        assert not answer.reshape(-1)[NUMBERS:].any()  # what fills the last piece up stays 0


@by_name
def test_a_retry_is_answered_as_before_and_changes_nothing(
    mode: str, options: Any, combine: Combine, head: Any, rule: Rule
) -> None:
    generator = np.random.default_rng(2)
    pieces = begun(mode, vector(generator), **options)
    frame = frame_of(combine, vector(generator), clock=1, **head)
    assert pieces.changes(frame)
    answer = pieces.apply(frame).copy()
    if combine == Combine.EASGD:  # its answer is its trainer's own, whatever others have done since
        pieces.apply(frame_of(combine, vector(generator), lane=OWN + 1, clock=1, **head))
    moved = DensePieces(describe(mode, **options))
    moved.put(pieces.take(ALL))
    for holder in (pieces, moved):
        before = holder.take(ALL)
        assert not holder.changes(frame)
        assert np.array_equal(holder.apply(frame), answer)
        assert np.array_equal(holder.last_answer(frame), answer)
        again = [frame_of(combine, frame.values[part], part, clock=1, **head) for part in ([0], [1, 2])]
        assert np.array_equal(np.concatenate([holder.apply(part) for part in again]), answer)
        assert all(np.array_equal(array, before[name]) for name, array in holder.take(ALL).items())
    assert same(pieces, moved)


@by_name
def test_pieces_that_move_go_on_as_if_they_had_not(
    mode: str, options: Any, combine: Combine, head: Any, rule: Rule
) -> None:
    generator = np.random.default_rng(3)
    start = vector(generator)
    stay, former = begun(mode, start, **options), begun(mode, start, **options)
    latter = DensePieces(describe(mode, **options))
    for clock in range(1, 7):
        frame = frame_of(combine, vector(generator), clock=clock, **head)
        expected = stay.apply(frame)
        if clock == 3:  # this one reaches one piece only before the move
            former.apply(frame_of(combine, frame.values[1:2], [1], clock=clock, **head))
            for number in (2, 0, 1):
                bucket = np.arange(4096) == bucket_of(number)
                latter.put(former.take(bucket))
                assert former.drop(bucket) == 1
            assert len(former) == 0
        holder = former if clock < 3 else latter
        assert np.array_equal(holder.apply(frame), expected)
    assert same(stay, latter)


def bucket_of(number: int) -> int:
    return int(buckets_of(np.array([number], np.int64), PIECE_SALT)[0])


def test_only_what_lies_in_the_buckets_is_taken_and_dropped() -> None:
    pieces = begun("easgd", vector(np.random.default_rng(0)))
    pieces.apply(frame_of(Combine.EASGD, vector(np.random.default_rng(1)), clock=1, factor=0.5))
    mine = np.zeros(4096, bool)
    mine[bucket_of(2)] = True
    taken = pieces.take(mine)
    assert taken["pieces"].tolist() == [2]
    assert taken["answered"].tolist() == [[2, OWN]]
    assert taken["marks"].tolist() == [[2, OWN, 1, 1]]
    pieces.drop(mine)
    assert pieces.take(mine)["pieces"].size == pieces.take(mine)["answers"].size == 0
    assert pieces.take(ALL)["pieces"].tolist() == [0, 1]


def test_the_first_trainer_brings_the_master_and_others_get_it() -> None:
    first, second = vector(np.random.default_rng(0)), vector(np.random.default_rng(1))
    pieces = DensePieces(describe("easgd"))
    assert np.array_equal(flat(pieces.apply(frame_of(Combine.SET_IF_ABSENT, first))), first)
    later = frame_of(Combine.SET_IF_ABSENT, second, lane=OWN + 1)
    assert not pieces.changes(later)
    assert np.array_equal(flat(pieces.apply(later)), first)
    assign = frame_of(Combine.ASSIGN, second, clock=1)
    assert np.array_equal(flat(pieces.apply(assign)), second)
    pieces.apply(frame_of(Combine.EASGD, first, clock=2, factor=0.5))
    with pytest.raises(RefusedError, match="exchange 2 or later"):  # a copy of it that was under way for long
        pieces.apply(assign)


def test_a_batch_that_is_computed_again_under_another_lease_is_taken_once() -> None:
    generator = np.random.default_rng(0)
    pieces = begun("sgd", vector(generator))
    first = vector(generator)
    pieces.apply(frame_of(Combine.GRADIENT, first, lane=1, clock=3))
    before = master_of(pieces)
    again = frame_of(Combine.GRADIENT, vector(generator), lane=1, lease=2, clock=3)
    earlier = frame_of(Combine.GRADIENT, vector(generator), lane=1, lease=2, clock=1)
    for frame in (again, earlier):
        assert not pieces.changes(frame)
        assert np.array_equal(flat(pieces.apply(frame)), before)
    pieces.apply(frame_of(Combine.GRADIENT, first, lane=1, lease=2, clock=4))
    assert np.allclose(master_of(pieces), before - first)


def test_a_new_lease_of_a_lane_counts_its_exchanges_from_one() -> None:
    generator = np.random.default_rng(0)
    pieces = begun("easgd", vector(generator))
    pieces.apply(frame_of(Combine.EASGD, vector(generator), clock=5, factor=0.5))
    fresh = frame_of(Combine.EASGD, vector(generator), lease=2, clock=1, factor=0.5)
    assert pieces.changes(fresh)
    pieces.apply(fresh)
    with pytest.raises(RefusedError, match="expected lease 2") as caught:
        pieces.apply(frame_of(Combine.EASGD, vector(generator), clock=6, factor=0.5))
    assert caught.value.refusal == Refusal.FAILED_PRECONDITION


def test_applying_the_frames_that_changed_something_again_gives_the_same_bits() -> None:
    generator = np.random.default_rng(5)
    pieces, replayed = DensePieces(describe("adam")), DensePieces(describe("adam"))
    journal = []
    for clock in range(60):
        lane = int(generator.integers(0, OWN + 3))
        combine = [Combine.SET_IF_ABSENT, Combine.READ, Combine.GRADIENT, Combine.FOLLOW][min(clock, clock % 4)]
        frame = frame_of(combine, None if combine == Combine.READ else vector(generator), lane=lane, clock=clock // 3)
        try:
            changes = pieces.changes(frame)
            pieces.apply(frame)
        except RefusedError:
            continue
        journal += [frame] if changes else []
    assert 10 < len(journal) < 50
    for frame in journal:
        replayed.apply(frame)
    assert same(pieces, replayed)


def test_answers_are_kept_for_as_many_trainers_as_take_part() -> None:
    generator = np.random.default_rng(0)
    pieces = begun("easgd", vector(generator))
    for lane in range(OWN, OWN + 5 * LANES):
        pieces.apply(frame_of(Combine.EASGD, vector(generator), lane=lane, clock=1, factor=0.1))
        pieces.apply(frame_of(Combine.EASGD, vector(generator), lane=OWN, clock=lane + 1, factor=0.1))
    kept = {lane for _, lane in pieces.take(ALL)["answered"].tolist()}
    assert kept == {OWN, *range(OWN + 5 * LANES - 3, OWN + 5 * LANES)}  # the one that is heard of stays
    pieces.forget(OWN)
    assert OWN not in pieces.take(ALL)["marks"][:, 1]


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "alpha of 1": ("expected alpha in", {"factor": 1.0}),
    "alpha above 1": ("expected alpha in", {"factor": 1.5}),
    "alpha of 0": ("expected alpha in", {"factor": 0.0}),
    "alpha not a number": ("expected alpha in", {"factor": float("nan")}),
    "no clock": ("counted from 1", {"clock": 0}),
    "another mode": ("of mode easgd, got AVERAGE", {"combine": Combine.AVERAGE}),
    "gradients": ("of mode easgd, got GRADIENT", {"combine": Combine.GRADIENT}),
    "unknown": ("expected a codec", {"combine": 99}),
    "not finite": ("finite numbers", {"values": np.full((3, PIECE), np.inf, np.float32)}),
    "half precision": ("float32 values", {"values": np.zeros((3, PIECE), np.float16)}),
    "short pieces": ("float32 values", {"values": np.zeros((3, 100), np.float32)}),
    "no values": ("float32 values", {"values": None}),
    "twice": ("ascending", {"ids": [0, 1, 1]}),
    "unsorted": ("ascending", {"ids": [2, 1, 0]}),
    "negative": ("ascending", {"ids": [-1, 0, 1]}),
    "far": ("ascending", {"ids": [0, 1, 1 << 40]}),
    "none": ("1 to 63 pieces", {"ids": [], "values": np.zeros((0, PIECE), np.float32)}),
    "many": ("1 to 63", {"ids": np.arange(MAX_FRAME_PIECES + 1), "combine": Combine.READ, "values": None}),
    "another model": ("a model of 32,868 numbers", {"combine": Combine.SET_IF_ABSENT, "version": NUMBERS - 1}),
    "shorter": ("the vector's length", {"combine": Combine.ASSIGN, "version": 2 * PIECE}),
    "absent": ("piece 5 to be set first", {"ids": [0, 1, 5]}),
    "a clock used otherwise": ("got it twice", {"clock": 9}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_whole(name: str) -> None:
    expected, changes = BAD[name]
    pieces = begun("easgd", vector(np.random.default_rng(0)))
    pieces.apply(frame_of(Combine.FOLLOW, vector(np.random.default_rng(1)), clock=9, factor=0.5))
    before = pieces.take(ALL)
    given = {
        "combine": Combine.EASGD,
        "values": np.ones((3, PIECE), np.float32),
        "ids": IDS,
        "clock": 10,
        "factor": 0.5,
    }
    frame = frame_of(**(given | changes))
    with pytest.raises(RefusedError, match=expected) as caught:
        pieces.apply(frame)
    assert caught.value.refusal == (Refusal.OUT_OF_RANGE if name == "absent" else Refusal.INVALID_ARGUMENT)
    pieces.changes(frame)  # whoever asks before applying gets an answer, not an error
    assert all(np.array_equal(array, before[key]) for key, array in pieces.take(ALL).items())


def test_servers_have_no_lamb_and_no_unknown_options() -> None:
    with pytest.raises(ValueError, match="got 'lamb': servers update number by number; lamb and others run on the"):
        ServerUpdate("lamb")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected options of sgd, got 'betas'"):
        ServerUpdate("sgd", {"betas": (0.9, 0.99)})
