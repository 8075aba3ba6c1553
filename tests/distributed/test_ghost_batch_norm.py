"""Running statistics of ranks become those of all their rows, and a run with them is measured alike on every rank."""

from __future__ import annotations

import numpy as np
import torch

from dlrm.distributed.ranks import Ranks
from dlrm.ghost_batch_norm import GhostBatchNorm, average_over_ranks


def average(rank, count):
    """See a batch of one's own, each of another mean; rank 2 has had no rows so far."""
    model = torch.nn.Sequential(GhostBatchNorm(4, ghost=8, momentum=1.0), torch.nn.Linear(4, 3), GhostBatchNorm(3))
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(rank)) + rank
    model[0](rows if rank < 2 else rows[:0])
    model[2].running_mean.fill_(float(rank))
    average_over_ranks(model, Ranks(rank=rank, count=count))
    norm = model[0]
    return rows.numpy(), norm.running_mean.numpy(), norm.running_var.numpy(), model[2].running_mean.numpy()


def test_running_statistics_are_averaged_over_ranks(run_ranks):
    results = run_ranks(average, 3)
    rows = np.stack([result[0] for result in results[:2]])
    mean, variance = rows.mean(axis=(0, 1)), rows.var(axis=1, ddof=1).mean(axis=0) + rows.mean(axis=1).var(axis=0)
    for rank, (_, its_mean, its_variance, unseen) in enumerate(results):
        np.testing.assert_allclose(its_mean, mean, rtol=1e-5)
        np.testing.assert_allclose(its_variance, variance, rtol=1e-5)
        assert np.array_equal(its_mean, results[0][1])
        assert np.array_equal(unseen, np.full(3, rank)), "statistics of nothing are left alone"
