"""A run that an older version began goes on, and can be left by a branch: what it was not told had its default."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dlrm.checkpoints.optimizer_state import load_optimizer
from dlrm.config import EvaluationConfig, GuardConfig, StepConfig, TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.model import DLRM
from dlrm.optim.config import DenseOptimizerConfig, HeadConfig
from dlrm.optim.dense import build_dense_optimizer
from dlrm.training.adversarial_config import AdversarialConfig
from dlrm.training.run_config import CONFIG
from dlrm.training.snapshot import Snapshot
from dlrm.training.trainer import Trainer

CONFIGURATION = TrainingConfig(
    epochs=0.25,
    dense=DenseOptimizerConfig(name="adam", learning_rate=0.01),
    step=StepConfig(global_batch_size=500, device="cpu"),
    evaluation=EvaluationConfig(every_samples=1500, test_best=False),
    guards=GuardConfig(chance_evaluations=0),
)
NEW = ("growth", "noise_scale", "adversarial", "plateau", "curvature_rate", "rule", "match", "head", "branch_from")


def _two_groups(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state as it was saved once: matrices and vectors, without names of groups."""
    groups = state["param_groups"]
    pairs = [(n, key) for group in groups for n, key in zip(group["param_names"], group["params"], strict=True)]
    split = [[(n, key) for n, key in pairs if n.endswith("weight")], [(n, key) for n, key in pairs if "bias" in n]]
    options = {option: value for option, value in groups[0].items() if option != "name"}
    numbers = {key: index for index, (_, key) in enumerate(pair for part in split for pair in reversed(part))}
    return {
        "state": {numbers[key]: value for key, value in state["state"].items()},
        "param_groups": [
            {**options, "params": [numbers[key] for _, key in part[::-1]], "param_names": [n for n, _ in part[::-1]]}
            for part in split
        ],
    }


@pytest.fixture
def older(
    tmp_path: Path, make_dlrm: Callable[..., DLRM], click_log: Dataset, monkeypatch: pytest.MonkeyPatch
) -> Callable[[TrainingConfig, str], Trainer]:
    """Make a folder with an older run of 3,000 samples, and a trainer that goes on in a folder."""
    take = Snapshot.take

    def take_older(self: Snapshot) -> dict[str, Any]:
        state = take(self)
        del state["batch_sizes"], state["attachments"]
        return state | {"dense_optimizer": _two_groups(state["dense_optimizer"])}

    with monkeypatch.context() as patched:
        patched.setattr(Snapshot, "take", take_older)
        Trainer(make_dlrm(click_log), click_log, CONFIGURATION, tmp_path / "older").fit()
    path = tmp_path / "older" / CONFIG
    former = json.loads(path.read_text(encoding="utf-8"))
    for table in former["network"]["tables"].values():
        del table["group"]
    path.write_text(json.dumps({key: value for key, value in former.items() if key not in NEW}), encoding="utf-8")
    return lambda config, name: Trainer(make_dlrm(click_log), click_log, config, tmp_path / name)


def test_an_older_run_goes_on_as_if_it_were_of_today(older: Callable[..., Trainer], tmp_path: Path) -> None:
    longer = replace(CONFIGURATION, epochs=0.5)
    shutil.copytree(tmp_path / "older", tmp_path / "goes-on")
    runs = [older(longer, name) for name in ("goes-on", "whole")]
    runs.append(older(replace(longer, branch_from=tmp_path / "older"), "branch"))
    for run in runs:
        run.fit()
        assert run.progress.samples == 6000
    ends = [run.model.state_dict() for run in runs]
    assert len(ends[0]) > 10
    assert all(torch.equal(end[name], ends[1][name]) for end in ends for name in ends[1])
    # what is not as it was by default remains another run
    with pytest.raises(ValueError, match=r"holds a run with adversarial.eps = 0.0, got 0.1"):
        older(replace(longer, adversarial=AdversarialConfig(eps=0.1)), "older")


def test_states_are_found_by_their_parameters_names(make_dlrm: Callable[..., DLRM], click_log: Dataset) -> None:
    config, model = DenseOptimizerConfig(name="adam"), make_dlrm(click_log)
    trained = build_dense_optimizer(config, model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    trained.step()
    fresh = build_dense_optimizer(config, model, HeadConfig(learning_rate=0.5))
    load_optimizer(fresh, _two_groups(trained.state_dict()))
    assert [group["name"] for group in fresh.param_groups] == ["dense", "head", "vectors"]
    for parameter in model.parameters():
        assert torch.equal(fresh.state[parameter]["exp_avg"], 0.1 * parameter.grad)
    saved = _two_groups(trained.state_dict())
    saved["param_groups"][1]["param_names"][0] = "gone.bias"
    with pytest.raises(ValueError, match=r"one of other parameters \(.*gone.bias.*; choose another --output"):
        load_optimizer(fresh, saved)
    for group in saved["param_groups"]:
        del group["param_names"]
    with pytest.raises(ValueError, match=r"got one of another .*; choose another --output, or end that run"):
        load_optimizer(fresh, saved)
