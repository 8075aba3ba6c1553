"""Rows begin a cache line and lie on whole huge pages of their own, whatever their number and type."""

from __future__ import annotations

import pytest
import torch

from embeddings import RowAdam, TableConfig
from embeddings.local.local_tables import LocalTables
from embeddings.local.row_memory import zero_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 8), (3, 5), (5000,), (70_001, 33), (3_000_000,)])
def test_rows_are_zeros_that_begin_a_cache_line(shape, dtype):
    rows = zero_rows(*shape, dtype=dtype)
    assert rows.shape == shape
    assert rows.dtype == dtype
    assert rows.is_contiguous()
    assert not rows.any()
    assert rows.data_ptr() % 64 == 0
    rows.fill_(1)
    assert rows.float().mean() == 1 or rows.numel() == 0


def test_pages_outlive_every_other_reference_to_them():
    views = [zero_rows(2_000_000).fill_(number)[5:] for number in range(8)]
    assert [float(view.max()) for view in views] == list(range(8))


def test_large_tables_and_their_states_begin_huge_pages():
    (rows,) = LocalTables([TableConfig(name="a", num_rows=70_000, dim=33, optimizer=RowAdam(learning_rate=0.1))]).rows()
    for tensor in (rows.weight, rows.state["first_moment"], rows.state["second_moment"]):
        assert tensor.data_ptr() % (1 << 21) == 0
    assert rows.weight.ne(0).float().mean() > 0.99
