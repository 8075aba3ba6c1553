"""Parts of a shard's state as named arrays: what snapshots are files of, and what travels when buckets move.

A part may hold, of each table t, ``<t>.ids`` [n] and ``<t>.records`` [n, record_width] of rows; ``<t>.evicted`` ids
of rows that are no more; ``dropped`` [n] buckets which were emptied before that; ``lanes`` [l], ``buckets`` [b] and
``marks`` [l, b]; ``clocks`` [n, 2] of lanes; ``base_updates`` of the tables; ``dense.*`` pieces. One that ends a
snapshot also has ``orders`` [n, 6], ``versions`` of the tables, ``claims`` [4096], and ``lost``. All are int64 but for
records and pieces. Parts are put in the order in which they were taken: rows come after what they replace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from embeddings.hashed.hashed_table import HashedTable, Records
from embeddings.kernels.hash_kernels import NUM_BUCKETS
from parameter_server.errors import Refusal, RefusedError
from parameter_server.partition import buckets_of
from parameter_server.shard.dense_parts import cut_pieces, keep_buckets
from parameter_server.shard.state import ShardState

Part = dict[str, NDArray[Any]]
Mask = NDArray[np.bool_]
_DENSE = "dense."
_DIGEST_BYTES = 8
_AS_LONG: list[tuple[str, ...]] = [("lanes", "marks")]


def row_bytes(table: HashedTable) -> int:
    """Says how many bytes the records of a table take."""
    return table.num_rows * (8 + 4 * table.record_width)


def take_rows(state: ShardState, table: int, since: int, buckets: Mask | None = None) -> Part:
    """Copies rows of a table that changed after a version."""
    records = state.tables[table].take(buckets=buckets, since=since)
    return {f"{table}.ids": records.ids, f"{table}.records": records.rows} if records.ids.size else {}


def take_evicted(state: ShardState, since: Sequence[int], buckets: Mask | None = None) -> Part:
    """Gives the ids of rows that were evicted after versions of the tables."""
    part: Part = {}
    for number, (table, version) in enumerate(zip(state.tables, since, strict=True)):
        ids = table.evicted(since=version)
        if buckets is not None:
            ids = ids[buckets[buckets_of(ids, state.salts[number])]]
        if ids.size:
            part[f"{number}.evicted"] = ids
    return part


def take_gone(state: ShardState, since: Sequence[int]) -> Part:
    """Gives what is no more since versions of the tables: evicted rows and, once, dropped buckets and removed rows."""
    part = take_evicted(state, since)
    for number, removed in enumerate(state.removed):
        if removed:
            part[f"{number}.evicted"] = np.concatenate([*removed, part.get(f"{number}.evicted", removed[0][:0])])
            removed.clear()
    if state.dropped.any():
        part["dropped"] = np.flatnonzero(state.dropped)
        state.dropped[:] = False
    return part


def take_marks(state: ShardState, lanes: Sequence[int], buckets: Mask | None = None) -> Part:
    """Copies marks of lanes."""
    wanted = np.arange(NUM_BUCKETS) if buckets is None else np.flatnonzero(buckets)
    if not (lanes and wanted.size):
        return {}
    marks = np.stack([state.marks.of(lane)[wanted] for lane in lanes])
    return {"lanes": np.array(lanes, np.int64), "buckets": wanted, "marks": marks}


def take_dense(state: ShardState, buckets: Mask) -> Part:
    """Copies the pieces of the dense part that lie in buckets."""
    taken = state.dense.take(buckets)
    return _name_dense(taken) if taken["pieces"].size else {}


def take_clocks(state: ShardState) -> Part:
    """Copies how far each lane has come, and what tables' numbers of updates count from."""
    clocks = [(lane, order.clock) for lane, order in state.orders.lanes.items()]
    return {
        "clocks": np.array(clocks, np.int64).reshape(-1, 2),
        "base_updates": np.array(state.base_updates, np.int64),
    }


def take_ending(state: ShardState) -> Part:
    """Copies what is kept once, as lanes' orders and all numbers; and marks that changed since the last time."""
    part = take_marks(state, sorted(state.marks.changed)) | take_dense(state, np.ones(NUM_BUCKETS, np.bool_))
    state.marks.changed.clear()
    return part | {
        "orders": state.orders.to_array(),
        "versions": np.array(state.versions, np.int64),
        "base_updates": np.array(state.base_updates, np.int64),
        "claims": state.claims.copy(),
        "lost": np.array([state.lost], np.int64),
    }


def put_part(state: ShardState, part: Part, buckets: Mask | None = None, *, restamp: bool = False) -> None:
    """Takes over a part that the same tables have given, here or elsewhere.

    Args:
        state: Changed.
        part: Checked by ``check_part`` if it comes from outside.
        buckets: [4096] of which rows, marks and pieces are taken; by default all.
        restamp: Give rows this shard's versions, which are to say when they changed here.
    """
    if "dropped" in part:
        gone = np.zeros(NUM_BUCKETS, np.bool_)
        gone[part["dropped"]] = True
        state.drop(gone if buckets is None else gone & buckets)
    for number in range(len(state.tables)):
        _put_rows(state, number, part, buckets, restamp)
    if "marks" in part:
        wanted = slice(None) if buckets is None else buckets[part["buckets"]]
        for lane, marks in zip(part["lanes"].tolist(), part["marks"], strict=True):
            state.marks.raise_to(lane, part["buckets"][wanted], marks[wanted])
    for lane, clock in part["clocks"].tolist() if "clocks" in part else ():
        state.orders.see_clock(lane, clock)
    if "base_updates" in part:  # who holds rows was told; this shard may not have been there then
        state.base_updates = part["base_updates"].tolist()
    if dense := {name[len(_DENSE) :]: array for name, array in part.items() if name.startswith(_DENSE)}:
        state.dense.put(dense if buckets is None else keep_buckets(dense, buckets))


def put_ending(state: ShardState, part: Part) -> None:
    """Takes over what ``take_ending`` gave of numbers; a shard's own, of the same number of shards."""
    state.orders.set_array(part["orders"])
    for table, version in zip(state.tables, part["versions"].tolist(), strict=True):
        table.version = version
    state.base_updates = part["base_updates"].tolist()
    state.claims[:] = part["claims"]
    state.lost = int(part["lost"][0])


def pack_part(part: Part) -> bytes:
    """Writes a part as bytes that travel: a digest and a safetensors file."""
    content: bytes = save(part)
    return xxhash.xxh3_64_digest(content) + content


def unpack_part(message: bytes) -> Part:
    """Reads what ``pack_part`` has written.

    Raises:
        RefusedError: It is damaged, or something else.
    """
    digest, content = message[:_DIGEST_BYTES], message[_DIGEST_BYTES:]
    if xxhash.xxh3_64_digest(content) != digest:
        raise RefusedError(Refusal.INVALID_ARGUMENT, "buckets: expected a chunk as it was sent, got a damaged one")
    try:
        part: Part = load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise RefusedError(Refusal.INVALID_ARGUMENT, f"buckets: expected a chunk of state, got {error}") from error
    return part


def check_part(state: ShardState, part: Part) -> None:
    """Checks a part from another shard, so that ``put_part`` takes all of it.

    Raises:
        RefusedError: It is of other tables, or no part of a shard.
    """
    no_pieces = state.dense.take(np.zeros(NUM_BUCKETS, np.bool_))
    shapes: dict[str, tuple[int, ...]] = {
        "clocks": (2,),
        "base_updates": (),
        "lanes": (),
        "buckets": (),
        "marks": (len(part.get("buckets", ())),),
    }
    shapes |= {_DENSE + name: array.shape[1:] for name, array in no_pieces.items()}
    for number, table in enumerate(state.tables):
        shapes |= {f"{number}.ids": (), f"{number}.evicted": (), f"{number}.records": (table.record_width,)}
    together = [("lanes", "buckets", "marks"), tuple(_DENSE + name for name in no_pieces)]
    together += [(f"{number}.ids", f"{number}.records") for number in range(len(state.tables))]
    is_right = all(name in shapes and array.ndim and array.shape[1:] == shapes[name] for name, array in part.items())
    is_right &= all(array.dtype == _type_of(name, no_pieces) for name, array in part.items())
    is_right &= all(sum(name in part for name in names) in (0, len(names)) for names in together)
    is_right &= all(len(part[a]) == len(part[b]) for a, b in _AS_LONG + together[2:] if a in part and b in part)
    is_right &= len(part.get("base_updates", state.base_updates)) == len(state.tables)
    buckets = part.get("buckets", np.zeros(0, np.int64))
    if is_right and _DENSE + "pieces" in part:
        is_right = state.dense.fits({name: part[_DENSE + name] for name in no_pieces})
    if not is_right or ((buckets < 0) | (buckets >= NUM_BUCKETS)).any():
        raise RefusedError(Refusal.INVALID_ARGUMENT, f"buckets: expected a part of these tables, got {sorted(part)}")


def _type_of(name: str, pieces: Part) -> np.dtype[Any]:
    if name.startswith(_DENSE):
        return pieces[name[len(_DENSE) :]].dtype if name[len(_DENSE) :] in pieces else np.dtype(np.int64)
    return np.dtype(np.float32 if name.endswith(".records") else np.int64)


def cut_rows(part: Part, size: int) -> Iterator[Part]:
    """Cuts the rows of a part, so that none of the parts holds many more bytes than it may."""
    for ids in [name for name in part if name.endswith(".ids")]:
        records = ids.replace(".ids", ".records")
        step = max(1, size // (8 + part[records][:1].nbytes))
        for first in range(0, len(part[ids]), step):
            yield {name: part[name][first : first + step] for name in (ids, records)}


def cut_marks(part: Part, size: int) -> Iterator[Part]:
    """Cuts marks likewise, by lanes."""
    step = max(1, size // (8 * max(1, part["buckets"].size))) if part else 1
    for first in range(0, len(part.get("lanes", ())), step):
        some = slice(first, first + step)
        yield {"lanes": part["lanes"][some], "buckets": part["buckets"], "marks": part["marks"][some]}


def cut_dense(part: Part, size: int) -> Iterator[Part]:
    """Cuts pieces of the dense part likewise: first all pieces, then what they have answered."""
    plain = {name[len(_DENSE) :]: array for name, array in part.items()}
    yield from map(_name_dense, cut_pieces(plain, size) if plain else ())


def _put_rows(state: ShardState, number: int, part: Part, buckets: Mask | None, restamp: bool) -> None:
    table, salt = state.tables[number], state.salts[number]
    if (gone := part.get(f"{number}.evicted")) is not None:
        gone = gone if buckets is None else gone[buckets[buckets_of(gone, salt)]]
        table.remove(gone)
        state.removed[number].append(gone)
    if (ids := part.get(f"{number}.ids")) is None:
        return
    rows = part[f"{number}.records"]
    if buckets is not None:
        wanted = buckets[buckets_of(ids, salt)]
        ids, rows = ids[wanted], rows[wanted]
    if restamp:
        table.count_change()
    table.put(Records(ids, rows), version=table.version if restamp else None)


def _name_dense(pieces: Part) -> Part:
    return {_DENSE + name: array for name, array in pieces.items()}
