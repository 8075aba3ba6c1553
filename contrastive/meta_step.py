"""The second-order meta step: augmenters learn what they do to the encoder's next step, not only to its present word.

MCLRec as published alternates two first-order updates. Here the augmenters' loss is that of the encoder after a virtual
step of plain gradient descent, and its gradient runs through this step (Finn et al. 2017, arXiv:1703.03400).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from contrastive.mclrec_config import MclrecConfig
from contrastive.mclrec_losses import (
    HiddenStates,
    StageLoss,
    augmented_contrast,
    augmented_views,
    augmenter_loss,
    next_item_loss,
    own_contrast,
    views_of,
)

Encode = Callable[[Mapping[str, Tensor], Tensor, bool], HiddenStates]
"""From the encoder's weights by name, the rows [n, dim] and whether to encode the histories too. It draws dropout, and
is called twice; `torch.func.functional_call(encoder, weights, ...)` does it."""


def second_order_loss(
    encode: Encode,
    weights: Mapping[str, Tensor],
    rows: Tensor,
    targets: Tensor,
    augmenters: nn.Module | None,
    config: MclrecConfig,
    *,
    log_q: Tensor | None = None,
) -> StageLoss:
    """L_B at ``theta' = theta - virtual_rate * grad_theta L_A(theta, phi)``, theta the weights and the rows.

    ``backward`` of it gives gradients to the augmenters alone; theta itself is left out of it. Only the contrast with
    augmenters has a second derivative: the rest of L_A does not know phi. One process: a rank of several would step by
    its own gradient rather than by that of the whole batch.

    Args:
        encode: Runs the encoder with other weights than its own; its operators must have second derivatives.
        weights: The encoder's weights by name.
        rows: The rows looked up, [n, dim].
        targets: Place of the next item among `rows`, [B] int64.
        augmenters: From two views to two more.
        config: Weights and variants; `virtual_rate` is the virtual step's.
        log_q: Log of how likely each row was to be drawn, [n]; None takes the full softmax.
    """
    theta = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    items = rows.detach().requires_grad_()
    hidden = encode(theta, items, True)
    moved_theta, moved_items = _step(theta, items, *_losses(hidden, items, targets, augmenters, config, log_q), config)
    views = views_of(encode(moved_theta, moved_items, False), "augmenters")
    return augmenter_loss(views, augmenters, config)


def _losses(
    hidden: HiddenStates,
    rows: Tensor,
    targets: Tensor,
    augmenters: nn.Module | None,
    config: MclrecConfig,
    log_q: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """L_A in two: what does not know phi, and what does."""
    views = views_of(hidden, "augmenters")
    fixed, _ = next_item_loss(hidden, rows, targets, log_q)
    if config.needs_own_contrast:
        fixed = fixed + config.views_weight * own_contrast(views, config)
    augmented = augmented_views(views, augmenters, is_frozen=False)
    learned, _ = augmented_contrast(views, augmented, config, config.regulariser_weight)
    return fixed, config.beta * learned


def _step(
    theta: dict[str, Tensor], rows: Tensor, fixed: Tensor, learned: Tensor, config: MclrecConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """Theta and the rows after the virtual step, as functions of phi."""
    leaves = [*theta.values(), rows]
    constant = torch.autograd.grad(fixed, leaves, retain_graph=True, materialize_grads=True)
    of_phi = torch.autograd.grad(learned, leaves, create_graph=True, materialize_grads=True)
    steps = zip(leaves, constant, of_phi, strict=True)
    moved = [leaf.detach() - config.virtual_rate * (known + graph) for leaf, known, graph in steps]
    return dict(zip(theta, moved[:-1], strict=True)), moved[-1]
