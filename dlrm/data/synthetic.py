"""A click log of our own making: training needs no download, and the best AUC any model can reach is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dlrm.data.dataset import DESCRIPTION, Bags, Dataset, DatasetInfo, FeatureInfo, IntArray, Part, PartInfo, write_part
from dlrm.data.synthetic_world import (
    CLOCK,
    COLUMNS,
    DAYS,
    INTERCEPT,
    NUMBERS,
    PAIRS,
    RANK,
    TREND,
    Floats,
    Ids,
    Vocabulary,
    draw_numbers,
    numeric_logits,
)

SPLITS = ("train", "valid", "test")
EXTRA = ("time", "probability")


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """How much to generate.

    Attributes:
        num_train: rows of the training part, the oldest.
        num_valid: rows that follow it in time.
        num_test: rows that follow these.
        seed: of everything; equal configurations give equal bytes.
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
        for name, least in {
            "num_train": 1,
            "num_valid": 0,
            "num_test": 0,
            "seed": 0,
            "max_ids": 1,
            "rows_per_part": 1,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"synthetic data: expected {name} >= {least}, got {getattr(self, name)}")

    @property
    def rows(self) -> dict[str, int]:
        """Rows of each split, in order of time."""
        return dict(zip(SPLITS, (self.num_train, self.num_valid, self.num_test), strict=True))


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
    origin = {"synthetic": asdict(config)}
    if (out / DESCRIPTION).is_file():
        present = Dataset(out)
        if present.info.origin == json.loads(json.dumps(origin)):
            return present
        raise ValueError(f"{out} holds another dataset; name another folder or remove this one")
    log = ClickLog(config)
    places = [(split, part) for split in SPLITS for part in range(-(-config.rows[split] // config.rows_per_part))]
    splits: dict[str, tuple[PartInfo, ...]] = {split: () for split in SPLITS if config.rows[split]}
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="synthetic") as pool:
        written = pool.map(lambda place: write_part(out, *place, log.draw_part(*place)), places)
        done = 0
        for (split, _), info in zip(places, written, strict=True):
            splits[split] += (info,)
            done += info.rows
            if progress:
                progress(done, sum(config.rows.values()))
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
        for vocabulary in self._vocabularies:
            vocabulary.row_of_id  # noqa: B018  computed once, before threads share it
        by_name = {column.name: vocabulary for column, vocabulary in zip(COLUMNS, self._vocabularies, strict=True)}
        self._meetings: list[dict[str, Floats]] = []
        for index, (first, second, weight) in enumerate(PAIRS):
            rng = np.random.default_rng([config.seed, 2, index])
            left, right = (by_name[name].draw_effects(rng, RANK) for name in (first, second))
            self._meetings.append({first: left * np.float32(weight / RANK**0.5), second: right})
        numbers = draw_numbers(self._rng("train", 0, 0), min(config.num_train, config.rows_per_part))
        self._means, self._deviations = np.nanmean(numbers, axis=0), np.nanstd(numbers, axis=0) + np.float32(1e-6)

    def describe(self, splits: dict[str, tuple[PartInfo, ...]], origin: dict[str, object]) -> DatasetInfo:
        """Return the contents of `dataset.json` for these parts."""
        firsts = dict(zip(SPLITS, np.cumsum([0, self.config.num_train, self.config.num_valid]), strict=True))
        days = DAYS / self._total
        return DatasetInfo(
            numeric=tuple(number.name for number in NUMBERS)
            + tuple(f"{number.name}:missing" for number in NUMBERS if number.missing is not None),
            features=tuple(
                FeatureInfo(name=column.name, num_rows=ids.num_rows, is_list=column.mean_length is not None)
                for column, ids in zip(COLUMNS, self._vocabularies, strict=True)
            ),
            splits=splits,
            time_ranges={
                split: (float(firsts[split] * days), float((firsts[split] + self.config.rows[split]) * days))
                for split in splits
            },
            extra=EXTRA,
            origin=origin,
        )

    def draw_part(self, split: str, part: int) -> Part:
        """Return the rows of one part, in order of time."""
        before = sum(self.config.rows[earlier] for earlier in SPLITS[: SPLITS.index(split)])
        first = before + part * self.config.rows_per_part
        rows = min(self.config.rows_per_part, before + self.config.rows[split] - first)
        values = draw_numbers(self._rng(split, part, 0), rows)
        rng = self._rng(split, part, 1)
        when = (first + np.arange(rows) + rng.random(rows)) / self._total
        absent = np.isnan(values)
        values = np.where(absent, np.float32(0), (values - self._means) / self._deviations)
        logits = numeric_logits(values, absent) + (INTERCEPT + TREND * (0.5 - when)).astype(np.float32)
        features: dict[str, IntArray | Bags] = {}
        waiting: dict[int, Floats] = {}
        for vocabulary in self._vocabularies:
            ids, offsets = self._draw_ids(rng, vocabulary, when)
            name = vocabulary.column.name
            rows_of_ids = vocabulary.row_of_id[ids]
            features[name] = rows_of_ids if offsets is None else Bags(offsets=offsets, values=rows_of_ids)
            logits += _pool(vocabulary.own[ids], offsets)
            for index, sides in enumerate(self._meetings):
                if name in sides:
                    side = _pool(sides[name][ids], offsets)
                    if index in waiting:
                        logits += (waiting.pop(index) * side).sum(axis=1)
                    else:
                        waiting[index] = side
        probability = (1 / (1 + np.exp(-logits))).astype(np.float32)
        return Part(
            label=(rng.random(rows, dtype=np.float32) < probability).astype(np.uint8),
            numeric=np.hstack([values, absent[:, [number.missing is not None for number in NUMBERS]]]),
            features=features,
            extra={"time": when * DAYS, "probability": probability},
        )

    def _draw_ids(self, rng: np.random.Generator, vocabulary: Vocabulary, when: Floats) -> tuple[Ids, Ids | None]:
        """Return ids, and for a list column the offsets of each row's."""
        column, rows = vocabulary.column, len(when)
        if column.name == CLOCK:
            return (when * DAYS * 24).astype(np.int64) % vocabulary.ids, None
        present = rng.random(rows, dtype=np.float32) >= column.missing
        offsets = None
        if column.mean_length:
            offsets = np.append(0, np.cumsum((1 + rng.poisson(column.mean_length - 1, rows)) * present))
        cumulative = np.cumsum(vocabulary.popularity(float(when[len(when) // 2])))
        draws = rng.random(rows if offsets is None else offsets[-1]) * cumulative[-1]
        ids = np.searchsorted(cumulative, draws, side="right")
        return (np.where(present, ids, vocabulary.ids) if offsets is None else ids), offsets

    def _rng(self, split: str, part: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, 3, SPLITS.index(split), part, purpose])


def _pool(values: Floats, offsets: Ids | None) -> Floats:
    """Return the sum of each bag, or the values as they are if there is one per row."""
    if offsets is None:
        return values
    sums = np.concatenate([np.zeros_like(values[:1], dtype=np.float64), np.cumsum(values, axis=0, dtype=np.float64)])
    return (sums[offsets[1:]] - sums[offsets[:-1]]).astype(np.float32)
