"""A click log of our own making: training needs no download, and the best AUC any model can reach is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.data.dataset import DESCRIPTION, Bags, Dataset, DatasetInfo, FeatureInfo, IntArray, Part, PartInfo, write_part
from dlrm.data.synthetic_world import (
    CLOCK,
    COLUMNS,
    DAYS,
    NUMBERS,
    PAIRS,
    RANK,
    Bools,
    Doubles,
    Floats,
    Ids,
    Vocabulary,
    base_logits,
    draw_numbers,
    numeric_logits,
)

SPLITS = ("train", "valid", "test")
EXTRA = ("time", "probability")
FITTED_ROWS = 100_000


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """How much to generate.

    Attributes:
        num_train: rows of the training part, the oldest.
        num_valid: rows that follow it in time.
        num_test: rows that follow these.
        seed: of everything; equal configurations give equal bytes, with the same numpy.
        max_ids: of one feature.
        rows_per_part: rows of one file; what is in memory at a time is a small multiple of it.
    """

    num_train: int = 1_500_000
    num_valid: int = 100_000
    num_test: int = 200_000
    seed: int = 0
    max_ids: int = 100_000
    rows_per_part: int = 100_000

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"SyntheticConfig: expected {name} >= {least}, got {getattr(self, name)}")

    @property
    def rows(self) -> dict[str, int]:
        """Rows of each split, in order of time."""
        return dict(zip(SPLITS, (self.num_train, self.num_valid, self.num_test), strict=True))

    @property
    def first_rows(self) -> dict[str, int]:
        """Rows before each split."""
        return dict(zip(SPLITS, (0, self.num_train, self.num_train + self.num_valid), strict=True))


_LEAST = {"num_train": 1, "num_valid": 0, "num_test": 0, "seed": 0, "max_ids": 2, "rows_per_part": 1}


def generate(
    config: SyntheticConfig, out: Path, *, progress: Callable[[int, int], None] | None = None, threads: int = 2
) -> Dataset:
    """Write a synthetic click log as a prepared dataset, or open it if it is there already.

    Args:
        config: what to generate.
        out: folder to write.
        progress: called with (rows written, rows in all) after each part.
        threads: parts in work at a time.

    Raises:
        ValueError: `out` holds another dataset.
    """
    origin: dict[str, Any] = {"synthetic": asdict(config)}
    if (out / DESCRIPTION).is_file():
        present = Dataset(out)
        if present.info.origin == json.loads(json.dumps(origin)):
            return present
        raise ValueError(f"expected no dataset or the same one in {out}, found another; name another folder")
    log = ClickLog(config)
    places = [(split, part) for split in SPLITS for part in range(-(-config.rows[split] // config.rows_per_part))]
    splits: dict[str, tuple[PartInfo, ...]] = {split: () for split in SPLITS if config.rows[split]}
    done, total = 0, sum(config.rows.values())
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="synthetic") as pool:
        parts = pool.map(lambda place: write_part(out, place[0], place[1], log.draw_part(*place)), places)
        try:
            for (split, _), info in zip(places, parts, strict=True):
                splits[split] += (info,)
                done += info.rows
                if progress:
                    progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupted run does not draw what is still queued
    log.describe(splits, origin).write(out)
    return Dataset(out)


class ClickLog:
    """Draws the parts of a log; each is a pure function of (config, split, number of the part).

    Args:
        config: sizes and seed.
    """

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        self._total = sum(config.rows.values())
        self._vocabularies = [
            Vocabulary(
                column,
                index,
                seed=config.seed,
                num_train=config.num_train,
                train_share=config.num_train / self._total,
                max_ids=config.max_ids,
            )
            for index, column in enumerate(COLUMNS)
        ]
        by_name = {vocabulary.column.name: vocabulary for vocabulary in self._vocabularies}
        self._pairs: list[dict[str, Floats]] = []
        for index, (first, second, weight) in enumerate(PAIRS):
            rng = np.random.default_rng([config.seed, 2, index])
            left, right = (by_name[name].draw_effects(rng, RANK) for name in (first, second))
            self._pairs.append({first: left * np.float32(weight / RANK**0.5), second: right})
        # Numbers do not drift: any sample has the training part's means, and no held-out row is looked at.
        sample = draw_numbers(np.random.default_rng([config.seed, 4]), FITTED_ROWS)
        self._means, self._deviations = np.nanmean(sample, axis=0), np.nanstd(sample, axis=0)

    def describe(self, splits: dict[str, tuple[PartInfo, ...]], origin: dict[str, Any]) -> DatasetInfo:
        """Return the contents of `dataset.json` for these parts."""
        starts, days = self.config.first_rows, DAYS / self._total
        return DatasetInfo(
            numeric=tuple(
                name
                for number in NUMBERS
                for name in ((number.name,) if number.missing is None else (number.name, f"{number.name}:missing"))
            ),
            features=tuple(
                FeatureInfo(
                    name=vocabulary.column.name,
                    num_rows=vocabulary.num_rows,
                    is_list=vocabulary.column.mean_length is not None,
                )
                for vocabulary in self._vocabularies
            ),
            splits=splits,
            time_ranges={
                split: (starts[split] * days, (starts[split] + self.config.rows[split]) * days) for split in splits
            },
            extra=EXTRA,
            origin=origin,
        )

    def draw_part(self, split: str, part: int) -> Part:
        """Return the rows of one part, in order of time."""
        config = self.config
        start = part * config.rows_per_part
        rows = min(config.rows_per_part, config.rows[split] - start)
        rng = self._rng(split, part, 0)
        when = (config.first_rows[split] + start + np.arange(rows) + rng.random(rows)) / self._total
        values = draw_numbers(self._rng(split, part, 1), rows)
        absent = np.isnan(values)
        values = np.where(absent, np.float32(0), (values - self._means) / self._deviations)
        features, logits = self._draw_features(rng, when)
        logits += numeric_logits(values, absent) + base_logits(when)
        probability = 1 / (1 + np.exp(-logits))
        return Part(
            label=(rng.random(rows, dtype=np.float32) < probability).astype(np.uint8),
            numeric=_interleave(values, absent),
            features=features,
            extra={"time": when * DAYS, "probability": probability},
        )

    def _draw_features(self, rng: np.random.Generator, when: Doubles) -> tuple[dict[str, IntArray | Bags], Floats]:
        """Return the table rows of every column, and what the ids add to the logits."""
        features: dict[str, IntArray | Bags] = {}
        logits = np.zeros(len(when), dtype=np.float32)
        waiting: dict[int, Floats] = {}
        for vocabulary in self._vocabularies:
            name = vocabulary.column.name
            ids, offsets = _draw_ids(rng, vocabulary, when)
            table_rows = vocabulary.row_of_id[ids]
            features[name] = table_rows if offsets is None else Bags(offsets=offsets, values=table_rows)
            logits += _pool(vocabulary.own[ids], offsets)
            for index, sides in enumerate(self._pairs):
                if name not in sides:
                    continue
                side = _pool(sides[name][ids], offsets)
                if index in waiting:
                    logits += np.einsum("ij,ij->i", waiting.pop(index), side)
                else:
                    waiting[index] = side
        return features, logits

    def _rng(self, split: str, part: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, 3, SPLITS.index(split), part, purpose])


def _draw_ids(rng: np.random.Generator, vocabulary: Vocabulary, when: Doubles) -> tuple[Ids, Ids | None]:
    """Return the ids at times `when`, and for a list column where each row's begin and end."""
    column, rows = vocabulary.column, len(when)
    if column.name == CLOCK:
        return (when * DAYS * 24).astype(np.int64) % vocabulary.ids, None
    absent = rng.random(rows, dtype=np.float32) < column.missing
    if column.mean_length is None:
        offsets, count, absent_places = None, rows, np.flatnonzero(absent)
    else:
        offsets = np.append(0, np.cumsum(np.where(absent, 1, rng.poisson(column.mean_length, rows))))
        count, absent_places = int(offsets[-1]), offsets[:-1][absent]
    # Counts of independent draws, in random order, are independent draws, and cheaper than inverting a distribution.
    counts = rng.multinomial(count, vocabulary.popularity(float(when[rows // 2])))
    ids = np.repeat(np.arange(vocabulary.ids), counts)
    rng.shuffle(ids)
    ids[absent_places] = vocabulary.ids
    return ids, offsets


def _pool(effects: Floats, offsets: Ids | None) -> Floats:
    """Return the sum over each bag, or the effects as they are where there is one id per row."""
    if offsets is None:
        return effects
    sums = np.zeros((len(effects) + 1, *effects.shape[1:]))
    np.cumsum(effects, axis=0, dtype=np.float64, out=sums[1:])
    return np.asarray(sums[offsets[1:]] - sums[offsets[:-1]], dtype=np.float32)


def _interleave(values: Floats, absent: Bools) -> Floats:
    """Return the numeric columns, each that may be missing with its indicator behind it."""
    columns = [
        column
        for index, number in enumerate(NUMBERS)
        for column in ((values[:, index],) if number.missing is None else (values[:, index], absent[:, index]))
    ]
    return np.stack(columns, axis=1).astype(np.float32, copy=False)
