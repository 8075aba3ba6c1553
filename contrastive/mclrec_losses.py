"""What each stage of MCLRec minimises, as pure functions of what the encoder says: the loop decides who steps when.

With h1, h2 the encoder's word on two augmented histories and z1, z2 the augmenters' views of these::

    L_cl2 = C(h1, z2) + C(h2, z1) + C(z1, z2),   R_total = R(h1, z2) + R(h2, z1) + R(z1, z2)
    L_A   = L_next_item + lambda * C(h1, h2) + beta * (L_cl2 + w * R_total)       the encoder's, augmenters constant
    L_B   = L_cl2 + w * R_total                                                   the augmenters', encoder constant

where C is InfoNCE and w the regulariser's weight (Qin et al. 2023, SIGIR, as its published code has it). In the
paper's variant of the regulariser R_total is R(z1, z2), and its weight in L_B is beta * w.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive.augmenters import augment_frozen
from contrastive.losses.contrast import contrast
from contrastive.losses.full_softmax import full_softmax
from contrastive.losses.fused_contrast import ContrastLoss, fused_contrast
from contrastive.losses.info_nce import info_nce
from contrastive.losses.regulariser import batch_regulariser
from contrastive.losses.sampled_softmax import sampled_softmax
from contrastive.mclrec_config import MclrecConfig, Stage

Views = tuple[Tensor, Tensor]
Gather = Callable[[Tensor], Tensor]
"""From a rank's vectors [b, dim] to all ranks' [B, dim]. Its backward sums what all ranks say of this rank's vectors:
each contrasts the whole batch, and the loop weighs a rank's loss by its share of the samples."""
ViewsContrast = Callable[[Tensor, Tensor], Tensor]


class HiddenStates(NamedTuple):
    """What the encoder says at the last position of each history.

    Attributes:
        history: [B, dim] of the histories as they were; None where a stage does without.
        views: of the augmented histories, [B, dim] each; empty where nothing is contrasted.
    """

    history: Tensor | None
    views: Views | tuple[()] = ()


class StageLoss(NamedTuple):
    """What a stage comes to.

    Attributes:
        loss: Scalar to minimise.
        terms: Its parts before their weights, without gradients, for the log.
    """

    loss: Tensor
    terms: dict[str, Tensor]


def keep(vectors: Tensor) -> Tensor:
    """Gather nothing: a process by itself has the whole batch."""
    return vectors


def stage_loss(
    stage: Stage,
    hidden: HiddenStates,
    rows: Tensor,
    targets: Tensor,
    augmenters: nn.Module | None,
    config: MclrecConfig,
    *,
    log_q: Tensor | None = None,
    gather: Gather = keep,
    contrast_views: ViewsContrast | None = None,
) -> StageLoss:
    """What a stage minimises.

    ``encoder`` gives gradients to hidden states and rows, ``augmenters`` to the augmenters alone, ``joint`` to all.

    Args:
        stage: One of `config.stages`.
        hidden: Hidden states; ``augmenters`` needs no history, and views computed without gradients serve it.
        rows: The rows looked up, [n, dim].
        targets: Place of the next item among `rows`, [B] int64.
        augmenters: From two views to two more, as `contrastive.augmenters.Augmenters`; None where nothing needs them.
        config: Weights and variants.
        log_q: Log of how likely each row was to be drawn, [n]; None takes the full softmax.
        gather: Brings together all ranks' hidden states before augmenters and contrast see them.
        contrast_views: Takes the place of InfoNCE between augmented histories: a cross-batch memory.

    Raises:
        ValueError: If the hidden states lack what the stage needs.
    """
    if stage == "augmenters":
        first, second = _gather_views(hidden, stage, gather)
        return augmenter_loss((first.detach(), second.detach()), augmenters, config)
    total, terms = next_item_loss(hidden, rows, targets, log_q)
    if config.needs_views:
        views = _gather_views(hidden, stage, gather)
        if config.needs_own_contrast:
            own = own_contrast(views, config, contrast_views)
            terms["views_contrast"] = own.detach()
            total = total + config.views_weight * own
        if config.contrast == "augmenters":
            augmented = augmented_views(views, augmenters, is_frozen=stage == "encoder")
            learned, learned_terms = augmented_contrast(views, augmented, config, config.regulariser_weight)
            total = total + config.beta * learned
            terms |= learned_terms
    return StageLoss(total, {**terms, "loss": total.detach()})


def augmenter_loss(views: Views, augmenters: nn.Module | None, config: MclrecConfig) -> StageLoss:
    """L_B of two views of the whole batch, [B, dim] each; also gives gradients to views that want them."""
    augmented = augmented_views(views, augmenters, is_frozen=False)
    weight = config.regulariser_weight * (config.beta if config.regulariser == "paper" else 1.0)
    loss, terms = augmented_contrast(views, augmented, config, weight)
    return StageLoss(loss, {f"augmenters_{name}": term for name, term in {**terms, "loss": loss.detach()}.items()})


def next_item_loss(
    hidden: HiddenStates, rows: Tensor, targets: Tensor, log_q: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_next_item of this rank's samples, and its term for the log."""
    if hidden.history is None:
        raise ValueError("next_item_loss: expected hidden states of the histories themselves, got none")
    if log_q is None:
        loss = full_softmax(hidden.history, rows, targets)
    else:
        loss = sampled_softmax(hidden.history, rows, targets, log_q)
    return loss, {"next_item": loss.detach()}


def augmented_views(views: Views, augmenters: nn.Module | None, *, is_frozen: bool) -> Views:
    """z1 and z2; frozen weights are constants, through which gradients still reach the views."""
    if augmenters is None:
        raise ValueError("augmented_views: expected augmenters beside --mclrec.contrast augmenters, got none")
    if is_frozen:
        return augment_frozen(augmenters, *views)
    first, second = augmenters(*views)
    return first, second


def augmented_contrast(
    views: Views, augmented: Views, config: MclrecConfig, weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """``L_cl2 + weight * R_total``, and both terms for the log."""
    pairs = ((views[0], augmented[1]), (views[1], augmented[0]), augmented)
    terms: dict[str, Tensor] = {}
    total = augmented[0].new_zeros(())
    for first, second in pairs:
        if config.regulariser == "paper" and first is augmented[0]:
            loss, nce, regulariser = _contrast_as_in_the_paper(first, second, weight)
        else:
            loss, nce, regulariser = fused_contrast(first, second, weight=weight * (config.regulariser == "code"))
        total = total + loss
        terms["augmented_contrast"] = terms.get("augmented_contrast", 0.0) + nce
        if regulariser is not None:
            terms["regulariser"] = terms.get("regulariser", 0.0) + regulariser
    return total, terms


def _contrast_as_in_the_paper(first: Tensor, second: Tensor, weight: float) -> ContrastLoss:
    pairs = contrast(first, second)
    nce, regulariser = info_nce(pairs), batch_regulariser(pairs)
    return ContrastLoss(nce + weight * regulariser, nce.detach(), regulariser.detach())


def own_contrast(views: Views, config: MclrecConfig, contrast_views: ViewsContrast | None = None) -> Tensor:
    """C(h1, h2) with the similarity and the temperature of the configuration."""
    if config.contrast == "memory" and contrast_views is None:
        raise ValueError("own_contrast: expected a cross-batch memory beside --mclrec.contrast memory, got none")
    if config.similarity == "cosine":
        views = F.normalize(views[0], dim=1), F.normalize(views[1], dim=1)
    if contrast_views is not None:
        return contrast_views(*views)
    return fused_contrast(*views, temperature=config.temperature).loss


def views_of(hidden: HiddenStates, stage: Stage) -> Views:
    """The two views of hidden states that are said to have them."""
    if len(hidden.views) != 2:
        raise ValueError(f"stage {stage}: expected hidden states of two augmented histories, got {len(hidden.views)}")
    return hidden.views


def _gather_views(hidden: HiddenStates, stage: Stage, gather: Gather) -> Views:
    """All ranks' h1 and h2, in one exchange; what follows is then the same mathematics as in one process."""
    first, second = gather(torch.cat(views_of(hidden, stage), dim=1)).chunk(2, dim=1)
    return first, second
