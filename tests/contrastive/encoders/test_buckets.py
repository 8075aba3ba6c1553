"""Where histories are padded, they are padded to others of like length."""

from __future__ import annotations

import numpy as np
import torch

from contrastive.encoders.jagged import _BUCKET_TOKENS, lay_out


def test_a_bucket_holds_no_more_padding_than_another_one_would_cost() -> None:
    lengths = torch.from_numpy(np.random.default_rng(0).geometric(0.12, 500).clip(1, 50))
    buckets = lay_out(lengths, torch.zeros(int(lengths.sum()), dtype=torch.bool), 50).buckets
    assert buckets is not None
    assert sum(bucket.count for bucket in buckets) == 500
    ordered = iter(lengths.sort().values.tolist())
    for bucket in buckets:
        own = [next(ordered) for _ in range(bucket.count)]
        assert max(own) == bucket.width
        assert bucket.count * bucket.width - sum(own) <= _BUCKET_TOKENS["cpu"]
