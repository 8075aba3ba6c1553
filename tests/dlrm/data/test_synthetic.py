"""The synthetic log is what it says: its probabilities are true, its ids are Zipf, it drifts, it is reproducible."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import OneHotEncoder

from dlrm.data.dataset import Bags, Dataset
from dlrm.data.reader import Reader
from dlrm.data.schema import MISSING_ROW, OUT_OF_VOCABULARY_ROW
from dlrm.data.synthetic import SPLITS, SyntheticConfig, generate
from dlrm.data.synthetic_world import COLUMNS, NUMBERS, PAIRS

CONFIG = SyntheticConfig(num_train=60_000, num_valid=5_000, num_test=15_000, rows_per_part=20_000, seed=3)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return generate(CONFIG, tmp_path_factory.mktemp("synthetic") / "data")


def labels(log: Dataset, split: str) -> np.ndarray:
    return np.concatenate([log.part(split, i).label for i in range(len(log.info.splits[split]))])


def column(log: Dataset, name: str, split: str = "train") -> np.ndarray:
    return log.column(split, name, np.arange(log.rows(split)))


def ids(log: Dataset, name: str, split: str = "train") -> np.ndarray:
    parts = [log.part(split, i).features[name] for i in range(len(log.info.splits[split]))]
    return np.concatenate([part.values if isinstance(part, Bags) else part for part in parts])


def test_has_the_rows_and_columns_that_were_asked_for(log):
    assert [log.rows(split) for split in SPLITS] == [60_000, 5_000, 15_000]
    assert [len(log.info.splits[split]) for split in SPLITS] == [3, 1, 1]
    assert len(log.info.features) == 26
    assert [name for name in log.info.numeric if not name.endswith(":missing")] == [number.name for number in NUMBERS]
    assert len(NUMBERS) == 13
    assert sum(feature.is_list for feature in log.info.features) == 3
    log.verify()


def test_equal_configurations_give_equal_bytes_whatever_the_threads(log, tmp_path):
    again = generate(CONFIG, tmp_path / "again", threads=1)
    assert again.info.splits == log.info.splits
    one, other = (
        generate(SyntheticConfig(num_train=1_000, num_valid=0, num_test=0, seed=seed), tmp_path / f"seed {seed}")
        for seed in (1, 2)
    )
    assert one.info.splits != other.info.splits


def test_every_part_is_drawn_anew(log):
    one, other = log.part("train", 0), log.part("train", 1)
    assert not np.array_equal(one.numeric, other.numeric)
    assert np.corrcoef(one.features["user"], other.features["user"])[0, 1] < 0.05
    assert np.corrcoef(one.extra["probability"], other.extra["probability"])[0, 1] < 0.05


def test_labels_are_drawn_from_the_known_probability(log):
    """Hosmer and Lemeshow: over 20 bins, squared deviations of the clicks follow chi square with 20 degrees."""
    for split in ("train", "test"):
        probability, label = column(log, "probability", split), labels(log, split)
        bins = np.array_split(np.argsort(probability), 20)
        chi_square = sum(
            (label[rows].sum() - probability[rows].sum()) ** 2 / (probability[rows] * (1 - probability[rows])).sum()
            for rows in bins
        )
        assert 0.001 < stats.chi2.cdf(chi_square, df=20) < 0.999
        logit = np.log(probability / (1 - probability))
        # Score tests: neither a shift nor a stretch of the logits explains the clicks better.
        for direction in (np.ones_like(logit), logit):
            score = (direction * (label - probability)).sum()
            assert abs(score) < 3 * np.sqrt((direction**2 * probability * (1 - probability)).sum())


def test_no_score_beats_the_known_probability(log):
    probability, label = column(log, "probability", "test"), labels(log, "test")
    best = roc_auc_score(label, probability)
    logit = np.log(probability / (1 - probability))
    noise = np.random.default_rng(0).standard_normal(len(logit))
    blurred = [roc_auc_score(label, logit + blur * noise) for blur in (0.25, 0.5, 1.0)]
    assert best > blurred[0] > blurred[1] > blurred[2]
    assert 0.78 < best < 0.86
    assert 0.15 < label.mean() < 0.27


def test_most_of_what_can_be_known_is_out_of_reach_without_interactions(log):
    """A logistic regression falls short, and the planted pairs of ids explain what it leaves over."""
    pair = PAIRS[0][:2]
    singles = [f.name for f in log.info.features if not f.is_list and f.num_rows < 3_000]
    encoder = OneHotEncoder(handle_unknown="ignore")
    x = {split: np.stack([column(log, name, split) for name in singles], axis=1) for split in ("train", "test")}
    model = LogisticRegression(C=0.1, max_iter=200).fit(encoder.fit_transform(x["train"]), labels(log, "train"))
    score = model.decision_function(encoder.transform(x["test"]))
    auc, best = (roc_auc_score(labels(log, "test"), s) for s in (score, column(log, "probability", "test")))
    assert auc > 0.58
    assert (auc - 0.5) / (best - 0.5) < 0.75

    left, right = (column(log, name) for name in pair)
    probability = column(log, "probability")
    logit = np.log(probability / (1 - probability))
    planted, none = (_interaction(logit, one, other) for one, other in ((left, right), (left, column(log, "browser"))))
    assert planted > 0.3
    assert abs(none) < 0.1


def _interaction(logit: np.ndarray, left: np.ndarray, right: np.ndarray) -> float:
    """Return the deviation of the interaction of two columns' ten first ids in a logit, without sampling noise."""
    cells = np.array([[logit[(left == i) & (right == j)] for j in range(2, 12)] for i in range(2, 12)], dtype=object)
    means = np.vectorize(np.mean, otypes=[float])(cells)
    effects = means - means.mean(axis=0) - means.mean(axis=1, keepdims=True) + means.mean()
    errors = np.vectorize(lambda cell: cell.var() / len(cell), otypes=[float])(cells)
    square = (effects**2).sum() / 81 - errors.mean()
    return float(np.sign(square) * np.sqrt(abs(square)))


def test_ids_are_zipf_and_lie_inside_their_tables(log):
    rows = {feature.name: feature.num_rows for feature in log.info.features}
    for described in COLUMNS:
        for split in SPLITS:
            seen = ids(log, described.name, split)
            assert seen.min() >= 0
            assert seen.max() < rows[described.name] <= described.ids + 2
    assert rows["connection"] == 5
    assert max(rows.values()) > 3_000
    counts = np.bincount(ids(log, "item_brand"), minlength=rows["item_brand"])[2:]
    places = np.array([1, 2, 4, 8, 16, 32, 64, 128])
    slope = np.polyfit(np.log(places + 1), np.log([counts[place - 1 : 2 * place - 1].mean() for place in places]), 1)[0]
    assert -1.4 < slope < -0.8


def test_rare_and_new_ids_share_the_row_out_of_vocabulary(log):
    unknown = {split: (ids(log, "user", split) == OUT_OF_VOCABULARY_ROW).mean() for split in ("train", "test")}
    assert 0.02 < unknown["train"] < unknown["test"] < 0.5
    counts = np.bincount(ids(log, "user"))[2:]
    assert counts[-200:].mean() > 1, "an id with a row of its own is seen about twice or more"
    assert not (ids(log, "hour") == OUT_OF_VOCABULARY_ROW).any()


def test_values_are_missing_as_often_as_described_and_not_at_random(log):
    for described in COLUMNS:
        share = (ids(log, described.name) == MISSING_ROW).sum() / log.rows("train")
        assert share == pytest.approx(described.missing, abs=0.01)
    part = log.part("train", 0)
    for name, values in zip(log.info.numeric, part.numeric.T, strict=True):
        assert np.isfinite(values).all()
        if name.endswith(":missing"):
            place = log.info.numeric.index(name)
            absent = values == 1
            assert 0.02 < absent.mean() < 0.6
            assert set(np.unique(values)) == {0, 1}
            assert (part.numeric[absent, place - 1] == 0).all()
    absent = part.numeric[:, log.info.numeric.index("seconds_since_view:missing")]
    active = part.numeric[:, log.info.numeric.index("views_week")]
    assert active[absent == 1].mean() > active[absent == 0].mean() + 0.1


def test_numbers_are_standardised(log):
    numbers = np.concatenate([log.part("train", i).numeric for i in range(3)])
    for place, name in enumerate(log.info.numeric):
        indicator = f"{name}:missing"
        if indicator in log.info.numeric:
            present = numbers[numbers[:, place + 1] == 0, place]
        elif not name.endswith(":missing"):
            present = numbers[:, place]
        else:
            continue
        assert present.mean() == pytest.approx(0, abs=0.03)
        assert present.std() == pytest.approx(1, abs=0.03)


def test_clicks_become_rarer_and_popularity_moves(log):
    time, label = column(log, "time"), labels(log, "train")
    assert (np.diff(time) > 0).mean() > 0.4
    assert time.min() >= log.info.time_ranges["train"][0] == 0
    assert time.max() < log.info.time_ranges["train"][1] < log.info.time_ranges["test"][1] == 10
    first, last = label[:15_000].mean(), labels(log, "test").mean()
    error = np.sqrt(2 * 0.25 * 0.75 / 15_000)
    assert first - last > 4 * error

    seen = ids(log, "advertiser")
    early, late = (np.bincount(part, minlength=seen.max() + 1)[2:30] for part in (seen[:20_000], seen[-20_000:]))
    _, p_value, _, _ = stats.chi2_contingency(np.stack([early, late]))
    assert p_value < 1e-6
    order = np.random.default_rng(0).permutation(seen)
    early, late = (np.bincount(part, minlength=seen.max() + 1)[2:30] for part in (order[:20_000], order[-20_000:]))
    assert stats.chi2_contingency(np.stack([early, late]))[1] > 1e-3


def test_some_ids_appear_on_the_way(log):
    appeared = 0
    for name in ("publisher", "site_section", "advertiser", "campaign", "item_category"):
        seen = ids(log, name)
        early, late = (np.bincount(part, minlength=seen.max() + 1)[2:] for part in (seen[:20_000], seen[-20_000:]))
        appeared += ((early == 0) & (late > 20)).sum()
    assert appeared > 3


def test_the_clock_says_which_hour_it_is(log):
    hour = (column(log, "time") * 24).astype(int) % 24
    assert np.array_equal(ids(log, "hour"), hour + 2)


def test_list_columns_hold_bags_of_many_lengths(log):
    for described in COLUMNS:
        bags = log.part("train", 0).features[described.name]
        assert isinstance(bags, Bags) == (described.mean_length is not None)
        if isinstance(bags, Bags):
            lengths = np.diff(bags.offsets)
            expected = described.missing + (1 - described.missing) * described.mean_length
            assert lengths.mean() == pytest.approx(expected, rel=0.05)
            assert lengths.min() == 0
            assert lengths.max() > 2 * described.mean_length


def test_the_reader_gives_back_what_was_drawn(log):
    reader = Reader(log, "train", shuffle=True, seed=5)
    seen = []
    for batch in reader.batches(7_000, stop=reader.num_rows):
        rows = batch.rows.numpy()
        seen.append(rows)
        assert np.array_equal(batch.labels.numpy(), labels(log, "train")[rows])
        assert np.array_equal(batch.sparse["user"].values().numpy(), column(log, "user")[rows])
        lengths = np.concatenate([np.diff(log.part("train", i).features["interests"].offsets) for i in range(3)])
        assert np.array_equal(batch.sparse["interests"].lengths().numpy(), lengths[rows])
        assert batch.dense.shape == (len(rows), len(log.info.numeric))
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(60_000))


def test_what_is_there_is_opened_and_never_overwritten(log):
    assert generate(CONFIG, log.folder).fingerprint == log.fingerprint
    with pytest.raises(ValueError, match="found another; name another folder"):
        generate(SyntheticConfig(num_train=10, num_valid=0, num_test=0), log.folder)


def test_an_interrupted_generation_leaves_no_dataset_and_can_be_repeated(tmp_path):
    class Interrupted(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert 0 < done <= total
        raise Interrupted

    config = SyntheticConfig(num_train=3_000, num_valid=1_000, num_test=1_000, rows_per_part=100, max_ids=100)
    with pytest.raises(Interrupted):
        generate(config, tmp_path / "data", progress=stop, threads=1)
    assert len(list(tmp_path.rglob("*.arrow"))) < 50, "what was queued is not drawn"
    assert not (tmp_path / "data" / "dataset.json").exists()
    calls: list[tuple[int, int]] = []
    again = generate(config, tmp_path / "data", progress=lambda *call: calls.append(call))
    assert calls == [(done, 5_000) for done in range(100, 5_001, 100)]
    again.verify()
    assert json.loads((tmp_path / "data" / "dataset.json").read_text())["origin"]["synthetic"]["num_train"] == 3_000


@pytest.mark.parametrize(
    "sizes", [{"num_train": 1}, {"num_train": 1, "max_ids": 2}, {"num_train": 50, "rows_per_part": 7}]
)
def test_tiny_logs_are_whole(tmp_path: Path, sizes: dict[str, int]):
    log = generate(SyntheticConfig(**{"num_valid": 0, "num_test": 1, **sizes}), tmp_path / "data")
    assert log.rows("train") == sizes["num_train"]
    assert "valid" not in log.info.splits
    probability = column(log, "probability")
    assert ((probability > 0) & (probability < 1)).all()


@pytest.mark.parametrize(
    ("setting", "value"), [("num_train", 0), ("num_test", -1), ("max_ids", 1), ("rows_per_part", 0), ("seed", -1)]
)
def test_impossible_sizes_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} >= .*, got {value}"):
        SyntheticConfig(**{setting: value})
