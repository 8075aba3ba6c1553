"""Measures a model on a split, in one pass and in memory that does not grow with the split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from dlrm.data.dataset import LABEL
from dlrm.data.reader import Reader
from dlrm.training.metrics import BinaryMetrics, MetricValues
from dlrm.training.train_step import autocast

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
) -> MetricValues:
    """Measure `model` on one pass over `reader`.

    Args:
        model: maps a `Batch` to logits.
        reader: of the split, unshuffled.
        batch_size: samples per forward pass.
        segment_by: a feature with one id per row, or a further column of the dataset; AUC is also given per value.
        precision: as in training.
        device: where the model is.
        directory: for scores that wait to be sorted, 8 bytes per sample; None is the system's temporary folder.

    Raises:
        ValueError: the segment's column does not exist or has several ids per row.
    """
    was_training = model.training
    model.eval()
    device = torch.device(device)
    with BinaryMetrics(directory, segments=segment_by is not None) as metrics:
        for batch in reader.batches(batch_size, stop=reader.num_rows):
            with autocast(precision, device.type):
                logits = model(batch.to(device) if device.type != "cpu" else batch).float().cpu()
            segments = None
            if segment_by is not None:
                segments = torch.from_numpy(reader.dataset.column(reader.split, segment_by, batch.rows.numpy()))
            metrics.update(logits, batch.labels, segments)
        values = metrics.compute()
    model.train(was_training)
    return values


def evaluate_true_probability(
    reader: Reader, *, batch_size: int = 65536, directory: Path | None = None
) -> MetricValues | None:
    """Measure the probability that the labels were drawn from, where the data holds it: no model can be better."""
    if PROBABILITY not in reader.dataset.info.extra:
        return None
    with BinaryMetrics(directory) as metrics:
        for start in range(0, reader.num_rows, batch_size):
            rows = np.arange(start, min(start + batch_size, reader.num_rows))
            probability = torch.from_numpy(reader.dataset.column(reader.split, PROBABILITY, rows)).double()
            labels = torch.from_numpy(reader.dataset.column(reader.split, LABEL, rows)).float()
            metrics.update(torch.logit(probability), labels)
        return metrics.compute()
