"""What scaling has done to a configuration, as a table for the terminal, and what of it is likely to hurt, in words."""

from __future__ import annotations

from collections.abc import Sequence

from dlrm.config import TrainingConfig
from dlrm.optim.scaling import Change
from dlrm.optim.scaling_rules import LINEAR_UP_TO

FEWEST_UPDATES = 1500  # with fewer, no rates reached a small batch's AUC on our synthetic log
LONGEST_WARMUP = 0.5  # of a run


def describe_changes(config: TrainingConfig, changes: Sequence[Change]) -> list[str]:
    """Return a headline and a line per hyperparameter: flag, before, after, reason.

    Args:
        config: as scaled.
        changes: as `scale_config` returns them.
    """
    if not changes:
        return []
    ratio = config.step.global_batch_size / (config.scale_from or 1)
    headline = (
        f"batch size {config.scale_from:,} -> {config.step.global_batch_size:,} (k = {ratio:g}), "
        f"--rule {config.rule or 'auto'}, "
        + (f"--rules {' '.join(config.rules)}, " if config.rules else "")
        + f"--match {config.match}"
    )
    cells = [("", "before", "after", "why")]
    for change in changes:
        cells.append((change.flag, _show(change.before), _show(change.after), change.reason or "unchanged"))
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    rows = [
        f"  {flag:{widths[0]}}  {before:>{widths[1]}}  {after:>{widths[2]}}  {why}"
        for flag, before, after, why in cells
    ]
    return [headline, *rows]


def find_doubts(config: TrainingConfig, train_rows: int) -> list[str]:
    """Return what is likely to hurt quality, a sentence each with what helps.

    Args:
        config: as scaled.
        train_rows: of an epoch.
    """
    size = config.step.global_batch_size
    ratio = size / (config.scale_from or size)
    total = config.epochs * train_rows
    doubts = []
    if (updates := total / size) < FEWEST_UPDATES:
        more = "or more epochs" if config.match == "updates" else "or --match updates"
        doubts.append(
            f"{updates:,.0f} updates are few: below about {FEWEST_UPDATES:,}, better rates no longer make up for them; "
            f"take a batch of at most {max(1, int(total / FEWEST_UPDATES)):,}, {more}"
        )
    for name in ("dense_schedule", "tables_schedule"):
        if (warm := getattr(config, name).warm_after) > LONGEST_WARMUP * total:
            doubts.append(
                f"the warm-up of --{name.replace('_', '-')} takes {warm:,.0f} of the run's {total:,.0f} samples"
                f"{', more than there are' if warm > total else ''}; shorten it, or the peak rate is hardly used"
            )
    if config.match == "updates" and config.epochs > 1:
        doubts.append(
            f"{config.epochs:g} epochs show every row the same samples again, and rare rows learn them by heart: watch "
            "the logloss of the valid split, and raise --tables.weight-decay or stop early with --evaluation.patience"
        )
    if config.rule == "linear" and ratio > LINEAR_UP_TO:
        doubts.append(f"linear scaling is known to diverge from k = {LINEAR_UP_TO:g} to 16 on; --rule sqrt is safer")
    if config.rule == "none" and ratio >= 4:
        doubts.append("rates of the small batch learn too little in fewer steps; --rule auto or sqrt is a better start")
    if config.rule == "adascale" and ratio > 1:
        doubts.append(
            f"schedules advance by the measured gain, which may be far below k = {ratio:g}: then the run ends before "
            "they do; adascale_progress in metrics.jsonl says how far they came"
        )
    if config.rule == "sde" and ratio > 10:
        doubts.append("a moment that forgets so much faster hardly averages: at k = 10, a beta of .9 is 0")
    return doubts


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_show, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str("-" if value in (None, "") else value)
