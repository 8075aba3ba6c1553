"""What a step on sequences minimises: the next item, and MCLRec's contrasts in one pass over the batch or in three."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import override

from contrastive.gather import gather_ranks
from contrastive.mclrec_config import MclrecConfig, Stage
from contrastive.mclrec_losses import HiddenStates, StageLoss, Views, keep, stage_loss
from contrastive.meta_stage import second_order_stage
from contrastive.model import SequenceModel
from contrastive.sequence_batch import SequenceBatch
from dlrm.distributed.ranks import ALONE, Ranks
from dlrm.training.task import Task
from embeddings.interface import Tables


class NextItemTask(Task):
    """A model of sequences with the losses of a configuration; each stage is a pass of its own over the batch.

    Args:
        model: with augmenters, if the configuration has a use for them.
        config: what is contrasted and how.
        ranks: who else trains; all contrast the whole batch.
    """

    def __init__(self, model: SequenceModel, config: MclrecConfig, ranks: Ranks = ALONE) -> None:
        super().__init__()
        if config.second_order and ranks.count > 1:
            raise ValueError(f"--mclrec.second-order: expected one process, got {ranks.count} ranks")
        self.model, self.config = model, config
        self.passes = config.stages
        self._stage: Stage = config.stages[0]
        self._gather = keep if ranks.count == 1 else gather_ranks(ranks)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)

    @override
    def enter(self, name: str) -> None:
        self._stage = cast(Stage, name)

    @override
    def prefetch(self, following: SequenceBatch, tables: Sequence[Tables]) -> None:
        self.model.items.prefetch(following.sparse)
        if self.model.sides is not None and following.sides is not None:
            self.model.sides.prefetch(following.sides)

    @override
    def forward(self, batch: SequenceBatch) -> tuple[Tensor, Tensor | None]:
        if self._stage == "augmenters" and self.config.second_order:
            return self._note(second_order_stage(self.model, batch, self.config)), None
        hidden, rows = self._encode(batch)
        if len(batch) or self._stage == "augmenters":
            found = self._loss(hidden, rows, batch)
        else:  # others gather from all ranks, also from one without samples
            found = StageLoss(self._gather_nothing(hidden) + 0.0 * rows.sum(), {})
        return self._note(found), hidden.history

    def _note(self, found: StageLoss) -> Tensor:
        """Keep a stage's terms for the log; returns its loss."""
        for name, term in found.terms.items():
            self._sums[name] = self._sums[name] + term if name in self._sums else term
            self._counts[name] += 1
        return found.loss

    @override
    def values(self) -> dict[str, float]:
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means

    def _encode(self, batch: SequenceBatch) -> tuple[HiddenStates, Tensor]:
        """Encode what the stage needs, all in one call; augmenters learn from an encoder that stands still."""
        model = self.model
        views = batch.views if self.config.needs_views else ()
        if self._stage == "augmenters":
            with torch.no_grad():
                rows = model.rows(batch)
                return HiddenStates(None, cast(Views, model.encode(rows, *views))), rows
        rows = model.rows(batch)
        history, *others = model.encode(rows, batch.history, *views)
        return HiddenStates(history, cast("Views | tuple[()]", tuple(others))), rows

    def _loss(self, hidden: HiddenStates, rows: Tensor, batch: SequenceBatch) -> StageLoss:
        return stage_loss(
            self._stage,
            hidden,
            rows,
            batch.targets,
            self.model.augmenters,
            self.config,
            log_q=batch.log_q,
            gather=self._gather,
            contrast_views=self.model.memory,
        )

    def _gather_nothing(self, hidden: HiddenStates) -> Any:
        history = 0.0 if hidden.history is None else hidden.history.sum()
        if not hidden.views:
            return history
        return history + 0.0 * self._gather(torch.cat(hidden.views, dim=1)).sum()
