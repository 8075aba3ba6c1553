"""MCLRec's stages are the published formulas, step by step: losses, who gets gradients, and whole updates with Adam."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from contrastive.augmenters import Augmenters
from contrastive.mclrec_config import MclrecConfig, Stage
from contrastive.mclrec_losses import HiddenStates, StageLoss, stage_loss

BATCH, DIM, WIDTHS, NUM_ITEMS = 4, 3, (3, 2), 6
RATE, BETAS, EPS = 1e-2, (0.9, 0.999), 1e-8
Grads = dict[str, Tensor]


def tensor(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class World:
    """Fixed tensors: an encoder tanh(x W), items' rows, a history and two views of each sample."""

    weight: Tensor
    rows: Tensor
    inputs: tuple[Tensor, Tensor, Tensor]
    targets: Tensor
    augmenters: Augmenters

    def encode(self, weight: Tensor, rows: Tensor) -> HiddenStates:
        """The mean row of three items, through the weight."""
        history, first, second = (torch.tanh(rows[items].mean(1) @ weight) * 2.0 for items in self.inputs)
        return HiddenStates(history, (first, second))

    def layers(self, which: str) -> list[tuple[Tensor, Tensor]]:
        return [(layer.weight, layer.bias) for layer in getattr(self.augmenters, which).layers]


@pytest.fixture
def make_world() -> Callable[..., World]:
    def make(*, shared: bool = False, batch: int = BATCH) -> World:
        generator = torch.Generator().manual_seed(7)
        inputs = torch.randint(1, NUM_ITEMS + 1, (3, batch, 3), generator=generator)
        torch.manual_seed(11)
        augmenters = Augmenters(DIM, WIDTHS, shared=shared).double()
        return World(
            weight=tensor(DIM, DIM, seed=1).requires_grad_(),
            rows=tensor(NUM_ITEMS + 1, DIM, seed=2).requires_grad_(),
            inputs=(inputs[0], inputs[1], inputs[2]),
            targets=torch.randint(1, NUM_ITEMS + 1, (batch,), generator=generator),
            augmenters=augmenters,
        )

    return make


def naive_stage(
    formulas: SimpleNamespace, world: World, stage: Stage, config: MclrecConfig, hidden: HiddenStates
) -> Tensor:
    """A stage's loss, from the formulas alone."""
    (h1, h2) = hidden.views
    z1, z2 = formulas.augment(h1, world.layers("first")), formulas.augment(h2, world.layers("second"))
    pairs = [(h1, z2), (h2, z1), (z1, z2)]
    learned = sum(formulas.info_nce(*pair) for pair in pairs)
    weight = config.regulariser_weight
    if stage == "augmenters" and config.regulariser == "paper":
        weight *= config.beta
    if config.regulariser == "code":
        learned = learned + weight * sum(formulas.row_regulariser(*pair) for pair in pairs)
    elif config.regulariser == "paper":
        learned = learned + weight * formulas.batch_regulariser(z1, z2)
    if stage == "augmenters":
        return learned
    loss = formulas.next_item(hidden.history, world.rows, world.targets)
    if config.contrast != "none":
        loss = loss + config.views_weight * formulas.info_nce(h1, h2, config.temperature)
    return loss + config.beta * learned if config.contrast == "augmenters" else loss


CONFIGS = {
    "code": MclrecConfig(views_weight=0.3, beta=0.5),
    "beauty": MclrecConfig(),
    "paper": MclrecConfig(views_weight=0.3, beta=0.5, regulariser="paper", form="two_step", temperature=0.5),
    "no_regulariser": MclrecConfig(views_weight=0.3, beta=0.5, regulariser="none"),
    "joint": MclrecConfig(views_weight=0.3, beta=0.5, form="joint"),
    "shared": MclrecConfig(views_weight=0.3, beta=0.5, shared=True),
    "cl4srec": MclrecConfig(contrast="views", views_weight=0.3),
    "sasrec": MclrecConfig(contrast="none"),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> MclrecConfig:
    return CONFIGS[request.param]


def run_stage(world: World, stage: Stage, config: MclrecConfig, **options: Any) -> StageLoss:
    hidden = world.encode(world.weight, world.rows)
    if stage == "augmenters":
        hidden = HiddenStates(None, hidden.views)
    return stage_loss(stage, hidden, world.rows, world.targets, world.augmenters, config, **options)


def test_losses_and_gradients_are_those_of_the_formulas(
    formulas: SimpleNamespace, make_world: Callable[..., World], config: MclrecConfig
) -> None:
    world = make_world(shared=config.shared)
    learned = list(world.augmenters.parameters())
    theta = [world.weight, world.rows]
    for stage in dict.fromkeys(config.stages):
        expected = naive_stage(formulas, world, stage, config, world.encode(world.weight, world.rows))
        got = run_stage(world, stage, config)
        torch.testing.assert_close(got.loss, expected, rtol=1e-12, atol=0)
        wanted = {"encoder": theta, "augmenters": learned, "joint": theta + learned}[stage]
        others = [part for part in theta + learned if all(part is not one for one in wanted)]
        expected_gradients = torch.autograd.grad(expected, wanted)
        got.loss.backward()
        for part, gradient in zip(wanted, expected_gradients, strict=True):
            assert part.grad is not None
            torch.testing.assert_close(part.grad, gradient, rtol=1e-11, atol=1e-13)
            part.grad = None
        assert all(part.grad is None for part in others), "a stage gives gradients to those alone that it trains"


def naive_adam(parts: Sequence[Tensor], gradients: Sequence[Tensor], moments: list[tuple[Tensor, Tensor]]) -> None:
    """One update of Kingma and Ba's algorithm 1; `moments` has one entry for each past update."""
    old = moments[-1] if moments else ([torch.zeros_like(p) for p in parts], [torch.zeros_like(p) for p in parts])
    firsts = [BETAS[0] * m + (1 - BETAS[0]) * g for m, g in zip(old[0], gradients, strict=True)]
    seconds = [BETAS[1] * v + (1 - BETAS[1]) * g * g for v, g in zip(old[1], gradients, strict=True)]
    moments.append((firsts, seconds))
    step = len(moments)
    for part, first, second in zip(parts, firsts, seconds, strict=True):
        with torch.no_grad():
            part -= RATE * (first / (1 - BETAS[0] ** step)) / ((second / (1 - BETAS[1] ** step)).sqrt() + EPS)


def test_full_updates_of_both_optimizers_are_those_of_the_formulas(
    formulas: SimpleNamespace, make_world: Callable[..., World], config: MclrecConfig
) -> None:
    """Two batches, so that moments count: each stage encodes anew, with what the stage before has changed."""
    ours, naive = make_world(shared=config.shared), make_world(shared=config.shared)
    theta = torch.optim.Adam([ours.weight, ours.rows], lr=RATE)
    phi = torch.optim.Adam(ours.augmenters.parameters(), lr=RATE)
    moments: dict[str, list[Any]] = {"theta": [], "phi": []}
    for _ in range(2):
        for stage in config.stages:
            run_stage(ours, stage, config).loss.backward()
            parts = {"theta": [naive.weight, naive.rows], "phi": list(naive.augmenters.parameters())}
            steps = {"encoder": ["theta"], "augmenters": ["phi"], "joint": ["theta", "phi"]}[stage]
            for name, optimizer in (("theta", theta), ("phi", phi)):
                if name in steps:
                    optimizer.step()
            theta.zero_grad()
            phi.zero_grad()
            loss = naive_stage(formulas, naive, stage, config, naive.encode(naive.weight, naive.rows))
            gradients = torch.autograd.grad(loss, [part for name in steps for part in parts[name]])
            for name in steps:
                naive_adam(parts[name], gradients[: len(parts[name])], moments[name])
                gradients = gradients[len(parts[name]) :]
    moved = [(ours.weight, naive.weight), (ours.rows, naive.rows)]
    moved += list(zip(ours.augmenters.parameters(), naive.augmenters.parameters(), strict=True))
    for got, expected in moved:
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    fresh = make_world(shared=config.shared)
    assert not torch.allclose(ours.weight, fresh.weight)
    is_moved = not torch.allclose(ours.augmenters.first.layers[0].weight, fresh.augmenters.first.layers[0].weight)
    assert is_moved == (config.contrast == "augmenters")


@pytest.mark.parametrize("shares", [(2, 2), (3, 1)])
def test_ranks_together_have_the_gradients_of_one_process(
    make_world: Callable[..., World], config: MclrecConfig, shares: tuple[int, int]
) -> None:
    """Each rank's samples are encoded by itself, gathered with gradients, and its loss weighed by its share."""
    world = make_world(shared=config.shared)
    for stage in dict.fromkeys(config.stages):
        wanted = [world.weight, world.rows, *world.augmenters.parameters()]
        one = run_stage(world, stage, config)
        expected = torch.autograd.grad(one.loss, wanted, materialize_grads=True)
        history, (first, second) = world.encode(world.weight, world.rows)
        parts = list(zip(*(part.split(shares) for part in (history, first, second, world.targets)), strict=True))
        together = torch.cat([first, second], dim=1)
        total = torch.zeros((), dtype=torch.float64)
        for part, share in zip(parts, shares, strict=True):
            hidden = HiddenStates(part[0], (part[1], part[2]))
            gathered = partial(lambda all_vectors, own: all_vectors, together)
            loss = stage_loss(stage, hidden, world.rows, part[3], world.augmenters, config, gather=gathered).loss
            total = total + loss * share / BATCH
        torch.testing.assert_close(total, one.loss)
        for got, gradient in zip(torch.autograd.grad(total, wanted, materialize_grads=True), expected, strict=True):
            torch.testing.assert_close(got, gradient)


def test_terms_for_the_log_make_up_the_loss(make_world: Callable[..., World]) -> None:
    config = CONFIGS["code"]
    terms = run_stage(make_world(), "encoder", config).terms
    learned = terms["augmented_contrast"] + config.regulariser_weight * terms["regulariser"]
    whole = terms["next_item"] + config.views_weight * terms["views_contrast"] + config.beta * learned
    torch.testing.assert_close(terms["loss"], whole)
    assert set(run_stage(make_world(), "augmenters", config).terms) == {
        "augmenters_loss",
        "augmenters_augmented_contrast",
        "augmenters_regulariser",
    }
    assert set(run_stage(make_world(), "encoder", CONFIGS["sasrec"]).terms) == {"loss", "next_item"}
    assert not any(term.requires_grad for term in terms.values())


def test_cosine_views_and_a_contrast_of_ones_own(formulas: SimpleNamespace, make_world: Callable[..., World]) -> None:
    world = make_world()
    _, views = world.encode(world.weight, world.rows)
    unit = [torch.stack([vector / vector.square().sum().sqrt() for vector in view]) for view in views]
    config = MclrecConfig(contrast="views", views_weight=0.3, similarity="cosine", temperature=0.2)
    terms = run_stage(world, "encoder", config).terms
    torch.testing.assert_close(terms["views_contrast"], formulas.info_nce(*unit, 0.2))
    memory = MclrecConfig(contrast="memory", views_weight=0.3)
    terms = run_stage(world, "encoder", memory, contrast_views=lambda first, second: (first * second).sum()).terms
    torch.testing.assert_close(terms["views_contrast"], (views[0] * views[1]).sum())


def test_the_next_item_among_drawn_ones_is_sampled(make_world: Callable[..., World]) -> None:
    world = make_world()
    full = run_stage(world, "encoder", CONFIGS["sasrec"]).loss
    all_drawn = run_stage(world, "encoder", CONFIGS["sasrec"], log_q=torch.zeros(NUM_ITEMS + 1)).loss
    torch.testing.assert_close(all_drawn, full)
    rare = run_stage(world, "encoder", CONFIGS["sasrec"], log_q=torch.full((NUM_ITEMS + 1,), 5.0)).loss
    assert rare < full


def test_what_a_stage_lacks_is_told(make_world: Callable[..., World]) -> None:
    world, config = make_world(), CONFIGS["code"]
    hidden = world.encode(world.weight, world.rows)
    with pytest.raises(ValueError, match="stage encoder: expected hidden states of two augmented histories, got 0"):
        stage_loss("encoder", HiddenStates(hidden.history), world.rows, world.targets, world.augmenters, config)
    with pytest.raises(ValueError, match="expected hidden states of the histories themselves, got none"):
        stage_loss("encoder", HiddenStates(None, hidden.views), world.rows, world.targets, world.augmenters, config)
    with pytest.raises(ValueError, match=r"expected augmenters beside --mclrec.contrast augmenters, got none"):
        stage_loss("encoder", hidden, world.rows, world.targets, None, config)
    with pytest.raises(ValueError, match=r"expected a cross-batch memory beside --mclrec.contrast memory, got none"):
        run_stage(world, "encoder", MclrecConfig(contrast="memory", views_weight=0.3))
