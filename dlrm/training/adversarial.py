"""Adversarial training on pooled rows, the moves found by the step itself or, one step stale, beside the step before.

Ids cannot be moved a little, but the rows they are pooled into can: delta = eps * g / |g|, where g is the gradient of a
sample's loss with respect to its pooled rows (one step of the fast gradient method, in the 2-norm). The loss is the
mean of the clean and of the adversarial half. Concurrent adversarial training finds delta with the weights of the step
before, so that it need not be waited for; both halves then run with the present weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dlrm.batch import Batch
from dlrm.config import TrainingConfig
from dlrm.training.adversarial_config import AdversarialConfig
from dlrm.training.train_step import ClickTask
from embeddings.interface import Tables

TINY = torch.finfo(torch.float32).tiny  # gradients of a mean over a large batch are small, and not to be taken for 0


class AdversarialTask(ClickTask):
    """A `ClickTask` whose loss is the mean over every sample and its adversary.

    Rows get the gradient of both halves at once, in one update.

    Args:
        model: with `tables`, and `dense(numbers, pooled rows)` that gives logits [B]; a `DLRM`.
        config: the move.

    Raises:
        ValueError: the model is of another form, or has a batch norm.
    """

    model: Any  # with the parts that are asked for here

    def __init__(self, model: nn.Module, config: AdversarialConfig) -> None:
        super().__init__(model)
        tables, dense = getattr(model, "tables", None), getattr(model, "dense", None)
        if not (isinstance(tables, Tables) and isinstance(dense, nn.Module)):
            raise ValueError(
                "--adversarial.eps: expected a model with `tables` and `dense`, as a DLRM is, got "
                f"{type(model).__name__}"
            )
        norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        if norms:
            raise ValueError(
                "--adversarial.eps: expected a model without batch norm, whose running statistics would be those of "
                f"moved samples too, got {type(norms[0]).__name__}; take --model.batch-norm none"
            )
        self.config = config
        self._moves: tuple[Any, Tensor] | None = None  # of the batch to come: whose they are, and what they are
        self._loaded: Tensor | None = None  # of the first batch of a resumed run

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean loss of both halves, and the logits of the clean one [B]."""
        pooled = self.model.tables(batch.sparse).values()
        clean, logits = self.loss_of(batch, self.model.dense(batch.dense, pooled))
        if not len(batch):
            return clean, logits
        moves = self._take_moves(batch, pooled)
        adversarial, _ = self.loss_of(batch, self.model.dense(batch.dense, pooled + moves))
        return (clean + adversarial) / 2, logits

    def prepare(self, following: Batch) -> None:
        """Find the moves of the next batch with the present weights, if they are to be stale (a collective call)."""
        if self.config.staleness == 0:
            return
        tables = self.model.tables
        was_training = tables.training
        tables.eval()  # looked at, not trained on
        with torch.no_grad():
            pooled = tables(following.sparse).values()
        tables.train(was_training)
        if len(following):
            self._moves = following.sparse, self._find_moves(following, pooled)

    def prepared(self) -> dict[str, Tensor]:
        """See `ClickTask`."""
        return {} if self._moves is None else {"moves": self._moves[1]}

    def load_prepared(self, state: Mapping[str, Any]) -> None:
        """See `ClickTask`."""
        self._loaded = state.get("moves")

    def _take_moves(self, batch: Batch, pooled: Tensor) -> Tensor:
        """Return the moves that were found before, or those of the present weights where there are none for it."""
        found, self._moves = self._moves, None
        loaded, self._loaded = self._loaded, None
        if found is not None and found[0] is batch.sparse:
            return found[1]
        if loaded is not None and loaded.shape == pooled.shape:  # it is another with other ranks or ends of the run
            return loaded.to(pooled)
        return self._find_moves(batch, pooled)

    def _find_moves(self, batch: Batch, pooled: Tensor) -> Tensor:
        """Return the moves [B, columns] that raise the loss of each sample most; 0 where nothing does."""
        leaf = pooled.detach().requires_grad_()
        loss, _ = self.loss_of(batch, self.model.dense(batch.dense, leaf))
        gradient = torch.autograd.grad(loss, leaf)[0]
        dims = [gradient.shape[1]] if self.config.per == "sample" else list(self.model.tables.feature_dims)
        directions = [_normalise(part) for part in gradient.split(dims, dim=1)]
        return self.config.eps * torch.cat(directions, dim=1)


def _normalise(vectors: Tensor) -> Tensor:
    """Return vectors [B, n] with length 1, and zeros as they are; squares of small numbers do not vanish on the way."""
    largest = vectors.abs().amax(dim=1, keepdim=True)
    return normalize(vectors / largest.clamp_min(TINY), dim=1)


def build_task(model: nn.Module, config: TrainingConfig) -> ClickTask:
    """Make the task of a run.

    Raises:
        ValueError: see `AdversarialTask`; or what does not go with it was asked for.
    """
    if config.adversarial.eps == 0.0:
        return ClickTask(model)
    if config.step.cuda_graphs:
        raise ValueError("--adversarial.eps: expected no --step.cuda-graphs, whose replays overwrite the clean half")
    if config.growth.test != "none" or config.rule == "adascale":
        asked = "--rule adascale" if config.growth.test == "none" else f"--growth.test {config.growth.test}"
        raise ValueError(f"{asked}: expected no --adversarial.eps, which hides the samples' gradients")
    return AdversarialTask(model, config.adversarial)
