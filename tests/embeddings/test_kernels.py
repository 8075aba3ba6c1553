"""The order in which rows are updated, for tables too large to make."""

from __future__ import annotations

import numpy as np
import pytest

from embeddings.kernels import _group_by_row


@pytest.mark.parametrize("num_rows", [1, 2, 3, 2048, 2049, 5000, 2**13, 2**22 + 1, 2**31, 2**32])
@pytest.mark.parametrize("parts", [1, 3])
def test_ids_are_sorted_by_row_then_feature_then_bag(num_rows, parts):
    random = np.random.default_rng(0)
    batch_size, keys_in_batch = 40, 3
    lengths = random.integers(0, 6, keys_in_batch * batch_size)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    # pairs that differ in one bit each, so that none can be left out
    ids = (1 << random.integers(0, 33, offsets[-1])) % num_rows
    positions = np.array([2, 0])
    expected = []
    for feature, position in enumerate(positions):
        for bag in range(batch_size):
            cell = position * batch_size + bag
            slot = feature * batch_size + bag
            expected += [(int(row), slot) for row in ids[offsets[cell] : offsets[cell + 1]]]
    for part in range(parts):
        keys = _group_by_row(ids, offsets, positions, batch_size, num_rows, part, parts)
        got = [(int(key >> 32), int(key & 0xFFFFFFFF)) for key in keys.tolist()]
        assert got == sorted(pair for pair in expected if pair[0] % parts == part)
