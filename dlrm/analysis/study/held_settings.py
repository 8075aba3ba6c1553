"""What a batch-size study does not tune goes with the batch size where its meaning does: rows' eps and l2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dlrm.config import RunConfig
from dlrm.optim.scaling import scale_config


def set_batch_size(run: RunConfig, batch_size: int) -> RunConfig:
    """Return a run with another batch size, whose rows are told the same.

    Gradients are those of the mean over the batch, so that a rare row's are k times smaller in a batch k times as
    large: their eps is divided by k, as the rule `auto` has it, and l2, which k times fewer steps apply, multiplied by
    it, as published for CowClip. All else stays as it is.

    Args:
        run: its numbers suit its batch size.
        batch_size: the new one.
    """
    ratio = batch_size / run.step.global_batch_size
    step = replace(run.step, global_batch_size=batch_size)
    if ratio == 1:
        return run
    ruled, _ = scale_config(replace(run, step=step, scale_from=run.step.global_batch_size, rule="auto"))
    tables = replace(run.tables, eps=ruled.tables.eps, l2=_times(run.tables.l2, ratio))
    small = replace(run.small_tables, eps=ruled.small_tables.eps, l2=_times(run.small_tables.l2, ratio))
    return replace(run, step=step, tables=tables, small_tables=small)


def list_held(run: RunConfig, batch_size: int) -> Iterator[tuple[str, float]]:
    """List the settings that another batch size changes, and their values."""
    at = set_batch_size(run, batch_size)
    for group in ("tables", "small_tables"):
        for option in ("eps", "l2"):
            value = getattr(getattr(at, group), option)
            if value is not None and value != getattr(getattr(run, group), option):
                yield f"{group}.{option}", value


def _times(number: float | None, factor: float) -> float | None:
    return None if number is None else factor * number
