"""The row kernels' benchmark runs from its flags to its figures, with nearly nothing to look up or update."""

from __future__ import annotations

import pytest

RATIOS = {
    "rowwise_adagrad_vs_fbgemm",
    "sgd_vs_fbgemm",
    "adagrad_vs_rowwise_adagrad",
    "adam_vs_rowwise_adagrad",
    "row_lamb_vs_rowwise_adagrad",
    "partial_row_lamb_vs_rowwise_adagrad",
    "lazy_cowclip_vs_adam",
    "bf16_vs_rowwise_adagrad",
    "fp16_vs_rowwise_adagrad",
}


@pytest.mark.long
def test_its_figures_follow_from_times_and_bytes(run_benchmark) -> None:
    measured = run_benchmark("row_kernels", "--small", "--rounds", "1")
    linear, random = (measured[f"{kind}_gigabytes_per_second"] * 1e9 for kind in ("linear", "random"))
    # 3 tables x 64 bags: of one id out of 1,000, or of 8 on average; few ids come twice
    for prefix, ids in (("", 192), ("many_", 1536)):
        assert all(measured[prefix + ratio] > 0 for ratio in RATIOS)
        distinct = measured[f"{prefix}distinct_rows"]
        assert 0.6 * ids < distinct <= ids
        ours, theirs = measured[f"{prefix}sgd_ms"], measured[f"{prefix}fbgemm_sgd_ms"]
        assert measured[f"{prefix}sgd_vs_fbgemm"] == pytest.approx(theirs / ours, rel=0.01)
        assert 0 < measured[f"{prefix}sgd_forward_ms"] < ours
        # rows of 64 numbers are read, read again and written; vectors are written, and their gradients read
        floor = distinct * 3 * 256 / random + 192 * 2 * 256 / linear
        assert measured[f"{prefix}sgd_floor_share"] == pytest.approx(floor * 1e3 / ours, rel=0.01, abs=1e-4)
