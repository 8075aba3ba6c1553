"""What batches ask of tables, against counting by hand in prepared data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dlrm.config import TablesConfig
from dlrm.data.dataset import Bags, Dataset, DatasetInfo
from dlrm.data.synthetic import SyntheticConfig, generate
from dlrm.descriptions import describe_tables
from dlrm.planning.statistics import measure_usage


def bags_of(dataset: Dataset, name: str) -> list[np.ndarray]:
    """Read all training bags of a feature one by one."""
    bags = []
    for part in range(len(dataset.info.splits["train"])):
        column = dataset.part("train", part).features[name]
        if isinstance(column, Bags):
            bags += [column.values[a:b] for a, b in zip(column.offsets[:-1], column.offsets[1:], strict=True)]
        else:
            bags += [np.array([i]) for i in column]
    return bags


def test_ids_bags_and_places_are_those_of_the_training_samples(click_log: Dataset) -> None:
    configs = describe_tables(click_log.info, 16, TablesConfig())
    usage = measure_usage(click_log, configs, 1024)
    assert usage.global_batch_size == 1024
    assert usage.id_bytes == 4
    lengths = set()
    for config in configs:
        bags, found = bags_of(click_log, config.name), usage.of(config)
        ids = np.concatenate(bags)
        lengths |= {len(bag) for bag in bags}
        assert len(bags) == 12_000
        assert found.ids_per_sample == pytest.approx(len(ids) / len(bags))
        assert found.bags_per_sample == pytest.approx(sum(len(bag) > 0 for bag in bags) / len(bags))
        assert found.distinct[-1] == (len(ids), len(np.unique(ids)))
        half = config.num_rows // 2
        below = found.share_of_rows(np.array([0, half]), np.array([half, config.num_rows - half]), config.num_rows)
        steps = len(found.traffic) - 1
        exact = [(ids < half).mean(), (ids >= half).mean()]
        slack = max(np.bincount(ids * steps // config.num_rows)) / len(ids) if half * steps % config.num_rows else 1e-9
        assert below == pytest.approx(exact, abs=slack)
    assert {0, 1, 3} <= lengths


def test_distinct_rows_of_a_batch_are_those_of_shuffled_batches(click_log: Dataset) -> None:
    configs = describe_tables(click_log.info, 16, TablesConfig())
    usage, random = measure_usage(click_log, configs, 1024), np.random.default_rng(5)
    for config in configs:
        bags = bags_of(click_log, config.name)
        drawn = [np.concatenate([bags[i] for i in random.permutation(len(bags))[:1024]]) for _ in range(5)]
        found = np.mean([len(np.unique(ids)) for ids in drawn])
        expected = usage.of(config).distinct_rows(1024 * usage.of(config).ids_per_sample, config.num_rows)
        assert expected == pytest.approx(found, rel=0.2), config.name


def test_the_same_data_give_the_same_figures(click_log: Dataset) -> None:
    configs = describe_tables(click_log.info, 16, TablesConfig())
    assert measure_usage(click_log, configs, 64) == measure_usage(Dataset(click_log.folder), configs, 64)


def test_only_some_samples_of_large_data_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SyntheticConfig(num_train=6_000, num_valid=100, num_test=100, max_ids=100, rows_per_part=500)
    dataset = generate(config, tmp_path / "data")
    configs = describe_tables(dataset.info, 4, TablesConfig())
    monkeypatch.setattr("dlrm.planning.statistics.SAMPLES", 800)
    usage = measure_usage(dataset, configs, 64)
    assert {usage.of(c).distinct[-1][0] for c in configs if c.name in ("user", "hour")} == {800.0}


def test_rare_shapes(make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset(np.array([1.0]), np.array([3]), num_rows=4)
    (config,) = describe_tables(dataset.info, 4, TablesConfig())
    found = measure_usage(dataset, [config], 8).of(config)
    assert (found.ids_per_sample, found.bags_per_sample, found.distinct) == (1, 1, ())
    assert found.traffic == (0, 0, 0, 0, 1)


def test_data_without_training_samples_are_an_error(click_log: Dataset, tmp_path: Path) -> None:
    info = DatasetInfo(numeric=click_log.info.numeric, features=click_log.info.features, splits={"train": ()})
    (tmp_path / "empty").mkdir()
    info.write(tmp_path / "empty")
    dataset = Dataset(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"expected rows in the split 'train' of .*, got none"):
        measure_usage(dataset, describe_tables(dataset.info, 4, TablesConfig()), 8)
