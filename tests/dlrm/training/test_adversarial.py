"""Adversarial training is what it says: by hand with the present weights, and by hand with those of the step before."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlrm.batch import Batch
from dlrm.config import CheckpointConfig, EvaluationConfig, GuardConfig, StepConfig, TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.data.reader import Reader
from dlrm.model import DLRM
from dlrm.noise.config import NoiseScaleConfig
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.training.adversarial import AdversarialTask
from dlrm.training.adversarial_config import AdversarialConfig
from dlrm.training.attachments import Attachment, Moment
from dlrm.training.batch_growth_config import BatchGrowthConfig
from dlrm.training.train_step import ClickTask, TrainStep
from dlrm.training.trainer import Trainer
from embeddings import RowSGD, TableConfig

RATE, EPS, STEPS, SIZE = 0.5, 0.3, 6, 64


def make_model(dataset: Dataset) -> DLRM:
    torch.manual_seed(0)
    tables = [
        TableConfig(name=f.name, num_rows=f.num_rows, dim=4, optimizer=RowSGD(learning_rate=RATE), init_scale=0.5)
        for f in dataset.info.features
    ]
    return DLRM(num_numeric=len(dataset.info.numeric), tables=tables, dim=4, bottom=(8,), top=(8,))


def read(dataset: Dataset) -> list[Batch]:
    reader = Reader(dataset, "train", shuffle=True, seed=1)
    return [reader.read(SIZE * number, SIZE) for number in range(STEPS)]


class ByHand:
    """The same model with its rows as plain parameters, trained with torch's own operators only."""

    def __init__(self, model: DLRM, per: str) -> None:
        self.per, self.names = per, model.tables.feature_names
        self.dense = copy.deepcopy(model.dense)
        self.rows = {rows.config.name: rows.weight.clone().requires_grad_() for rows in model.tables.rows()}
        self.optimizer = torch.optim.SGD([*self.dense.parameters(), *self.rows.values()], lr=RATE)

    def look_up(self, batch: Batch) -> Tensor:
        bags = [(batch.sparse[name].values().long(), batch.sparse[name].offsets()[:-1].long()) for name in self.names]
        pooled = [
            nn.functional.embedding_bag(ids, self.rows[name], offsets, mode="sum")
            for name, (ids, offsets) in zip(self.names, bags, strict=True)
        ]
        return torch.cat(pooled, dim=1)

    def loss(self, batch: Batch, pooled: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self.dense(batch.dense, pooled), batch.labels)

    def moves(self, batch: Batch) -> Tensor:
        pooled = self.look_up(batch).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(batch, pooled), pooled)
        shaped = gradient.view(len(batch), 1 if self.per == "sample" else len(self.names), -1)
        return (EPS * shaped / shaped.norm(dim=2, keepdim=True)).view_as(gradient)

    def step(self, batch: Batch, moves: Tensor) -> float:
        self.optimizer.zero_grad()
        pooled = self.look_up(batch)
        loss = (self.loss(batch, pooled) + self.loss(batch, pooled + moves)) / 2
        loss.backward()
        self.optimizer.step()
        return loss.item()


def train(model: DLRM, batches: list[Batch], config: AdversarialConfig) -> list[float]:
    step = TrainStep(AdversarialTask(model, config), torch.optim.SGD(model.parameters(), lr=RATE))
    return [
        step(batch, SIZE * (number + 1), following=following)
        for number, (batch, following) in enumerate(zip(batches, [*batches[1:], None], strict=True))
    ]


def check_equal(model: DLRM, hand: ByHand) -> None:
    for rows in model.tables.rows():
        torch.testing.assert_close(rows.weight, hand.rows[rows.config.name].detach(), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(model.dense.parameters(), hand.dense.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("per", ["sample", "feature"])
def test_fresh_moves_are_plain_adversarial_training(click_log: Dataset, per: Any) -> None:
    model, batches = make_model(click_log), read(click_log)
    hand = ByHand(model, per)
    expected = [hand.step(batch, hand.moves(batch)) for batch in batches]
    assert train(model, batches, AdversarialConfig(eps=EPS, per=per)) == pytest.approx(expected, rel=1e-5)
    check_equal(model, hand)


def test_stale_moves_are_those_of_the_weights_before(click_log: Dataset) -> None:
    model, batches = make_model(click_log), read(click_log)
    hand = ByHand(model, "sample")
    moves, expected = hand.moves(batches[0]), []
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        coming = None if following is None else hand.moves(following)
        expected.append(hand.step(batch, moves))
        moves = coming
    assert train(model, batches, AdversarialConfig(eps=EPS, staleness=1)) == pytest.approx(expected, rel=1e-5)
    check_equal(model, hand)
    fresh = make_model(click_log)
    assert train(fresh, batches, AdversarialConfig(eps=EPS)) != pytest.approx(expected, rel=1e-5)


def test_the_loss_rises_as_the_gradient_says(click_log: Dataset) -> None:
    model, batch = make_model(click_log), read(click_log)[0]
    hand, eps = ByHand(model, "sample"), 1e-2
    task = AdversarialTask(model, AdversarialConfig(eps=eps))
    pooled = hand.look_up(batch).detach().requires_grad_()
    clean = hand.loss(batch, pooled)
    (gradient,) = torch.autograd.grad(clean, pooled)
    both, _ = task(batch)
    rise = 2 * (both.item() - clean.item())
    assert rise > 0
    # The loss is a mean: each sample's own gradient is as many times longer, and moves its own share of the loss.
    assert rise == pytest.approx(eps * gradient.norm(dim=1).sum().item(), rel=0.1)


def test_no_move_is_no_change(click_log: Dataset) -> None:
    model, batch = make_model(click_log), read(click_log)[0]
    task = AdversarialTask(model, AdversarialConfig(eps=0.0))
    hand = ByHand(model, "sample")
    assert task(batch)[0].item() == pytest.approx(hand.loss(batch, hand.look_up(batch)).item())


@pytest.mark.parametrize("size", [1.0, 1e-24, 1e-26, 1e-37])
def test_moves_have_their_length_however_small_the_gradients_are(click_log: Dataset, size: float) -> None:
    model, batch = make_model(click_log), read(click_log)[0]
    hand, config = ByHand(model, "sample"), AdversarialConfig(eps=EPS)
    task = AdversarialTask(model, config)
    expected, pooled = hand.moves(batch), hand.look_up(batch).detach()
    loss_of = task.loss_of

    def scaled(batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
        loss, logits = loss_of(batch, logits)
        return loss * size, logits

    task.loss_of = scaled  # type: ignore[method-assign]
    torch.testing.assert_close(task._find_moves(batch, pooled), expected, rtol=1e-3, atol=1e-4)
    size = 0.0
    assert not task._find_moves(batch, pooled).any()


def test_a_run_of_the_trainer_withstands_moves(click_log: Dataset, make_dlrm: Any, tmp_path: Path) -> None:
    plain = TrainingConfig(
        dense=DenseOptimizerConfig(name="adam", learning_rate=0.01),
        step=StepConfig(global_batch_size=256, device="cpu", threads=1),
        evaluation=EvaluationConfig(every_samples=4000),
    )
    against = AdversarialConfig(eps=0.1, staleness=1)
    valid, rises = Reader(click_log, "valid").read(0, 2000), []
    for name, config in (("plain", plain), ("adversarial", replace(plain, adversarial=against))):
        model = make_dlrm(click_log, learning_rate=0.2)
        assert Trainer(model, click_log, config, tmp_path / name).fit()["auc"] > 0.57
        model.eval()
        both = AdversarialTask(model, AdversarialConfig(eps=0.1))(valid)[0].item()
        clean = ClickTask(model)(valid)[0].item()
        rises.append(2 * (both - clean))
    assert 0 < rises[1] < 0.9 * rises[0]


def test_a_killed_run_goes_on_with_the_moves_it_had_found(click_log: Dataset, make_dlrm: Any, tmp_path: Path) -> None:
    config = TrainingConfig(
        epochs=0.4,
        dense=DenseOptimizerConfig(name="adam", learning_rate=0.01),
        step=StepConfig(global_batch_size=300, device="cpu"),
        evaluation=EvaluationConfig(every_samples=1500, test_best=False),
        checkpoint=CheckpointConfig(keep_last=5),
        guards=GuardConfig(chance_evaluations=0),
        adversarial=AdversarialConfig(eps=0.3, staleness=1),
    )

    def make(name: str) -> Trainer:
        return Trainer(make_dlrm(click_log, dropout=0.2), click_log, config, tmp_path / name)

    class KillError(RuntimeError):
        pass

    class Killer(Attachment):
        name = "killer"

        def before_step(self, moment: Moment) -> None:
            if moment.samples == 3900:
                raise KillError

    whole, killed = make("whole"), make("killed")
    whole.fit()
    killed.attachments.members += (Killer(),)
    with pytest.raises(KillError):
        killed.fit()
    killed.checkpoints.wait()
    resumed = make("killed")
    resumed.fit()
    assert (resumed.progress.samples, whole.progress.samples) == (4800, 4800)
    ends = [trainer.model.state_dict() for trainer in (whole, resumed)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    # What is found with the weights of the step before is what makes the difference.
    fresh = Trainer(
        make_dlrm(click_log, dropout=0.2),
        click_log,
        replace(config, branch_from=tmp_path / "whole", branch_at=3000),
        tmp_path / "fresh",
    )
    fresh.snapshot.task.load_prepared = lambda state: None  # type: ignore[assignment]
    fresh.fit()
    assert any(not torch.equal(tensor, fresh.model.state_dict()[name]) for name, tensor in ends[0].items())


def test_refuses_what_cannot_be(click_log: Dataset, make_dlrm: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--adversarial.eps: expected a number >= 0, got -1"):
        AdversarialConfig(eps=-1.0)
    with pytest.raises(ValueError, match=r"--adversarial.eps: expected a model with `tables` and `dense`.*got Linear"):
        AdversarialTask(nn.Linear(2, 1), AdversarialConfig(eps=0.1))
    with pytest.raises(
        ValueError, match=r"--adversarial.eps: expected a model without batch norm, .*got GhostBatchNorm"
    ):
        AdversarialTask(make_dlrm(click_log, batch_norm="ghost"), AdversarialConfig(eps=0.1))
    config = TrainingConfig(
        adversarial=AdversarialConfig(eps=0.1),
        growth=BatchGrowthConfig(test="norm"),
        noise_scale=NoiseScaleConfig(every_steps=2),
        step=StepConfig(device="cpu"),
    )
    with pytest.raises(ValueError, match=r"--growth.test norm: expected no --adversarial.eps"):
        Trainer(make_dlrm(click_log), click_log, config, tmp_path / "run")
