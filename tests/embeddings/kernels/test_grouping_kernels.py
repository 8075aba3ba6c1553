"""The order in which rows are updated, for tables too large to make."""

from __future__ import annotations

import numpy as np
import pytest

from embeddings.kernels.grouping_kernels import count_rows, group_by_row


@pytest.mark.parametrize("num_rows", [1, 2, 3, 2048, 2049, 5000, 2**13, 2**22 + 1, 2**31, 2**32])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_ids_are_sorted_by_row_and_then_as_they_come(num_rows, parts, weighted):
    random = np.random.default_rng(0)
    lengths = random.integers(0, 6, 120)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    # pairs that differ in one bit each, so that none can be left out
    ids = (1 << random.integers(0, 33, offsets[-1])) % num_rows
    weights = random.random(ids.size if weighted else 0, dtype=np.float32)
    # the part's number; cells 80 to 119, then 0 to 39; where their vectors lie
    segments = np.array([[7, 80, 40, 1000, 5], [7, 0, 40, 3, 2]])
    expected, places, scales = [], [], []
    for _, first, count, start, stride in segments.tolist():
        for i in range(count):
            bag = range(offsets[first + i], offsets[first + i + 1])
            if weighted:
                expected += [(int(ids[at]), len(places) + number) for number, at in enumerate(bag)]
                places += [start + i * stride] * len(bag)
                scales += [weights[at] / len(bag) for at in bag]
            else:
                expected += [(int(ids[at]), len(places)) for at in bag]
                places.append(start + i * stride)
                scales.append(1 / len(bag) if len(bag) else 1)
    for part in range(parts):
        keys, got_places, got_scales = group_by_row(ids, offsets, weights, segments, True, num_rows, part, parts)
        got = [(int(key >> 32), int(key & 0xFFFFFFFF)) for key in keys.tolist()]
        mine = sorted(pair for pair in expected if pair[0] % parts == part)
        assert got == mine
        assert count_rows(keys) == len({row for row, _ in mine})
        assert got_places.tolist() == places
        np.testing.assert_allclose(got_scales, scales, rtol=1e-6)
    assert group_by_row(ids, offsets, weights[:0], segments, False, num_rows, 0, 1)[2].size == 0
