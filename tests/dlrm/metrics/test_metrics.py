"""Metrics against scikit-learn and plain counting, with heavy ties, tiny chunks, merges and little memory."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from dlrm.metrics.metrics import BinaryMetrics, MetricValues, relative_auc


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))


def clicks(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits with some ties, labels that follow them a little, and Zipf segments."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1.0, 1.0, rows).round(3).astype(np.float32)
    labels = (rng.random(rows) < sigmoid(0.7 * logits - 0.2)).astype(np.float32)
    return logits, labels, np.minimum(rng.zipf(1.5, rows), 2**31) - 1


def measure(
    logits: np.ndarray,
    labels: np.ndarray,
    segments: np.ndarray | None = None,
    *,
    batch_size: int = 1000,
    **options: Any,
) -> MetricValues:
    with BinaryMetrics(segments=segments is not None, **options) as metrics:
        for start in range(0, len(logits), batch_size):
            part = slice(start, start + batch_size)
            metrics.update(logits[part], labels[part], None if segments is None else segments[part])
        return metrics.compute()


def same(left: MetricValues, right: MetricValues) -> bool:
    """Equal to the last bit, NaN included."""
    return repr(asdict(left)) == repr(asdict(right))


def test_equals_scikit_learn() -> None:
    logits, labels, _ = clicks(30_000)
    values = measure(logits, labels, chunk_rows=1000)
    predictions = sigmoid(logits)
    assert values.auc == pytest.approx(roc_auc_score(labels, logits), abs=1e-14)
    assert values.logloss == pytest.approx(log_loss(labels, predictions), rel=1e-12)
    rate = labels.mean(dtype=np.float64)
    entropy = log_loss(labels, np.full(len(labels), rate))
    assert values.normalized_entropy == pytest.approx(log_loss(labels, predictions) / entropy, rel=1e-12)
    assert values.calibration == pytest.approx(predictions.mean() / rate, rel=1e-12)
    assert values.mean_prediction == pytest.approx(predictions.mean(), rel=1e-12)
    assert values.prediction_std == pytest.approx(predictions.std(), rel=1e-9)
    assert (values.samples, values.positives) == (30_000, int(labels.sum()))
    assert values.undefined is None


def count_pairs(logits: list[float], labels: list[int]) -> float:
    """AUC by looking at every pair."""
    wins = [
        float(a > b) + 0.5 * float(a == b)
        for a, of_a in zip(logits, labels, strict=True)
        for b, of_b in zip(logits, labels, strict=True)
        if of_a and not of_b
    ]
    return sum(wins) / len(wins) if wins else math.nan


ROWS = st.lists(
    st.tuples(st.sampled_from([-2.5, -1e-40, -0.0, 0.0, 0.5, 3.0]), st.integers(0, 1), st.integers(0, 3)),
    min_size=1,
    max_size=60,
)


@settings(deadline=None)
@given(rows=ROWS, chunk_rows=st.integers(1, 20), batch_size=st.integers(1, 70))
def test_ties_count_half_wherever_chunks_end(
    rows: list[tuple[float, int, int]], chunk_rows: int, batch_size: int
) -> None:
    logits, labels, segments = (list(column) for column in zip(*rows, strict=True))
    arrays = np.array(logits, np.float32), np.array(labels), np.array(segments)
    values = measure(*arrays, batch_size=batch_size, chunk_rows=chunk_rows)
    assert values.auc == pytest.approx(count_pairs(logits, labels), abs=1e-15, nan_ok=True)
    assert sum(s.samples for s in values.segments) == len(rows)
    for segment in values.segments:
        of_segment = [row for row in rows if row[2] == segment.segment]
        expected = count_pairs([row[0] for row in of_segment], [row[1] for row in of_segment])
        assert segment.auc == pytest.approx(expected, abs=1e-15, nan_ok=True)
        assert segment.positives == sum(row[1] for row in of_segment)
        assert segment.mean_prediction == pytest.approx(np.mean(sigmoid(np.array([row[0] for row in of_segment]))))


@settings(deadline=None)
@given(rows=ROWS, cut=st.integers(0, 60), seed=st.integers(0, 100))
def test_batches_order_and_merges_do_not_matter(rows: list[tuple[float, int, int]], cut: int, seed: int) -> None:
    logits, labels, segments = (np.array(column) for column in zip(*rows, strict=True))
    order = np.random.default_rng(seed).permutation(len(rows))
    expected = measure(logits, labels, segments)
    with BinaryMetrics(segments=True) as left, BinaryMetrics(segments=True) as right:
        for metrics, part in ((left, order[:cut]), (right, order[cut:])):
            metrics.update(logits[part], labels[part], segments[part])
        if len(right):
            right.compute()  # sorts in place, which must not matter either
        left.merge(right)
        assert same(left.compute(), expected)
        left.update(logits, labels, segments)
        assert left.compute().samples == 2 * len(rows)


def test_floats_of_every_size_and_sign_sort_as_numbers() -> None:
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    logits = np.concatenate([logits[~np.isnan(logits)], [np.inf, -np.inf, 1e-45, -1e-45]]).astype(np.float32)
    ranks = np.searchsorted(np.unique(logits), logits)
    labels = rng.random(len(logits)) < ranks / len(logits)
    assert measure(logits, labels).auc == pytest.approx(roc_auc_score(labels, ranks), abs=1e-14)


def test_extreme_logits_have_a_finite_loss_where_they_are_right() -> None:
    values = measure(np.array([np.inf, -np.inf, 1000.0, -1000.0]), np.array([1, 0, 1, 0]))
    assert (values.auc, values.logloss) == (1.0, 0.0)
    assert measure(np.array([1000.0, -3.0]), np.array([0, 1])).logloss == pytest.approx(
        (1000 + 3 + math.log1p(math.exp(-3))) / 2
    )
    assert measure(np.array([-np.inf, 1.0]), np.array([1, 0])).logloss == math.inf


@pytest.mark.parametrize("chunk_rows", [7, 1000, 1 << 17])
def test_calibration_curve_has_bins_of_equal_size(chunk_rows: int) -> None:
    rng = np.random.default_rng(4)
    logits = rng.permutation(np.linspace(-4, 4, 1003).astype(np.float32))
    labels = rng.random(1003) < sigmoid(logits)
    curve = measure(logits, labels, chunk_rows=chunk_rows).calibration_curve
    order = np.argsort(logits)
    start = 0
    for found in curve:
        part = order[start : start + found.samples]
        assert found.mean_prediction == pytest.approx(sigmoid(logits[part]).mean(), rel=1e-9)
        assert found.mean_label == pytest.approx(labels[part].mean(), rel=1e-9, abs=1e-12)
        start += found.samples
    assert start == 1003
    assert len(curve) == 20
    assert {found.samples for found in curve} == {50, 51}


def test_calibration_bins_share_the_labels_of_tied_rows() -> None:
    logits = np.array([0.0] * 30 + [1.0] * 10)
    labels = np.array([1] * 15 + [0] * 15 + [1] * 10)
    curve = measure(logits, labels, calibration_bins=2, chunk_rows=4).calibration_curve
    assert [b.samples for b in curve] == [20, 20]
    assert curve[0].mean_label == pytest.approx(0.5)
    assert curve[1].mean_label == pytest.approx((10 * 0.5 + 10) / 20)
    assert len(measure(logits[:3], labels[:3]).calibration_curve) == 3


@pytest.mark.parametrize("chunk_rows", [301, 1 << 17])
def test_the_largest_segments_are_reported(chunk_rows: int) -> None:
    logits, labels, ranks = clicks(20_000, seed=2)
    segments = ranks * 48271 % (2**31 - 1)  # large ones anywhere between small ones
    values = measure(logits, labels, segments, max_segments=5, chunk_rows=chunk_rows)
    ids, counts = np.unique(segments, return_counts=True)
    expected = ids[np.lexsort((ids, -counts))][:5]
    assert [s.segment for s in values.segments] == expected.tolist()
    for found in values.segments:
        rows = segments == found.segment
        assert found.samples == rows.sum()
        assert found.auc == pytest.approx(roc_auc_score(labels[rows], logits[rows]), abs=1e-14)
        assert found.calibration == pytest.approx(sigmoid(logits[rows]).mean() / labels[rows].mean(), rel=1e-6)
    without = measure(logits, labels, chunk_rows=chunk_rows)
    assert same(MetricValues(**{**vars(values), "segments": ()}), without)


@pytest.mark.parametrize("chunk_rows", [2, 7, 100])
def test_of_segments_of_one_size_the_first_are_reported(chunk_rows: int) -> None:
    values = measure(np.zeros(60), np.zeros(60), np.arange(60) % 20, max_segments=3, chunk_rows=chunk_rows)
    assert [(s.segment, s.samples) for s in values.segments] == [(0, 3), (1, 3), (2, 3)]


def test_segments_reach_to_the_largest_id() -> None:
    values = measure(np.array([-1.0, 1.0, 5.0]), np.array([0, 1, 0]), np.array([2**31 - 1, 2**31 - 1, 0]))
    assert [(s.segment, s.samples, s.auc) for s in values.segments[:1]] == [(2**31 - 1, 2, 1.0)]
    assert math.isnan(values.segments[1].auc)
    assert math.isnan(values.segments[1].calibration)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_gives_a_reason(label: int) -> None:
    values = measure(np.array([0.3, 0.4]), np.array([label, label]))
    assert math.isnan(values.auc)
    assert math.isnan(values.normalized_entropy)
    assert math.isnan(values.calibration) == (label == 0)
    assert values.undefined == f"all 2 labels are {label}, AUC needs both"


@pytest.mark.parametrize("logit", [0.1, -3.3, 17.0])
def test_a_constant_prediction_has_no_spread(logit: float) -> None:
    labels = np.arange(1000) % 2
    values = measure(np.full(1000, logit), labels, chunk_rows=64)
    assert (values.prediction_std, values.auc) == (0.0, 0.5)
    almost = np.full(1000, np.float32(logit))
    almost[0] = np.nextafter(almost[0], np.float32(100))
    assert 0.0 < measure(almost, labels, chunk_rows=64).prediction_std < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tensors_are_taken_as_they_are(dtype: torch.dtype) -> None:
    logits = torch.linspace(-2, 2, 50, dtype=dtype, requires_grad=True)
    labels, segments = (torch.arange(50) % 3 == 0).float(), torch.arange(50) % 2
    with BinaryMetrics(segments=True) as metrics:
        metrics.update(logits, labels, segments)
        values = metrics.compute()
    expected = measure(logits.detach().float().numpy(), labels.numpy(), segments.numpy())
    assert same(values, expected)


BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "nan": (([0.0, math.nan], [0, 1], [0, 0]), "logits: expected a number .*got nan at row 1"),
    "label": (([0.0, 1.0], [0.5, 1], [0, 0]), "labels: expected 0 or 1, got 0.5 at row 0"),
    "nan label": (([0.0, 1.0], [1, math.nan], [0, 0]), "labels: expected 0 or 1, got nan at row 1"),
    "segment": (([0.0, 1.0], [0, 1], [0, -1]), "segments: expected an id .*got -1 at row 1"),
    "large segment": (([0.0, 1.0], [0, 1], [2**31, 0]), "segments: expected an id .*got 2147483648 at row 0"),
    "fewer labels": (([0.0, 1.0], [0], [0, 0]), r"labels: expected the shape \[2\], as of the logits, got \[1\]"),
    "matrix": (([[0.0], [1.0]], [0, 1], [0, 0]), r"logits: expected the shape \[batch\], got \[2, 1\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_nonsense_is_refused_and_leaves_nothing(case: str) -> None:
    (logits, labels, segments), message = BAD[case]
    with BinaryMetrics(segments=True) as metrics:
        with pytest.raises(ValueError, match=message) as caught:
            metrics.update(np.array(logits), np.array(labels), np.array(segments))
        assert "\n" not in str(caught.value)
        metrics.update(np.array([0.0]), np.array([1]), np.array([3]))
        assert metrics.compute().samples == 1
        assert sum(segment.samples for segment in metrics.compute().segments) == 1


def test_segments_come_always_or_never() -> None:
    row = np.zeros(1)
    with BinaryMetrics() as plain, BinaryMetrics(segments=True) as segmented:
        with pytest.raises(ValueError, match="segments"):
            plain.update(row, row, row)
        with pytest.raises(ValueError, match="segments"):
            segmented.update(row, row)
        with pytest.raises(ValueError, match="segments"):
            plain.merge(segmented)


def test_no_rows_are_refused() -> None:
    with BinaryMetrics() as metrics, pytest.raises(ValueError, match="at least one row"):
        metrics.compute()


def test_files_have_no_name_and_are_closed(tmp_path: Path) -> None:
    files_before = len(list(Path("/proc/self/fd").iterdir()))
    with BinaryMetrics(tmp_path, segments=True) as metrics:
        metrics.update(np.zeros(10), np.arange(10) % 2, np.arange(10))
        metrics.compute()
        assert list(tmp_path.iterdir()) == []
        assert len(list(Path("/proc/self/fd").iterdir())) == files_before + 2
    assert len(list(Path("/proc/self/fd").iterdir())) == files_before


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


MEMORY = """
import resource
import numpy as np
from dlrm.metrics.metrics import BinaryMetrics
rng = np.random.default_rng(0)
def run(rows):
    with BinaryMetrics(segments=True, chunk_rows=1 << 15) as metrics:
        for _ in range(rows // 50_000):
            logits = rng.normal(size=50_000)
            metrics.update(logits, logits > 0, rng.integers(0, 1000, 50_000))
        return metrics.compute()
run(100_000)
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + SPARE_BYTES, -1))
values = run(3_000_000)
assert values.samples == 3_000_000 and values.auc == 1.0, values
"""


def test_memory_does_not_grow_with_rows() -> None:
    """3 million rows are 48 MB of keys; 8 MiB beyond what 100,000 rows needed must do."""
    result = run_python(MEMORY.replace("SPARE_BYTES", str(8 << 20)))
    assert result.returncode == 0, result.stderr


FULL_DISK = """
import resource
import numpy as np
from dlrm.metrics.metrics import BinaryMetrics
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))
with BinaryMetrics() as metrics:
    metrics.update(np.ones(100), np.ones(100))
    try:
        metrics.update(np.full(100, 2.0), np.zeros(100))
    except OSError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    metrics.update(np.zeros(100), np.zeros(100))
    print(metrics.compute().samples, metrics.compute().auc)
"""


def test_a_full_disk_is_one_clear_error_and_what_was_written_stays() -> None:
    result = run_python(FULL_DISK)
    error, values = result.stdout.splitlines()
    assert error.startswith("[Errno 27] cannot write row 100 of the scores of an evaluation (8 bytes each) in ")
    assert values == "200 1.0"


def test_metrics_do_not_import_torch() -> None:
    assert run_python("import sys, dlrm.metrics.metrics; sys.exit('torch' in sys.modules)").returncode == 0


def test_relative_auc() -> None:
    assert relative_auc(0.77, 0.8) == pytest.approx(0.9)
    for bayes_auc in (0.5, 0.3, math.nan):
        with pytest.raises(ValueError, match=r"above \.5"):
            relative_auc(0.7, bayes_auc)
