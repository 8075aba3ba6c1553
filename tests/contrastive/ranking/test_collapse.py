"""Models that have come to nothing end with a line that says what to change, and those that rank are left alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contrastive.build import build_model
from contrastive.config import SequenceRunConfig
from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, generate_sequences
from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.mclrec_config import MclrecConfig
from contrastive.next_item import NextItem
from contrastive.ranking.collapse import complain, is_at_chance
from contrastive.ranking.ranking_metrics import RankingMetrics, RankingValues
from dlrm.config import GuardConfig, StepConfig
from dlrm.training.trainer import Trainer

NUM_ITEMS, USERS, GUARDS = 200, 300, GuardConfig()
SMALL = SequenceRunConfig(
    epochs=3,
    dim=8,
    encoder=EncoderConfig(layers=1, inner=16, dropout=0.1, attention_dropout=0.1),
    mclrec=MclrecConfig(augmenter_widths=(8,)),
    step=StepConfig(global_batch_size=128, threads=1, device="cpu"),
)


def rank(vectors: torch.Tensor, items: torch.Tensor, targets: torch.Tensor) -> RankingValues:
    metrics = RankingMetrics(NUM_ITEMS)
    metrics.update(vectors, items, targets)
    return metrics.compute()


@pytest.fixture
def items() -> torch.Tensor:
    return torch.randn(NUM_ITEMS + 1, 16)


@pytest.fixture
def targets() -> torch.Tensor:
    return torch.randint(1, NUM_ITEMS + 1, (USERS,))


def test_a_model_that_ranks_is_left_alone(items: torch.Tensor, targets: torch.Tensor) -> None:
    found = rank(items[targets] + 3 * torch.randn(USERS, 16), items, targets)
    assert found.recall[50] < 0.75
    assert not is_at_chance(found, NUM_ITEMS)
    assert complain(found, NUM_ITEMS, 0, GUARDS, last=True) is None


def test_guesses_are_told_from_a_little_knowledge(items: torch.Tensor, targets: torch.Tensor) -> None:
    guesses = rank(torch.randn(USERS, 16), items, targets)
    assert is_at_chance(guesses, NUM_ITEMS)
    assert complain(guesses, NUM_ITEMS, 2, GUARDS, last=True) is None
    line = complain(guesses, NUM_ITEMS, 3, GUARDS)
    assert line is not None
    assert line.startswith("on 300 users, recall is no better than that of items drawn at random")
    assert f"@50 {guesses.recall[50]:.4f} (0.2500), in 3 evaluations in a row; lower --dense.learning-rate" in line
    assert complain(guesses, NUM_ITEMS, 9, replace(GUARDS, chance_evaluations=0)) is None


def test_the_same_list_for_everybody_is_a_collapse_however_popular_it_is(
    items: torch.Tensor, targets: torch.Tensor
) -> None:
    vectors = torch.randn(16).expand(USERS, 16) + 1e-6 * torch.randn(USERS, 16)
    popular = (vectors @ items[1:].T).mean(0).topk(20).indices + 1
    targets = popular[targets % 20]
    found = rank(vectors, items, targets)
    assert found.recall[50] == 1.0
    assert is_at_chance(found, NUM_ITEMS)
    assert complain(found, NUM_ITEMS, 2, GUARDS) is None
    for evaluations, last in ((3, False), (2, True)):
        line = complain(found, NUM_ITEMS, evaluations, GUARDS, last=last)
        assert line is not None
        assert line.startswith(f"all of 300 users are told the same 10 items, in {evaluations} evaluations in a row; ")
    assert not is_at_chance(replace(found, filtered=True), NUM_ITEMS)  # lists are then without what each has seen


def test_scores_that_are_all_alike_end_a_run_at_once(items: torch.Tensor, targets: torch.Tensor) -> None:
    found = rank(torch.randn(USERS, 16), items[:1].expand(NUM_ITEMS + 1, 16), targets)
    line = complain(found, NUM_ITEMS, 0, GUARDS)
    assert line is not None
    assert line.startswith("199 of 200 items score what the right one does, as the mean over 300 users")
    assert complain(found, NUM_ITEMS, 0, replace(GUARDS, constant_prediction=False)) is None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    config = SyntheticSequencesConfig(num_users=200, num_items=60, num_tastes=4, mean_actions=6.0, most_actions=20)
    return generate_sequences(config, tmp_path_factory.mktemp("sequences") / "data")


def test_an_absurd_learning_rate_ends_in_one_line(world: SequenceDataset, tmp_path: Path) -> None:
    config = replace(SMALL, dense=replace(SMALL.dense, learning_rate=1e20))
    line = r"^expected a finite loss, got .* first in the output of 'model.encoder.*; lower --dense.learning-rate"
    with pytest.raises(ValueError, match=line) as caught:
        Trainer(build_model(config, world), NextItem(world, config), config, tmp_path / "run").fit()
    assert "\n" not in str(caught.value)


def test_an_encoder_that_says_the_same_of_everybody_ends_in_one_line(world: SequenceDataset, tmp_path: Path) -> None:
    """As one does whose rate was too high; that itself comes out otherwise with the last bits of a product."""
    config = replace(SMALL, dense=replace(SMALL.dense, learning_rate=1e-12))
    model = build_model(config, world)
    norm = model.encoder.networks[-1].norm
    torch.nn.init.zeros_(norm.weight)
    torch.nn.init.ones_(norm.bias)
    line = r"^all of 200 users are told the same 10 items, in 3 evaluations in a row; lower --dense.learning-rate"
    with pytest.raises(ValueError, match=line) as caught:
        Trainer(model, NextItem(world, config), config, tmp_path / "run").fit()
    assert "\n" not in str(caught.value)


def test_weights_that_diverge_in_the_last_step_are_told(world: SequenceDataset, tmp_path: Path) -> None:
    config = replace(SMALL, epochs=0.1, mclrec=MclrecConfig(contrast="none"))  # one batch, in one pass
    config = replace(config, dense=replace(config.dense, learning_rate=1e30))
    with pytest.raises(
        ValueError, match=r"expected (finite numbers|scores that float32 can hold), got .*--dense.learning"
    ):
        Trainer(build_model(config, world), NextItem(world, config), config, tmp_path / "run").fit()
