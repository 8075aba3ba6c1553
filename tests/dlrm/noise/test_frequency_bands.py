"""Bands and frequencies of rows are counted from the data, whatever the order of ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dlrm.noise.frequency_bands import NAMES, count_bands, measure_frequencies
from embeddings import TableConfig

SAMPLES = 20_000


def test_rows_are_counted(make_dataset) -> None:
    ids = np.full(SAMPLES, 7)
    ids[:100], ids[100:103], ids[103] = 3, 1, 9  # 1 in 200, 1 in 6,667, 1 in 20,000
    dataset = make_dataset(np.arange(SAMPLES) % 2, np.random.default_rng(0).permutation(ids))
    table = TableConfig(name="a", num_rows=10, dim=4)
    bands = count_bands(dataset, [table])
    assert bands.names == NAMES
    sums = bands.of("a").sum(torch.arange(10), torch.tensor([2.0**row for row in range(10)]))
    assert sums.tolist() == [2.0**7, 2.0**3 + 2.0**1, 1.0 + 4 + 16 + 32 + 64 + 256 + 512]
    frequencies = measure_frequencies(dataset, [table])["a"].to_dense()
    assert frequencies.sum() == pytest.approx(1.0)
    assert frequencies[[3, 1, 9, 0]].tolist() == pytest.approx([0.005, 0.00015, 0.00005, 0.0])
