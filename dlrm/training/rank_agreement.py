"""What keeps ranks one model: LAMB's ratios are compared once, and batch norm's running statistics are averaged."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from dlrm.distributed.ranks import Ranks
from dlrm.ghost_batch_norm import average_over_ranks
from dlrm.optim.hybrid import HybridOptimizer
from dlrm.optim.lamb import Lamb
from dlrm.optim.ratio_check import check_ratios_agree
from dlrm.training.attachments import Attachment, Moment


class RatioCheck(Attachment):
    """Checks after the first step of a process that all ranks took it alike.

    Args:
        optimizer: those of its members that are `Lamb` are looked at.
        ranks: who else trains.
    """

    name = "lamb_ratios"

    def __init__(self, optimizer: Optimizer, ranks: Ranks) -> None:
        members = optimizer.members if isinstance(optimizer, HybridOptimizer) else (optimizer,)
        self._unchecked = [member for member in members if isinstance(member, Lamb)]
        self._ranks = ranks

    def after_step(self, moment: Moment, loss: float) -> None:
        """Compare.

        Raises:
            ValueError: on all ranks, see `check_ratios_agree`.
        """
        while self._unchecked:
            check_ratios_agree(self._unchecked.pop(), self._ranks)


class RunningStatistics(Attachment):
    """Averages the running statistics of `GhostBatchNorm` over ranks before they are used or saved.

    Args:
        model: that has them.
        ranks: who else trains.
    """

    name = "running_statistics"

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks

    def before_measuring(self) -> None:
        """Average."""
        average_over_ranks(self._model, self._ranks)
