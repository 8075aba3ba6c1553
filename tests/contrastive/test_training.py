"""Recommenders of sequences in the loop: they learn, go on where they stopped, and are trained by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from contrastive.build import build_model
from contrastive.config import RankingEvaluationConfig, SequenceConfig, SequenceRunConfig
from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, generate_sequences
from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.mclrec_config import MclrecConfig
from contrastive.next_item import NextItem
from contrastive.sequence_batch import Histories
from deploy.cli import main
from dlrm.checkpoints.state_tree import flatten
from dlrm.config import CheckpointConfig, StepConfig
from dlrm.training.trainer import Trainer
from embeddings.allocation import FreeMemory

SMALL = SequenceRunConfig(
    epochs=2,
    dim=16,
    encoder=EncoderConfig(inner=32, dropout=0.1, attention_dropout=0.1),
    mclrec=MclrecConfig(augmenter_widths=(8,)),
    step=StepConfig(global_batch_size=128, threads=1),
    evaluation=RankingEvaluationConfig(batch_size=64),
    checkpoint=CheckpointConfig(every_samples=500),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    config = SyntheticSequencesConfig(num_users=300, num_items=60, num_tastes=4, mean_actions=8.0, most_actions=20)
    return generate_sequences(config, tmp_path_factory.mktemp("sequences") / "data")


def make_trainer(world: SequenceDataset, config: SequenceRunConfig, output: Path) -> Trainer:
    return Trainer(build_model(config, world), NextItem(world, config), config, output, recipe="test")


def train(world: SequenceDataset, config: SequenceRunConfig, output: Path) -> dict[str, object]:
    return make_trainer(world, config, output).fit()


def last_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What the last checkpoint holds: weights, rows, moments of all optimizers, and the state of generators."""
    saved = trainer.checkpoints.restore_latest()
    assert saved is not None
    groups = flatten(saved.state).tensors
    return {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}


def test_mclrec_beats_popularity_and_writes_what_a_report_needs(world: SequenceDataset, tmp_path: Path) -> None:
    config = replace(SMALL, epochs=6, tables=replace(SMALL.tables, learning_rate=5e-3))
    summary = train(world, config, tmp_path / "run")
    targets = world.targets("test", torch.arange(world.rows("test")).numpy())
    most_popular = torch.from_numpy(world.item_counts.copy()).topk(10).indices
    by_popularity = torch.isin(torch.from_numpy(targets), most_popular).double().mean().item()
    assert by_popularity + 0.1 < summary["recall_10"] < summary["best_recall_10"]
    assert summary["filter_seen"] is False
    ranked = summary["ranked"]
    assert ranked["filtered/recall@10"] >= ranked["unfiltered/recall@10"] == summary["recall_10"]
    assert json.loads((tmp_path / "run" / "embedding_space.json").read_text())["alignment"] >= 0
    assert main(["report", str(tmp_path / "run")]) == 0
    assert f"best possible {summary['best_recall_10']:.4f}" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("form", ["three_step", "two_step", "joint"])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not(world: SequenceDataset, tmp_path: Path, form: str) -> None:
    config = replace(SMALL, mclrec=replace(SMALL.mclrec, form=form, views_weight=0.1))
    whole = make_trainer(world, config, tmp_path / "whole")
    summary = whole.fit()
    cut = replace(config, epochs=1024 / world.rows("train"))  # between two batches
    train(world, cut, tmp_path / "cut")
    again = make_trainer(world, config, tmp_path / "cut")
    resumed = again.fit()
    same = {name: value for name, value in summary.items() if name.startswith(("recall", "ndcg", "mrr"))}
    assert same == {name: resumed[name] for name in same}
    ends = last_tensors(whole), last_tensors(again)
    assert ends[0].keys() == ends[1].keys()
    assert [name for name, tensor in ends[0].items() if not torch.equal(tensor, ends[1][name])] == []
    kinds = ("weight", "first_moment", "exp_avg")
    assert all(any(kind in name for name in ends[0]) for kind in kinds), sorted(ends[0])


def test_a_sampled_softmax_and_second_views_of_the_same_target_learn(world: SequenceDataset, tmp_path: Path) -> None:
    config = replace(
        SMALL,
        sequence=SequenceConfig(negatives=20, second_view="same_target", max_length=10),
        mclrec=MclrecConfig(contrast="views", views_weight=0.1),
    )
    assert train(world, config, tmp_path / "run")["recall_10"] > 0.17  # a guess has 10 of 60


def test_memory_is_handed_back_while_training(
    world: SequenceDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_back = []
    monkeypatch.setattr("embeddings.allocation._hand_back", lambda: handed_back.append(True))
    trainer = make_trainer(world, replace(SMALL, epochs=1), tmp_path / "run")
    trainer.free_memory = FreeMemory(every_seconds=0.0)
    trainer.fit()
    assert len(handed_back) == -(-world.rows("train") // SMALL.step.global_batch_size)


def test_a_recipe_is_trained_by_name(
    world: SequenceDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(world.folder), "--output", str(tmp_path / "run"), "--epochs", "1", "--dim", "16"]
    assert main(["train", "sasrec", *flags, "--step.threads", "1"]) == 0
    told = capsys.readouterr().out
    assert "all items ranked, seen items ranked too" in told
    assert "(best possible 0." in told


def test_a_model_of_another_catalogue_is_refused(world: SequenceDataset, tmp_path: Path) -> None:
    other = generate_sequences(
        SyntheticSequencesConfig(num_users=50, num_items=40, num_tastes=4, mean_actions=8.0, most_actions=20),
        tmp_path / "other",
    )
    with pytest.raises(ValueError, match="table 'item': expected 61 rows"):
        Trainer(build_model(SMALL, other), NextItem(world, SMALL), SMALL, tmp_path / "run")


def test_a_history_of_nothing_is_no_hidden_item(world: SequenceDataset) -> None:
    """It is encoded by what it holds, not as a history whose items are all hidden."""
    model = build_model(SMALL, world).eval()
    rows = torch.randn(world.num_items + 1, SMALL.dim)
    empty, shown = (Histories(torch.tensor([place]), torch.tensor([1])) for place in (0, 7))
    hidden = Histories(torch.tensor([0, 0]), torch.tensor([2]))
    beside = Histories(torch.tensor([3, 0, 0, 0]), torch.tensor([1, 1, 2]))
    one, all_three = model.encode(rows, empty)[0], model.encode(rows, beside)[0]
    assert torch.allclose(all_three[1:2], one, atol=1e-6)
    assert torch.allclose(all_three[2:3], model.encode(rows, hidden)[0], atol=1e-6)
    assert not torch.allclose(one, model.encode(rows, hidden)[0], atol=1e-3)
    rows[0] = rows[7]
    assert torch.allclose(model.encode(rows, empty)[0], model.encode(rows, shown)[0], atol=1e-6)


def test_first_actions_are_learned(tmp_path: Path) -> None:
    made = SyntheticSequencesConfig(num_users=200, num_items=60, num_tastes=4, mean_actions=8.0, most_actions=20)
    users = generate_sequences(made, tmp_path / "made")
    lists = [" ".join(map(str, users.histories(np.array([user])).items)) for user in range(users.info.num_users)]
    (tmp_path / "log.txt").write_text("".join(f"{user} {items}\n" for user, items in enumerate(lists)))
    flags = ["--data", str(tmp_path / "log.txt"), "--output", str(tmp_path / "run"), "--dim", "16", "--epochs", "2"]
    assert main(["train", "mclrec", *flags, "--schema.first-actions", "--step.threads", "1"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["samples"] == 2 * (users.rows("train") + users.rows("test"))  # one more for each user
