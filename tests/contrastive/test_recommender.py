"""A run is asked by name: what it recommends is what its best weights rank first, and who is unknown is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
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
from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.checkpoints.run_state import take_model
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
    """A run whose sequences were named as they lay from where it was started."""
    folder = tmp_path_factory.mktemp("recommender")
    config = SyntheticSequencesConfig(num_users=100, num_items=40, num_tastes=4, mean_actions=8.0, most_actions=20)
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        world = generate_sequences(config, Path("data"))
        Trainer(build_model(CONFIG, world), NextItem(world, CONFIG), CONFIG, Path("run"), recipe="test").fit()
    return folder / "run"


@pytest.fixture
def longer_run(run: Path, tmp_path: Path) -> Path:
    """The same run with a later checkpoint, which is not the best one, and whose weights are others."""
    world = SequenceDataset(run.parent / "data")
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    others = take_model(build_model(replace(CONFIG, seed=1), world))
    store = CheckpointStore(copy / "checkpoints")
    store.save({**others, "progress": {"dataset": world.fingerprint}}, samples=10**6)
    store.wait()
    return copy


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ids of items that training never saw: the last four."""
    counts = np.array([0] + 36 * [1] + 4 * [0])
    monkeypatch.setattr(SequenceDataset, "item_counts", counts)
    return [37, 38, 39, 40]


def test_the_best_weights_are_asked_and_not_the_last(run: Path, longer_run: Path) -> None:
    best, last = sorted((longer_run / "checkpoints").iterdir())
    expected = Recommender(run).recommend(["user-0"])
    assert Recommender(longer_run).recommend(["user-0"]) == Recommender(best).recommend(["user-0"]) == expected
    assert Recommender(last).recommend(["user-0"]) != expected


def test_a_damaged_best_checkpoint_is_an_error(longer_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best, last = sorted((longer_run / "checkpoints").iterdir())
    file = best / "tables.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert main(["recommend", str(longer_run), "--user", "user-0"]) == 2
    out, err = capsys.readouterr()
    assert "expected an intact best checkpoint" in err
    assert not out
    assert main(["recommend", str(last), "--user", "user-0"]) == 0


def test_a_run_that_was_never_measured_is_asked_as_it_is(longer_run: Path) -> None:
    best, last = sorted((longer_run / "checkpoints").iterdir())
    expected = Recommender(last).recommend(["user-0"])
    shutil.rmtree(best)
    assert Recommender(longer_run).recommend(["user-0"]) == expected


def test_what_training_never_saw_is_left_out(run: Path, unseen: list[int]) -> None:
    recommender = Recommender(run)
    recommender.rows[unseen] = 100 * recommender.rows[1]  # whatever its score, one of both signs is the best
    recommender.rows[unseen[:2]] *= -1
    strange = {recommender.dataset.item_name(item) for item in unseen}
    seen = recommender.dataset.item_name(1)
    for keep, expected in ((False, 36), (True, 40)):
        found = {name for name, _ in recommender.recommend(["user-1"], 40, keep_seen=True, keep_unseen=keep)[0]}
        near = {name for name, _ in recommender.nearest([seen], 40, keep_unseen=keep)[0]}
        assert len(found) == len(near) + 1 == expected
        assert strange <= found & near if keep else not strange & (found | near)
    with pytest.raises(ValueError, match=r"--item: expected items that training saw, got .*; --keep-unseen takes"):
        recommender.nearest([min(strange)])
    assert recommender.nearest([min(strange)], keep_unseen=True)[0]


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
    assert "--user: expected one of the 100 users (like 'user-0'), got 'nobody'" in capsys.readouterr().err
    assert main(["nearest", str(run), "--item", "nothing"]) == 2
    assert "--item: expected one of the 40 items" in capsys.readouterr().err
    for command, flag in (("recommend", "--user"), ("nearest", "--item")):
        assert main([command, str(run), flag]) == 2
        assert f"{flag}: expected at least one name, got none" in capsys.readouterr().err
    assert main(["recommend", str(run.parent / "data"), "--user", "0"]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err


def test_sequences_that_have_gone_are_named_by_a_flag(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user,item\n")
    assert main(["recommend", str(run), "--user", "user-0", "--data", str(log)]) == 2
    assert "--data: expected the folder of prepared sequences" in capsys.readouterr().err
    data = Path(shutil.copytree(run.parent / "data", tmp_path / "data"))
    assert main(["recommend", str(run), "--user", "user-0", "--data", str(data)]) == 0
