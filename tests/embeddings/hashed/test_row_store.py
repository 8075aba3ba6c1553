"""The id map finds what a dict would, whatever is inserted and removed, and also where all ids want one place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings.hashed.row_store import RowStore
from embeddings.kernels.hash_kernels import find_buckets

SALT = np.uint64(3)


def unmix(number: int) -> int:
    """Gives the number that ``hash_kernels.mix`` makes another one of."""
    mask = 2**64 - 1

    def unshift(value: int, by: int) -> int:
        result = value
        for _ in range(64 // by + 1):
            result = value ^ (result >> by)
        return result

    number = unshift(number, 31) * pow(0x94D049BB133111EB, -1, 2**64) & mask
    number = unshift(number, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & mask
    return unshift(number, 30)


def id_with_hash(hash: int) -> int:
    id = ((unmix(hash) - 0x9E3779B97F4A7C15) % 2**64) ^ int(SALT)
    return id - 2**64 if id >= 2**63 else id


# Their hashes end alike, so that they have one home; those of the first half are also alike in what entries keep.
COLLIDING = [id_with_hash(number << 52 | 1023) for number in range(20)]
COLLIDING += [id_with_hash(number << 20 | 1023) for number in range(1, 21)]
LIMITS = [-1, 2**63 - 1, -(2**63), 2**32, -(2**32)]

some_ids = st.lists(st.sampled_from(COLLIDING + LIMITS + list(range(100))), max_size=60)


@given(st.lists(st.tuples(st.booleans(), some_ids), max_size=30))
def test_finds_what_was_inserted_and_not_removed(steps):
    store, expected = RowStore(1, salt=SALT), {}
    for number, (is_insert, given_ids) in enumerate(steps):
        ids = np.array(given_ids, np.int64)
        if is_insert:
            slots, new = store.insert(ids)
            first = {id: place for place, id in reversed(list(enumerate(given_ids)))}
            assert [place for place, is_new in enumerate(new) if is_new] == sorted(
                place for id, place in first.items() if id not in expected
            )
            assert not store.read(slots[new]).any()
            store.write(slots, np.full((ids.size, 1), number, np.float32))
            expected |= dict.fromkeys(given_ids, number)
        else:
            assert store.remove(ids) == len(expected.keys() & set(given_ids))
            for id in given_ids:
                expected.pop(id, None)
        assert len(store) == len(expected)
        asked = np.array(COLLIDING + LIMITS + list(range(100)), np.int64)
        slots, missing = store.find(asked)
        there = slots >= 0
        numbers = store.read(slots[there], 0, 1)[:, 0].astype(int)
        assert dict(zip(asked[there].tolist(), numbers.tolist(), strict=True)) == expected
        assert missing == asked.size - len(expected)
        assert sorted(store.ids_of(store.list_slots())) == sorted(expected)


def test_nothing_is_lost_while_it_grows_and_slots_are_used_again():
    store, random = RowStore(2, salt=SALT), np.random.default_rng(0)
    ids = np.unique(random.integers(-(2**63), 2**63 - 1, 150_000))
    random.shuffle(ids)
    for some in np.array_split(ids, 7):
        slots, new = store.insert(some)
        assert new.all()
        store.write(slots, some.view(np.float32).reshape(-1, 2))
    gone, kept = ids[:100_000], ids[100_000:]
    assert store.remove(gone) == gone.size
    bytes_before = len(store.blocks)
    again = gone[:90_000] + 1
    slots, new = store.insert(again)
    store.write(slots, again.view(np.float32).reshape(-1, 2))
    assert len(store.blocks) == bytes_before
    assert (store.find(gone)[0] >= 0).sum() == np.isin(gone, again).sum()
    for some in (kept, again):
        slots, missing = store.find(some)
        assert not missing
        assert np.array_equal(store.read(slots, 0, 2).view(np.int64)[:, 0], some)
    assert len(store) == np.union1d(kept, again).size


def test_lists_rows_of_buckets():
    store, ids = RowStore(0, salt=SALT), np.arange(5000)
    store.insert(ids)
    numbers, wanted = np.empty(ids.size, np.uint16), np.zeros(4096, np.bool_)
    find_buckets(ids, SALT, numbers)
    wanted[:100] = True
    found = store.ids_of(store.list_slots(buckets=wanted))
    assert 0 < found.size < 5000
    assert sorted(found) == np.flatnonzero(numbers < 100).tolist()


@pytest.mark.parametrize("ids", [[], [5]])
def test_an_empty_store_has_nothing(ids):
    store = RowStore(3, salt=SALT)
    slots, missing = store.find(np.array(ids, np.int64))
    assert (slots.tolist(), missing) == ([-1] * len(ids), len(ids))
    assert store.remove(np.array(ids, np.int64)) == 0
    assert store.list_slots().size == 0
