"""A run's weights after two batches are those that the published formulas give, written out here in float64.

Nothing is shared with what is tested: the encoder is padded, losses are those of `formulas`, Adam is its own formula.
What is tested is a whole run: reader, look-up, encoder, stages, and both of its optimizers, beside that of the rows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from contrastive.build import build_model
from contrastive.config import SequenceRunConfig
from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, generate_sequences
from contrastive.mclrec_config import Form, MclrecConfig, Regulariser
from contrastive.model import SequenceModel
from contrastive.next_item import NextItem
from contrastive.recipes import RECIPES
from contrastive.sequence_batch import Histories, SequenceBatch
from dlrm.config import GuardConfig
from dlrm.training.trainer import Trainer

BATCH, DIM, HEADS, WINDOW, WIDTHS = 6, 32, 2, 6, (6, 4)
LAMBDA, BETA, TEMPERATURE = 0.3, 0.5, 0.5
RATE, ROW_RATE, BETAS, EPS = 1e-2, 2e-2, (0.9, 0.999), 0.05
"""Of Adam. With the usual eps of 1e-8 its first step is a gradient's sign, which float32 cannot tell near 0; so large,
steps are smooth functions of the gradients, of slopes up to ROW_RATE / EPS."""
TOLERANCE = 5e-6
"""Gradients here are up to 10, and off by some 1e-6 in float32, so that each of the 2 to 4 steps may be off by as much
(all are off by 1e-6 together); all weights move 1,000 times as far."""
STAGES: dict[Form, tuple[str, ...]] = {
    "three_step": ("encoder", "augmenters", "encoder"),
    "two_step": ("encoder", "augmenters"),
    "joint": ("joint",),
}
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    config = SyntheticSequencesConfig(num_users=30, num_items=24, num_tastes=3, mean_actions=7.0, most_actions=12)
    return generate_sequences(config, tmp_path_factory.mktemp("sequences") / "data")


def configure(world: SequenceDataset, form: Form, regulariser: Regulariser) -> SequenceRunConfig:
    """The recipe of Beauty, but small, without dropout, and with a weight on each term."""
    beauty = RECIPES["mclrec-beauty"].config
    mclrec = MclrecConfig(
        form=form,
        regulariser=regulariser,
        views_weight=LAMBDA,
        beta=BETA,
        temperature=TEMPERATURE,
        augmenter_widths=WIDTHS,
    )
    return replace(
        beauty,
        epochs=2 * BATCH / world.rows("train"),
        dim=DIM,
        encoder=replace(beauty.encoder, inner=12, dropout=0.0, attention_dropout=0.0),
        mclrec=mclrec,
        sequence=replace(beauty.sequence, max_length=WINDOW),
        step=replace(beauty.step, global_batch_size=BATCH, threads=1),
        dense=replace(beauty.dense, learning_rate=RATE, eps=EPS),
        tables=replace(beauty.tables, learning_rate=ROW_RATE, eps=EPS, init_scale=0.5),
        evaluation=replace(beauty.evaluation, test_best=False),
        guards=GuardConfig(chance_evaluations=0),
    )


def enlarge(model: SequenceModel) -> None:
    """Make what initial weights hide visible: attention that differs, biases and norms that do something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * (0.15 if weight.dim() > 1 else 0.3))


def weights_of(model: SequenceModel) -> Weights:
    """All weights, the tables' rows among them, in float64."""
    return {name: part.double() for name, part in model.state_dict().items() if name.endswith(("weight", "bias"))}


def normalise(x: Tensor, weights: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-12)
    return scaled * weights[f"encoder.{name}.weight"] + weights[f"encoder.{name}.bias"]


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"encoder.{name}.weight"].T + weights[f"encoder.{name}.bias"]


def item_rows(weights: Weights, tastes: Tensor) -> Tensor:
    """Of each item its own row and that of its taste; no item, 0, has no taste."""
    of_items, of_tastes = weights["items.item.weight"], weights["sides.taste.weight"]
    return torch.cat([of_items[:1], of_items[1:] + of_tastes[tastes]])


def encode(weights: Weights, rows: Tensor, histories: Histories) -> Tensor:
    """SASRec, post-norm, on histories that stand to the left of a padded window."""
    items = torch.zeros(len(histories.lengths), WINDOW, dtype=torch.int64)
    for row, own in enumerate(histories.places.split(histories.lengths.tolist())):
        items[row, : len(own)] = own
    hidden = items == 0
    x = torch.where(hidden[:, :, None], rows[0].detach(), rows[items])
    x = normalise(x + weights["encoder.positions.weight"], weights, "norm")
    later = torch.ones(WINDOW, WINDOW, dtype=torch.bool).triu(1)
    mask = -1e4 * (later | hidden[:, None, :]).double()
    for layer in range(2):
        queries, keys, values = linear(x, weights, f"mixers.{layer}.project").chunk(3, -1)
        heads = []
        for own in torch.arange(DIM).chunk(HEADS):
            scores = queries[..., own] @ keys[..., own].mT / math.sqrt(DIM // HEADS) + mask
            heads.append(torch.softmax(scores, -1) @ values[..., own])
        seen = linear(torch.cat(heads, -1), weights, f"mixers.{layer}.output")
        x = normalise(x + seen, weights, f"mixers.{layer}.norm")
        inner = linear(x, weights, f"networks.{layer}.widen")
        inner = inner * 0.5 * (1.0 + torch.erf(inner / math.sqrt(2.0)))
        x = normalise(x + linear(inner, weights, f"networks.{layer}.narrow"), weights, f"networks.{layer}.norm")
    return torch.stack([vectors[length - 1] for vectors, length in zip(x, histories.lengths.tolist(), strict=True)])


def stage_loss(
    formulas: SimpleNamespace, stage: str, regulariser: Regulariser, weights: Weights, batch: SequenceBatch
) -> Tensor:
    """L_A, of the encoder and of the joint step, or L_B, of the augmenters."""
    assert batch.sides is not None
    rows = item_rows(weights, batch.sides["taste"].values())
    h1, h2 = (encode(weights, rows, view) for view in batch.views)
    names = [[f"augmenters.{which}.layers.{i}" for i in range(3)] for which in ("first", "second")]
    w1, w2 = ([(weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in layers] for layers in names)
    z1, z2 = formulas.augment(h1, w1), formulas.augment(h2, w2)
    pairs = [(h1, z2), (h2, z1), (z1, z2)]
    learned = sum(formulas.info_nce(*pair) for pair in pairs)
    if regulariser == "code":
        learned = learned + 0.1 * sum(formulas.row_regulariser(*pair) for pair in pairs)
    else:
        learned = learned + (BETA if stage == "augmenters" else 1.0) * 0.1 * formulas.batch_regulariser(z1, z2)
    if stage == "augmenters":
        return learned
    next_item = formulas.next_item(encode(weights, rows, batch.history), rows, batch.targets)
    return next_item + LAMBDA * formulas.info_nce(h1, h2, TEMPERATURE) + BETA * learned


class Adam:
    """Kingma and Ba's algorithm 1, on some of the weights."""

    def __init__(self, weights: Weights, names: list[str]) -> None:
        self.steps, self.moments = 0, {name: (torch.zeros_like(weights[name]),) * 2 for name in names}

    def step(self, weights: Weights, loss: Tensor) -> None:
        self.steps += 1
        gradients = torch.autograd.grad(loss, [weights[name] for name in self.moments], retain_graph=True)
        for (name, (m, v)), g in zip(self.moments.items(), gradients, strict=True):
            m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
            self.moments[name] = m, v
            unbiased_m, unbiased_v = m / (1 - BETAS[0] ** self.steps), v / (1 - BETAS[1] ** self.steps)
            rate = ROW_RATE if name.startswith(("items", "sides")) else RATE
            weights[name] = (weights[name] - rate * unbiased_m / (torch.sqrt(unbiased_v) + EPS)).detach()


def train_by_formulas(
    formulas: SimpleNamespace, form: Form, regulariser: Regulariser, weights: Weights, batches: list[SequenceBatch]
) -> Weights:
    """Each stage encodes anew, with what the stage before has changed; it trains its own part alone."""
    theta = Adam(weights, [name for name in weights if not name.startswith("augmenters")])
    phi = Adam(weights, [name for name in weights if name.startswith("augmenters")])
    for batch in batches:
        for stage in STAGES[form]:
            weights = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
            loss = stage_loss(formulas, stage, regulariser, weights, batch)
            for optimizer in {"encoder": [theta], "augmenters": [phi], "joint": [theta, phi]}[stage]:
                optimizer.step(weights, loss)
            weights = {name: weight.detach() for name, weight in weights.items()}
    return weights


@pytest.mark.parametrize(("form", "regulariser"), [("three_step", "code"), ("two_step", "paper"), ("joint", "code")])
def test_a_run_updates_all_weights_as_the_formulas_do(
    formulas: SimpleNamespace, world: SequenceDataset, tmp_path: Path, form: Form, regulariser: Regulariser
) -> None:
    config = configure(world, form, regulariser)
    model, problem = build_model(config, world), NextItem(world, config)
    enlarge(model)
    batches = list(islice(problem.reader("train", config).batches(BATCH), 2))
    assert any(bool((view.places == 0).any()) for batch in batches for view in batch.views), "some items are hidden"
    assert {1, WINDOW} <= {length for batch in batches for length in batch.history.lengths.tolist()}
    before = weights_of(model)
    expected = train_by_formulas(formulas, form, regulariser, before, batches)
    Trainer(model, problem, config, tmp_path / "run").fit()
    after = weights_of(model)
    for name, weight in expected.items():
        error = float((after[name] - weight).abs().max())
        assert error < TOLERANCE, (name, error)
        assert float((weight - before[name]).abs().max()) > 1000 * TOLERANCE, name
