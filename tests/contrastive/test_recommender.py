"""A run is asked by name: what it recommends is what its best weights rank first, and who is unknown is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from contrastive.build import build_model
from contrastive.config import SequenceRunConfig
from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, generate_sequences
from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.mclrec_config import MclrecConfig
from contrastive.next_item import NextItem
from contrastive.recommender import Recommender
from contrastive.sequence_batch import Histories
from deploy.cli import main
from dlrm.config import StepConfig
from dlrm.training.trainer import Trainer

CONFIG = SequenceRunConfig(
    epochs=1,
    dim=16,
    encoder=EncoderConfig(inner=32),
    mclrec=MclrecConfig(contrast="none"),
    step=StepConfig(global_batch_size=128, threads=1),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recommender")
    config = SyntheticSequencesConfig(num_users=100, num_items=40, num_tastes=4, mean_actions=8.0, most_actions=20)
    world = generate_sequences(config, folder / "data")
    Trainer(build_model(CONFIG, world), NextItem(world, CONFIG), CONFIG, folder / "run", recipe="test").fit()
    return folder / "run"


def test_what_is_recommended_ranks_first(run: Path) -> None:
    recommender = Recommender(run)
    world: SequenceDataset = recommender.dataset
    for user in (0, 7):
        history = world.histories(np.array([user]))
        with torch.no_grad():
            asked = Histories(torch.from_numpy(history.items), torch.from_numpy(history.lengths))
            vector = recommender.model.encode(recommender.rows, asked)[0][0]
        scores = recommender.rows @ vector
        scores[0] = -torch.inf
        everything = [world.item_name(int(item)) for item in scores.argsort(descending=True)[:5]]
        scores[history.items] = -torch.inf
        new = [world.item_name(int(item)) for item in scores.argsort(descending=True)[:5]]
        name = world.user_name(user)
        assert [item for item, _ in recommender.recommend([name], 5)[0]] == new
        assert [item for item, _ in recommender.recommend([name], 5, keep_seen=True)[0]] == everything


def test_the_command_line_asks_for_users_and_items(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recommender = Recommender(run)
    user, item = recommender.dataset.user_name(3), recommender.dataset.item_name(5)
    assert main(["recommend", str(run), "--user", user, "--count", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    expected = recommender.recommend([user], 3)[0]
    assert [(each["item"], each["score"]) for each in told["items"]] == expected
    assert main(["nearest", str(run), "--item", item, "--count", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"item {item}"
    assert [line.split()[-1] for line in lines[1:]] == [name for name, _ in recommender.nearest([item], 2)[0]]


def test_who_is_unknown_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", str(run), "--user", "nobody"]) == 2
    assert "got 'nobody'" in capsys.readouterr().err
    assert main(["recommend", str(run.parent / "data"), "--user", "0"]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err
