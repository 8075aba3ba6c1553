"""Measures a model on a split, in one pass and in memory that does not grow with the split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dlrm.data.dataset import LABEL
from dlrm.data.reader import Reader
from dlrm.distributed.ranks import ALONE, Ranks
from dlrm.metrics.metrics import BinaryMetrics, MetricValues
from dlrm.training.gather_scores import gather_scores
from dlrm.training.guards import find_tables, naming_rows
from dlrm.training.train_step import autocast
from embeddings.stopwatch import Stopwatch

PROBABILITY = "probability"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    reader: Reader,
    *,
    batch_size: int = 8192,
    segment_by: str | None = None,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    directory: Path | None = None,
    ranks: Ranks = ALONE,
    stopwatch: Stopwatch | None = None,
) -> MetricValues:
    """Measure `model` on one pass over `reader`, of which each rank takes its share.

    Args:
        model: maps a `Batch` to logits.
        reader: of the split, unshuffled.
        batch_size: samples per forward pass, over all ranks.
        segment_by: a feature with one id per row, or a further column of the dataset; AUC is also given per value.
        precision: as in training.
        device: where the model is.
        directory: for scores that wait to be sorted, 8 bytes per sample; None is the system's temporary folder.
        ranks: who else calls this. What comes back is the same on all, and what one process alone would get from the
            same logits.
        stopwatch: counts all of it as "evaluation".

    Raises:
        ValueError: the segment's column does not exist or has several ids per row; or an id lies outside its table.
    """
    stopwatch = stopwatch or Stopwatch()
    share = ranks.share_of if ranks.count > 1 else None
    batches = reader.batches(batch_size, stop=reader.num_rows, share=share)
    device = torch.device(device)
    with _evaluating(model), BinaryMetrics(directory, segments=segment_by is not None) as metrics:
        while True:
            with stopwatch.stage("evaluation"):  # one per batch, so that who watches sees it go on
                batch = next(batches, None)
                if batch is None:
                    break
                with naming_rows(batch, reader.split, ranks), autocast(precision, device.type):
                    logits = model(batch.to(device) if device.type != "cpu" else batch).float().cpu()
                segments = None
                if segment_by is not None:
                    segments = torch.from_numpy(reader.dataset.column(reader.split, segment_by, batch.rows.numpy()))
                metrics.update(logits, batch.labels, segments)
        with stopwatch.stage("evaluation"):
            gather_scores(metrics, ranks)
            values = ranks.object_from_first(metrics.compute() if ranks.is_first else None)
    assert values is not None
    return values


def evaluate_true_probability(
    reader: Reader, *, batch_size: int = 65536, directory: Path | None = None, ranks: Ranks = ALONE
) -> MetricValues | None:
    """Measure the probability that the labels were drawn from, where the data holds it: no model can be better.

    Rank 0 does so for all.
    """
    if PROBABILITY not in reader.dataset.info.extra:
        return None
    return ranks.object_from_first(_measure_probability(reader, batch_size, directory) if ranks.is_first else None)


def _measure_probability(reader: Reader, batch_size: int, directory: Path | None) -> MetricValues:
    with BinaryMetrics(directory) as metrics:
        for start in range(0, reader.num_rows, batch_size):
            rows = np.arange(start, min(start + batch_size, reader.num_rows))
            probability = torch.from_numpy(reader.dataset.column(reader.split, PROBABILITY, rows)).double()
            labels = torch.from_numpy(reader.dataset.column(reader.split, LABEL, rows)).float()
            metrics.update(torch.logit(probability), labels)
        return metrics.compute()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation, where its tables' own stages are not told apart."""
    was_training, every_tables = model.training, find_tables(model)
    stopwatches = [tables.stopwatch for tables in every_tables]
    model.eval()
    for tables in every_tables:
        tables.stopwatch = Stopwatch()
    try:
        yield
    finally:
        for tables, stopwatch in zip(every_tables, stopwatches, strict=True):
            tables.stopwatch = stopwatch
        model.train(was_training)
