"""Frames say exactly what was sent; anything else is refused before it is used, in bounded memory, with the reason."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import psutil
import pytest

from embeddings.row_optimizers import RowSGD
from embeddings.tables import TableConfig
from parameter_server import wire
from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError
from parameter_server.partition import Routes
from parameter_server.shard.shard import Shard
from parameter_server.wire import Flag, Header, Op, Type, decode, encode, frame_bytes, join

DIM, ROWS = 5, 100
RUN = 77


def push_message(seq: int = 1, dtype: str = "f4") -> bytes:
    ids = np.arange(seq, seq + 7)
    head = Header(op=Op.PUSH, run_id=RUN, lane=2, lease=1, seq=seq, clock=seq)
    second = head._replace(table=1, seq=seq + 1)
    values = np.arange(35, dtype=dtype).reshape(7, DIM)
    return join([encode(head, ids, values), encode(second, ids[:2], values[:2], np.array([1, 2], np.uint32))])


@pytest.mark.parametrize("dtype", ["f4", "f2"])
@pytest.mark.parametrize("n", [0, 1, 2, 33])
@pytest.mark.parametrize("dim", [1, 3, 8])
def test_what_is_encoded_is_decoded(n, dim, dtype) -> None:
    ids = np.arange(n) - 2**62
    values = np.random.default_rng(0).standard_normal((n, dim)).astype(dtype)
    head = Header(
        op=Op.PUSH, run_id=2**64 - 1, lane=1, lease=2, seq=3, table=4, route_epoch=5, clock=6, version=7, factor=0.5
    )
    pull = Header(op=Op.PULL, dim=dim, type=Type.FP16)
    counts = np.arange(n, dtype=np.uint32) + 2**31
    counted = encode(head, ids, values, counts)
    message = join([encode(head, ids, values), encode(pull, ids), encode(head._replace(flags=Flag.REPLY)), counted])
    first, second, third, last = decode(message)
    assert first.header == head._replace(flags=Flag.IDS | Flag.VALUES, n=n, dim=dim, type=first.header.type)
    np.testing.assert_array_equal(first.ids, ids)
    np.testing.assert_array_equal(first.values, values)
    assert first.values.dtype == dtype
    assert not first.counts.size
    np.testing.assert_array_equal(last.values, values)
    np.testing.assert_array_equal(last.counts, counts)
    assert not n or last.header.flags == first.header.flags | Flag.COUNTS
    assert second.header == pull._replace(flags=Flag.IDS, n=n)
    np.testing.assert_array_equal(second.ids, ids)
    assert third.header == head._replace(flags=Flag.REPLY)
    kind = Type.FP32 if dtype == "f4" else Type.FP16
    holding = ((1, 1, 0), (1, 0, 0), (0, 0, 0), (1, 1, 1))
    lengths = [frame_bytes(n, dim, kind, has_ids=i, has_values=v, has_counts=c) for i, v, c in holding]
    assert len(message) == sum(lengths)


def test_decoded_numbers_are_views_that_cannot_be_written_to() -> None:
    frame = decode(push_message())[0]
    with pytest.raises(ValueError, match="read-only"):
        frame.values[0] = 0
    assert frame.ids.flags.aligned
    assert frame.values.flags.aligned


def patched(at: int, new: bytes) -> bytes:
    message = push_message()
    return message[:at] + new + message[at + len(new) :]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "expected 96 to .* bytes, got 0"),
        (bytes(95), "expected 96 to .* bytes, got 95"),
        (bytes(wire.MAX_MESSAGE_BYTES + 1), "expected 96 to .* bytes, got"),
        (bytes(96), "expected the mark 0x46524350 at byte 0, got 0x0"),
        (push_message()[:-1], "expected .* bytes of a frame of 2 x 5, got"),
        (push_message() + b"\0" * 16, "expected a header of 96 bytes at byte"),
        (patched(4, b"\2"), "expected version 1 of frames, got 2; run one release of recforge everywhere"),
        (patched(6, b"\x63"), "expected a known op, flags and type, got 99"),
        (patched(7, b"\xff"), "expected a known op, flags and type"),
        (patched(20, b"\x63"), "damaged on the way"),
        (patched(96, b"\x63"), "damaged on the way"),
        (patched(96 + 56, b"\x63"), "damaged on the way"),  # padding
        (join([encode(Header(op=1, n=5))]), "expected ids or values in a frame of 5 rows, got none"),
        (join([encode(Header(op=1))] * 4097), "expected at most 4096 frames in a message, got more"),
    ],
)
def test_refusals_say_what_was_wrong(message, reason) -> None:
    with pytest.raises(RefusedError, match=reason) as refused:
        decode(message)
    assert refused.value.refusal is Refusal.INVALID_ARGUMENT


def test_a_length_is_checked_before_memory_is_taken() -> None:
    head = Header(op=Op.PUSH, flags=Flag.IDS | Flag.VALUES, n=2**32 - 1, dim=2**16 - 1)
    tracemalloc.start()
    with pytest.raises(RefusedError, match="expected 1125917086449776 bytes"):
        decode(wire._pack(head) + bytes(8))
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def make_shard() -> Shard:
    sgd = RowSGD(learning_rate=1.0)
    tables = tuple(TableConfig(name=name, num_rows=ROWS, dim=DIM, optimizer=sgd, init_scale=0.0) for name in ("a", "b"))
    shard = Shard(RunDescription(run_id=RUN, seed=0, tables=tables, durability="none"), 0)
    shard.set_routes(Routes(epoch=1, owners=np.zeros(4096, np.int32), addresses={0: "local:0"}))
    return shard


def mutate(message: bytes, source: random.Random, *, is_sealed: bool) -> bytes:
    """Changes some bytes, cuts, repeats or swaps pieces; a sealed one has its checksums made right again."""
    changed = bytearray(message)
    kind = source.random()
    if kind < 0.7:
        for _ in range(source.choice([1, 1, 1, 2, 5])):
            at = source.randrange(wire.HEADER_BYTES) if source.random() < 0.7 else source.randrange(len(changed))
            changed[at] = source.choice([0, 1, 127, 128, 255, changed[at] ^ (1 << source.randrange(8))])
    elif kind < 0.8:
        del changed[source.randrange(len(changed)) :]
    elif kind < 0.9:
        first, last = sorted(source.randrange(len(changed)) for _ in range(2))
        changed[first:first] = changed[first:last]
    else:
        first, last = sorted(source.randrange(len(changed)) for _ in range(2))
        del changed[first:last]
    return seal(bytes(changed)) if is_sealed else bytes(changed)


def seal(message: bytes) -> bytes:
    """Makes the first frame's checksum right, as far as its header tells how long it is."""
    if len(message) < wire.HEADER_BYTES:
        return message
    head = Header(*wire._LAYOUT.unpack_from(message)[2:-1])
    if head.type not in wire._TYPES:
        return message
    end = min(len(message), wire.length_of(head))
    digest = wire.xxhash.xxh3_64(message[: wire._CHECKSUM_AT] + message[wire.HEADER_BYTES : end]).intdigest()
    return message[: wire._CHECKSUM_AT] + digest.to_bytes(8, "little") + message[wire.HEADER_BYTES :]


def state_of(shard: Shard) -> tuple:
    """All that a push could change."""
    rows = [table.take() for table in shard._state.tables]
    return (
        shard.versions,
        [(records.ids.tolist(), records.rows.tobytes()) for records in rows],
        shard._state.orders.to_array().tolist(),
        {lane: marks.tobytes() for lane, marks in shard._state.marks.lanes.items()},
    )


def fuzz(count: int) -> tuple[int, int]:
    """Feeds mutated frames to the decoder and to a shard, and checks that what is refused changes nothing and says why.

    Returns:
        How many were refused, and how many applied.
    """
    source, shard = random.Random(0), make_shard()
    shard.push(push_message(1))
    seeds = [push_message(3), push_message(3, "f2"), push_message(1)]
    pull = join([encode(Header(op=Op.PULL, run_id=RUN, dim=DIM), np.arange(9))])
    before, refused, applied = state_of(shard), 0, 0
    memory = psutil.Process().memory_info().rss
    for number in range(count):
        message = mutate(source.choice(seeds), source, is_sealed=number % 2 == 0)
        try:
            decode(message)
        except RefusedError as error:
            assert error.refusal is Refusal.INVALID_ARGUMENT  # noqa: PT017
            assert str(error).startswith("frame: expected ")  # noqa: PT017
        try:
            shard.push(message)
            applied += 1
        except RefusedError as error:
            assert len(str(error)) > 20  # noqa: PT017
            refused += 1
            if number % 50 == 0:
                assert state_of(shard) == before
        else:  # a changed lease or clock makes the shard refuse all unchanged ones, and with it the rest too soon
            shard.close()
            shard = make_shard()
            shard.push(push_message(1))
            before = state_of(shard)
        if number % 4 == 0:
            try:
                shard.pull(mutate(pull, source, is_sealed=True))
            except RefusedError as error:
                assert "expected " in str(error)  # noqa: PT017
    assert state_of(shard) == before
    assert psutil.Process().memory_info().rss < memory + (64 << 20)
    shard.close()
    return refused, applied


@pytest.mark.parametrize(
    "count", [30_000, pytest.param(1_000_000, marks=[pytest.mark.long, pytest.mark.timeout(3000)])]
)
def test_mutated_frames_are_refused_and_change_nothing(count) -> None:
    refused, applied = fuzz(count)
    assert refused > count * 0.5
    assert applied > count * 0.1  # some changes are to what may be anything, and must not be all that is tried
