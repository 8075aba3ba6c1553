"""The synthetic world does what it says, is the same each time, and no ranking is better than the known best."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.data.sequence_schema import SequenceSchema, SequenceSplit
from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, SyntheticWorld, generate_sequences

CONFIG = SyntheticSequencesConfig(num_users=1500, num_items=120, num_tastes=6, seed=3)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return generate_sequences(CONFIG, tmp_path_factory.mktemp("synthetic") / "data")


def test_users_follow_successors_and_tastes(generated: SequenceDataset) -> None:
    world = SyntheticWorld(CONFIG)
    actions = generated.actions - 1
    pairs = np.flatnonzero(np.diff(np.repeat(np.arange(CONFIG.num_users), generated.lengths)) == 0)
    before, after = actions[pairs], actions[pairs + 1]
    followed = (world.successors[before] == after[:, None]).any(axis=1)
    users = np.repeat(np.arange(CONFIG.num_users), generated.lengths)[pairs]
    liked = (world.tastes[users] == world.group_of[after][:, None]).any(axis=1)
    # successors that were seen before are passed over, others are liked as well, and tastes hit successors by chance
    assert 0.5 < followed.mean() < 0.7
    assert 0.85 < liked[~followed].mean() < 1.0
    assert liked[followed].mean() < 0.6
    seen = np.split(actions, generated.first_actions[1:])
    assert all(len(set(part.tolist())) == len(part) for part in seen)


def test_the_best_ranking_beats_popularity_and_cannot_be_beaten(generated: SequenceDataset) -> None:
    world = SyntheticWorld(CONFIG)
    best = (world.best_ranks(generated, "test") < 10).mean()
    targets = generated.targets("test", np.arange(generated.rows("test")))
    popular = np.isin(targets, np.argsort(-generated.item_counts)[:10]).mean()
    assert best > popular + 0.4
    # one who knows the last item alone ranks worse than one who knows the taste besides
    last = generated.samples("test", np.arange(generated.rows("test")), 1).histories.items - 1
    followed = (world.successors[last] == (targets - 1)[:, None]).any(axis=1).mean()
    assert followed < best


def test_probabilities_are_what_is_drawn() -> None:
    config = SyntheticSequencesConfig(num_users=4000, num_items=12, num_tastes=2, mean_actions=4, most_actions=6)
    world = SyntheticWorld(config)
    data = world.draw()
    firsts = data.actions[data.offsets[:-1]] - 1
    nothing = np.zeros((config.num_users, config.num_items), dtype=bool)
    expected = world.probabilities(np.arange(config.num_users), np.full(config.num_users, -1), nothing).sum(axis=0)
    assert np.abs(np.bincount(firsts, minlength=12) - expected).max() < 5 * np.sqrt(expected.max())
    seconds, seen = data.actions[data.offsets[:-1] + 1] - 1, nothing.copy()
    seen[np.arange(config.num_users), firsts] = True
    expected = world.probabilities(np.arange(config.num_users), firsts, seen).sum(axis=0)
    assert np.abs(np.bincount(seconds, minlength=12) - expected).max() < 5 * np.sqrt(expected.max())


def test_equal_configurations_give_equal_bytes(generated: SequenceDataset, tmp_path: Path) -> None:
    again = generate_sequences(CONFIG, tmp_path / "again")
    assert again.info.files == generated.info.files
    assert generate_sequences(CONFIG, tmp_path / "again").fingerprint == again.fingerprint
    other = SyntheticSequencesConfig(num_users=1500, num_items=120, num_tastes=6, seed=4)
    assert (
        generate_sequences(other, tmp_path / "other").info.files["actions.arrow"] != again.info.files["actions.arrow"]
    )
    with pytest.raises(ValueError, match=r"prepared from other input \(differs in synthetic\)"):
        generate_sequences(other, tmp_path / "again")


def test_side_feature_and_times(generated: SequenceDataset, tmp_path: Path) -> None:
    world = SyntheticWorld(CONFIG)
    assert (generated.sides["taste"].values == world.group_of + 2).all()
    split = SequenceSchema(split=SequenceSplit(by="time"))
    by_time = generate_sequences(CONFIG, tmp_path / "by_time", split)
    assert min(by_time.info.samples.values()) > 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_tastes": 1}, "2 <= num_tastes <= num_items"),
        ({"mean_actions": 2.0}, "3 <= mean_actions"),
        ({"follow": 0.7}, r"follow \+ like < 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticSequencesConfig(**settings)
