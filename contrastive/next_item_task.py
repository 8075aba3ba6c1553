"""What a step on sequences minimises: the next item, and MCLRec's contrasts in one pass over the batch or in three."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor
from typing_extensions import override

from contrastive.gather import RankGather
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
        self._ranks, self._gather = ranks, None if ranks.count == 1 else RankGather(ranks)
        self._sums: dict[str, float | Tensor] = {}
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
        in_full = torch.autocast(self.model.device.type, enabled=False)  # losses, as exponentials want it
        if self._stage == "augmenters" and self.config.second_order:
            with in_full:
                return self._note(second_order_stage(self.model, batch, self.config), batch), None
        hidden, rows = self._encode(batch)
        with in_full:
            return self._note(self._loss(hidden, rows, batch), batch), hidden.history

    @override
    def stand_in(self) -> None:
        if self._gather is not None:
            self._gather.stand_in()

    @override
    def repeating(self) -> AbstractContextManager[None]:
        return nullcontext() if self._gather is None else self._gather.repeating()

    @override
    def values(self) -> dict[str, float]:
        names = sorted(self._sums)  # all ranks go through the same stages, in the same order
        totals = self._ranks.sum([float(self._sums[name]) for name in names])
        means = {name: total / self._counts[name] for name, total in zip(names, totals, strict=True)}
        self._sums.clear()
        self._counts.clear()
        return means

    def _note(self, found: StageLoss, batch: SequenceBatch) -> Tensor:
        """Keep a stage's terms for the log, as this rank's part of the mean over the batch; return its loss."""
        share = len(batch) / max(1, batch.global_size or len(batch))
        for name, term in found.terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + share * term
            self._counts[name] += 1
        return found.loss

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
            gather=self._gather or keep,
            contrast_views=self.model.memory,
        )
