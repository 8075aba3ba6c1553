"""Chooses what a first training run of an unknown log starts from, by the number of its training rows."""

from __future__ import annotations

from dataclasses import dataclass

STEPS_PER_EPOCH, STEPS, EPOCHS_MOST = 200, 500, 5
BATCH_LEAST, BATCH_MOST = 64, 4096
LEARNING_RATE, EPS = 0.03, 1e-8


@dataclass(frozen=True, kw_only=True)
class FirstSettings:
    """Of `[train]`, where it differs from one log to the next.

    Attributes:
        batch_size: samples per step.
        epochs: passes over the training rows.
        learning_rate: of the rows of tables.
        eps: of row-wise Adagrad; a small one was better than a large one on logs of 3,000 to 200,000 rows.
    """

    batch_size: int
    epochs: int
    learning_rate: float = LEARNING_RATE
    eps: float = EPS


def choose_settings(training_rows: int) -> FirstSettings:
    """Return settings under which a model takes enough steps to learn something, of batches no smaller than need be.

    One epoch of the defaults' large batches is but a few steps on a small log, after which a model is where it began.
    """
    batch_size = 1 << max(training_rows // STEPS_PER_EPOCH, 1).bit_length() - 1
    batch_size = min(max(batch_size, BATCH_LEAST), BATCH_MOST)
    steps = max(training_rows // batch_size, 1)
    return FirstSettings(batch_size=batch_size, epochs=min(-(-STEPS // steps), EPOCHS_MOST))
