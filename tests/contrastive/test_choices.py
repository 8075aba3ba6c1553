"""Flags of negatives and of unseen items reach what they speak of, and combinations that say nothing are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from contrastive.build import build_model
from contrastive.command import SEQUENCES_RUNS
from contrastive.config import RankingEvaluationConfig, SequenceConfig, SequenceRunConfig
from contrastive.data.negatives import NegativesConfig
from contrastive.data.prepare_sequences import prepare_sequences
from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.data.sequence_schema import SequenceSchema, SequenceSplit
from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.mclrec_config import MclrecConfig
from contrastive.next_item import NextItem
from contrastive.recipes import RECIPES
from contrastive.recommender import Recommender
from deploy.cli import main
from dlrm.cli import parse
from dlrm.config import GuardConfig, StepConfig
from dlrm.distributed.process_group import Group
from dlrm.distributed.ranks import ALONE
from dlrm.training.run_log import read_records
from dlrm.training.trainer import Trainer

TINY = SequenceRunConfig(
    epochs=1,
    dim=8,
    encoder=EncoderConfig(inner=16, dropout=0.1, attention_dropout=0.1),  # all of so short a vector may be dropped
    mclrec=MclrecConfig(contrast="none"),
    step=StepConfig(global_batch_size=64, threads=1),
    guards=GuardConfig(chance_evaluations=0),  # there is nothing to learn
)
RAN = {"split": "test", "samples": 1, "seconds": 1.0, "samples_per_second": 1.0, "stopped": "", "folder": "run"}
NEW = 41  # items from here on are in nobody's training part


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty users, every third of whom ends with items that nobody trains on."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("choices") / "log.txt"
    lists = [[*rng.integers(1, NEW, 6), *((NEW, NEW + 1) if user % 3 == 0 else (1, 2))] for user in range(60)]
    lines = [f"u{user} {' '.join(map(str, items))}\n" for user, items in enumerate(lists)]
    file.write_text("".join(lines), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def dataset(source: Path) -> SequenceDataset:
    return prepare_sequences(SequenceSchema(), [source], source.parent / "data")


def parse_flags(*flags: str) -> SequenceRunConfig:
    return parse(SEQUENCES_RUNS.config, flags, program="recforge", default=RECIPES["sasrec"].config)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), None),
        (("--sequence.negatives", "9"), NegativesConfig(count=9, power=0.0, in_batch=True)),
        (("--sequence.negatives", "0"), NegativesConfig(count=0, power=0.0, in_batch=True)),
        (
            ("--sequence.negatives", "9", "--sequence.negatives-power", "0.75", "--sequence.no-in-batch-negatives"),
            NegativesConfig(count=9, power=0.75, in_batch=False),
        ),
    ],
)
def test_negatives_are_those_of_the_flags(
    dataset: SequenceDataset, flags: tuple[str, ...], expected: NegativesConfig | None
) -> None:
    config = parse_flags(*flags)
    problem = NextItem(dataset, config)
    sampler = problem.reader("train", config).negatives
    assert (sampler and sampler.config) == expected
    assert problem.reader("valid", config).negatives is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negatives": -1}, r"--sequence\.negatives: expected at least 0, or None, got -1"),
        (
            {"negatives": 0, "in_batch_negatives": False},
            r"--sequence\.negatives: expected at least 1 without those of the batch, got 0",
        ),
        ({"negatives": 5, "negatives_power": 2.5}, r"--sequence\.negatives-power: expected 0 to 2, got 2\.5"),
        ({"negatives_power": 0.5}, r"--sequence\.negatives-power: expected --sequence\.negatives beside it"),
        ({"in_batch_negatives": False}, r"--sequence\.no-in-batch-negatives: expected --sequence\.negatives beside it"),
    ],
)
def test_negatives_that_cannot_be(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceConfig(**settings)


def test_unseen_items_leave_histories_that_are_ranked(dataset: SequenceDataset) -> None:
    for is_skipped, last in ((False, NEW), (True, None)):
        config = replace(TINY, sequence=SequenceConfig(skip_unseen=is_skipped))
        history = NextItem(dataset, config).reader("test", config).read(0, 1).history
        known = dataset.actions[:6].tolist()
        assert history.places.tolist() == ([*known, last] if last else known)


def test_only_targets_that_training_saw_are_measured(dataset: SequenceDataset, tmp_path: Path) -> None:
    config = replace(TINY, evaluation=RankingEvaluationConfig(skip_unseen_targets=True, batch_size=7))
    trainer = Trainer(build_model(config, dataset), NextItem(dataset, config), config, tmp_path / "run")
    reader = trainer.problem.reader("test", config)
    values = trainer.problem.measure(trainer.model, reader, config, trainer.place)
    trainer.model.eval()
    batch = reader.read(0, 60)
    with torch.no_grad():
        scores = trainer.model(batch).double() @ trainer.model.rows(batch).double().T
    scores[:, 0] = -torch.inf
    own = scores.gather(1, batch.targets.unsqueeze(1))
    hits = ((scores >= own).sum(1) <= 10)[batch.targets < NEW]
    assert values.samples == len(hits) == 40
    assert values.ranking.recall[10] == pytest.approx(hits.double().mean().item())
    described = trainer.problem.describe(values, config)
    assert described["skip_unseen_targets"] is True
    for said in (trainer.problem.tell(values), SEQUENCES_RUNS.describe({**RAN, **described})):
        assert "seen items ranked too, targets that training saw alone" in said
    names = values.ranking.named()
    assert "unfiltered-trained-targets/recall@10" in names
    assert all(name.startswith("unfiltered-trained-targets/") for name in names)


def test_a_split_of_unseen_targets_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("a 1 2 1 3 4\nb 2 1 2 5 6\n")
    dataset = prepare_sequences(SequenceSchema(), [tmp_path / "log.txt"], tmp_path / "data")
    config = replace(TINY, evaluation=RankingEvaluationConfig(skip_unseen_targets=True))
    problem, model = NextItem(dataset, config), build_model(config, dataset)
    with pytest.raises(ValueError, match=r"--evaluation\.skip-unseen-targets: expected targets of the valid split"):
        problem.check(model, config)


def test_who_is_asked_for_is_known_by_what_training_saw(source: Path, dataset: SequenceDataset, tmp_path: Path) -> None:
    flags = ["--data", str(dataset.folder), "--dim", "8", "--epochs", "1", "--step.threads", "1"]
    run = tmp_path / "run"
    assert main(["train", "sasrec", *flags, "--sequence.skip-unseen", "--output", str(run)]) == 0
    recommender = Recommender(run)
    with torch.no_grad():
        known = torch.from_numpy(dataset.actions[:6].astype(np.int64))
        vector = recommender.model.encoder(recommender.rows[known], torch.tensor([6]), known == 0)[0]
    best = (recommender.rows @ vector)[1:].argsort(descending=True)[:3] + 1
    found = recommender.recommend(["u0"], 3, keep_seen=True, keep_unseen=True)[0]
    assert [name for name, _ in found] == [dataset.item_name(int(item)) for item in best]


def test_a_run_with_drawn_items_ends_without_a_test_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = [f"u{user},{rng.integers(1, 9)},{time}" for user in range(30) for time in range(8)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,time", *rows]) + "\n")
    schema = SequenceSchema(time="time", split=SequenceSplit(by="time", valid=0.2, test=0.0))
    dataset = prepare_sequences(schema, [tmp_path / "log.csv"], tmp_path / "data")
    mclrec = MclrecConfig(contrast="views", views_weight=0.1)
    config = replace(TINY, sequence=SequenceConfig(negatives=4), mclrec=mclrec)
    summary = Trainer(build_model(config, dataset), NextItem(dataset, config), config, tmp_path / "run").fit()
    assert summary["split"] == "valid"
    assert json.loads((tmp_path / "run" / "embedding_space.json").read_text())["alignment"] >= 0


def test_a_run_goes_on_that_began_before_there_was_a_setting(dataset: SequenceDataset, tmp_path: Path) -> None:
    def make(config: SequenceRunConfig) -> Trainer:
        return Trainer(build_model(config, dataset), NextItem(dataset, config), config, tmp_path / "run")

    make(TINY).fit()
    path = tmp_path / "run" / "config.json"
    settings = json.loads(path.read_text())
    del settings["sequence"]["in_batch_negatives"]
    path.write_text(json.dumps(settings))
    make(replace(TINY, epochs=2)).fit()
    path.write_text(json.dumps(settings))
    other = replace(TINY, sequence=SequenceConfig(negatives=3, in_batch_negatives=False))
    with pytest.raises(ValueError, match=r"holds a run with sequence\.in_batch_negatives = True, got False"):
        make(other)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_run_goes_on_that_began_on_another_device(dataset: SequenceDataset, tmp_path: Path, device: str) -> None:
    def make(config: SequenceRunConfig) -> Trainer:
        return Trainer(build_model(config, dataset), NextItem(dataset, config), config, tmp_path / "run")

    make(TINY).fit()
    path = tmp_path / "run" / "config.json"
    settings = json.loads(path.read_text())
    settings["step"]["device"] = device
    path.write_text(json.dumps(settings))
    assert make(replace(TINY, epochs=2)).fit()["samples"] == 2 * dataset.rows("train")


@pytest.mark.parametrize(("dim", "items"), [(1, [1, 2, 3, 1, 2]), (8, [1] * 5)])
def test_a_run_ends_whose_space_is_no_plane(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dim: int, items: list[int]
) -> None:
    lines = [f"u{user} {' '.join(map(str, items))}\n" for user in range(9)]
    (tmp_path / "log.txt").write_text("".join(lines))
    dataset = prepare_sequences(SequenceSchema(), [tmp_path / "log.txt"], tmp_path / "data")
    config = replace(TINY, dim=dim, encoder=replace(TINY.encoder, heads=1))
    summary = Trainer(build_model(config, dataset), NextItem(dataset, config), config, tmp_path / "run").fit()
    assert summary["samples"] == dataset.rows("train")
    told = capsys.readouterr().err
    assert f"no picture of the space, which takes two items and --dim 2: {max(items)} items, --dim {dim}\n" in told
    assert not (tmp_path / "run" / "embedding_space.json").exists()


def test_a_second_order_run_needs_no_other_flag(dataset: SequenceDataset, tmp_path: Path) -> None:
    config = replace(TINY, dim=64, epochs=0.2, mclrec=MclrecConfig(second_order=True))
    trainer = Trainer(build_model(config, dataset), NextItem(dataset, config), config, tmp_path / "run")
    trainer.fit()
    first, *_ = (record for record in read_records(tmp_path / "run") if record["kind"] == "train")
    assert first["augmenters_loss"] > 0


def test_a_second_order_run_that_diverges_says_so(dataset: SequenceDataset, tmp_path: Path) -> None:
    tables = replace(TINY.tables, learning_rate=1e18)
    config = replace(TINY, tables=tables, mclrec=MclrecConfig(second_order=True, augmenter_widths=(4,)))
    trainer = Trainer(build_model(config, dataset), NextItem(dataset, config), config, tmp_path / "run")
    with pytest.raises(ValueError, match="expected a finite loss"):
        trainer.fit()


@pytest.mark.parametrize("is_there", [True, False])
def test_a_gpu_without_a_part_is_told_of(
    dataset: SequenceDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    is_there: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    group = cast("Group", SimpleNamespace(ranks=ALONE))
    SEQUENCES_RUNS.build("sasrec", TINY, tmp_path / "run", dataset, group)
    assert ("the GPU here is not used" in capsys.readouterr().err) == is_there
