"""The second-order meta step of a whole model on a batch: encodes with the weights that the step arrives at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from contrastive.mclrec_config import MclrecConfig
from contrastive.mclrec_losses import HiddenStates, StageLoss, Views
from contrastive.meta_step import second_order_loss
from contrastive.model import SequenceModel
from contrastive.sequence_batch import Histories, SequenceBatch


def second_order_stage(model: SequenceModel, batch: SequenceBatch, config: MclrecConfig) -> StageLoss:
    """What takes the place of the stage ``augmenters``; its backward gives gradients to the augmenters alone.

    Args:
        model: Its encoder's operators must have second derivatives, as those of `--encoder.kernels torch` have.
        batch: The whole batch; a rank that has a share of it would step by a gradient of its own.
        config: Weights and variants.
    """
    encoding = _Encoding(model)
    names = {f"model.encoder.{name}": weight for name, weight in model.encoder.named_parameters()}

    def encode(weights: Mapping[str, Tensor], rows: Tensor, with_history: bool) -> HiddenStates:
        histories = (batch.history, *batch.views) if with_history else batch.views
        found = functional_call(encoding, dict(weights), (rows, *histories))
        return HiddenStates(found[0] if with_history else None, cast(Views, found[-2:]))

    with torch.no_grad():
        rows = model.rows(batch)
    # Also where nobody asks for gradients: the virtual step is one. cuDNN's recurrent networks have no second ones.
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        return second_order_loss(encode, names, rows, batch.targets, model.augmenters, config, log_q=batch.log_q)


class _Encoding(nn.Module):
    """Makes `encode` what a call of the model does, as torch.func asks for."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor, *histories: Histories) -> tuple[Tensor, ...]:
        return self.model.encode(rows, *histories)
