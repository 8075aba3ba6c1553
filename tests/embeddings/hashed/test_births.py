"""A row that comes into being alone has the numbers that a whole table's stream would have given it, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from embeddings import TableConfig
from embeddings.hashed.births import Births
from embeddings.initial_rows import initial_rows
from embeddings.tables import UNBOUNDED

LARGE_IDS = [0, 1, 2**32 - 1, 2**32, 2**61, 2**62 + 12345, 2**63 - 2, 2**63 - 1]


@pytest.mark.parametrize("dim", [1, 3, 7, 8, 13, 64, 129])
def test_rows_of_a_table_are_those_that_it_starts_with(dim):
    config = TableConfig(name="a", num_rows=1000, dim=dim)
    ids = np.random.default_rng(0).permutation(1000)
    born = Births(config, seed=7).draw(ids)
    assert np.array_equal(born, initial_rows(config, seed=7).numpy()[ids])


@pytest.mark.parametrize("dim", [1, 5, 64, 1000])
def test_rows_lie_anywhere_in_a_stream_of_more_than_2_to_the_64_numbers(dim):
    config = TableConfig(name="b", num_rows=UNBOUNDED, dim=dim, init_scale=0.1)
    ids = np.array([*LARGE_IDS, -1, -(2**63)], np.int64)
    born = Births(config, seed=1).draw(ids)
    for id, row in zip(ids.tolist(), born, strict=True):
        expected = initial_rows(config, seed=1, first_row=id % 2**64, num_rows=1)
        assert np.array_equal(row[None], expected.numpy()), id


def test_other_seeds_and_tables_have_other_rows():
    ids, config = np.arange(10), TableConfig(name="a", num_rows=10, dim=4)
    one = Births(config, seed=0).draw(ids)
    assert not np.array_equal(one, Births(config, seed=1).draw(ids))
    assert not np.array_equal(one, Births(TableConfig(name="b", num_rows=10, dim=4), seed=0).draw(ids))


def test_rows_of_a_table_without_scale_are_zeros():
    config = TableConfig(name="a", num_rows=10, dim=4, init_scale=0.0)
    assert not Births(config, seed=0).draw(np.arange(10)).any()


def test_a_table_without_end_must_say_its_scale():
    with pytest.raises(ValueError, match="table 'a': expected init_scale where num_rows is unbounded, got none"):
        TableConfig(name="a", num_rows=UNBOUNDED, dim=4)
