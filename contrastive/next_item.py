"""The problem of the next item: histories against a whole catalogue, judged by where the right item ranks."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from contrastive.augment.build import build_operators
from contrastive.config import SequenceRunConfig
from contrastive.data.negatives import NegativesConfig
from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.data.sequence_reader import SequenceReader
from contrastive.data.synthetic_sequences import SyntheticWorld
from contrastive.model import SequenceModel
from contrastive.next_item_task import NextItemTask
from contrastive.ranking.collapse import complain, is_at_chance
from contrastive.ranking.embedding_space import describe_space, write_space
from contrastive.ranking.ranking_metrics import RankingMetrics, RankingValues
from contrastive.ranking.ranks import Seen
from contrastive.sequence_batch import SequenceBatch
from dlrm.config import GuardConfig, TrainingConfig
from dlrm.distributed.ranks import Ranks
from dlrm.diverged import DivergedError
from dlrm.training.problem import Place, Problem, SampleReader
from dlrm.training.task import Task

METRICS = ("recall", "ndcg", "mrr", "precision")
SPACE_SAMPLES = 512  # whose views are compared at the end of a run


@dataclass(frozen=True)
class Measured:
    """An evaluation whose numbers are attributes, as `mrr_10`, by which the best checkpoint is chosen.

    Attributes:
        ranking: all of them, by cutoff.
    """

    ranking: RankingValues
    undefined: str | None = None

    @property
    def samples(self) -> int:
        """How many users were measured."""
        return self.ranking.users

    def __getattr__(self, name: str) -> float:
        metric, _, cutoff = name.rpartition("_")
        if metric not in METRICS or not cutoff.isdigit():
            raise AttributeError(name)
        value: float = getattr(self.ranking, metric)[int(cutoff)]
        return value


class NextItem(Problem):
    """The next item of prepared sequences; models are `SequenceModel`s.

    Args:
        dataset: the sequences.
        config: of the run.
    """

    def __init__(self, dataset: SequenceDataset, config: SequenceRunConfig) -> None:
        self.dataset: SequenceDataset = dataset
        self.config = config

    @override
    def check(self, model: nn.Module, config: TrainingConfig) -> None:
        rows = self._model(model).num_rows
        if rows != self.dataset.num_items + 1:
            raise ValueError(
                f"table 'item': expected {self.dataset.num_items + 1} rows, one for each item of "
                f"{self.dataset.folder} and one for none, got {rows}"
            )
        for split in ("valid", "test") if self.config.evaluation.skip_unseen_targets else ():
            samples = self.dataset.rows(split)
            if 0 < samples == self.dataset.info.unseen_targets[split]:
                raise ValueError(
                    f"--evaluation.skip-unseen-targets: expected targets of the {split} split that training saw, got "
                    f"none of {samples}; leave it out"
                )

    @override
    def reader(self, split: str, config: TrainingConfig) -> SequenceReader:
        sequence, is_train = self.config.sequence, split == "train"
        return SequenceReader(
            self.dataset,
            split,
            shuffle=config.shuffle and is_train,
            seed=config.seed,
            max_length=sequence.max_length,
            augment=build_operators(sequence) if is_train and self.config.mclrec.needs_views else None,
            same_target=is_train and self.config.mclrec.needs_views and sequence.second_view == "same_target",
            negatives=self._negatives() if is_train else None,
            skip_unseen=sequence.skip_unseen,
        )

    @override
    def task(self, model: nn.Module, config: TrainingConfig, ranks: Ranks) -> Task:
        return NextItemTask(self._model(model), self.config.mclrec, ranks)

    @override
    def measure(self, model: nn.Module, reader: SampleReader, config: TrainingConfig, place: Place) -> Measured:
        return self._rank(model, reader, place, filtered=self.config.evaluation.filter_seen)

    @override
    def describe(self, values: Measured, config: TrainingConfig) -> dict[str, Any]:
        ranking = values.ranking
        groups = {name: getattr(ranking, name) or {} for name in (*METRICS, "coverage", "popularity_bias")}
        numbers = {f"{name}_{k}": value for name, group in groups.items() for k, value in group.items()}
        choices = {"filter_seen": ranking.filtered, "skip_unseen_targets": self.config.evaluation.skip_unseen_targets}
        return {**numbers, "ties": ranking.ties, **choices, "split_samples": ranking.users}

    @override
    def tell(self, values: Measured) -> str:
        ranking = values.ranking
        seen = "seen items left out" if ranking.filtered else "seen items ranked too"
        trained = ", targets that training saw alone" if ranking.trained_targets else ""
        metrics = f"recall@10 {ranking.recall[10]:.4f}, ndcg@10 {ranking.ndcg[10]:.4f}, mrr@10 {ranking.mrr[10]:.4f}"
        return f"{metrics}, {seen}{trained},"

    @override
    def is_at_chance(self, values: Measured) -> bool:
        return is_at_chance(values.ranking, self.dataset.num_items)

    @override
    def complaint(
        self, values: Measured, evaluations_at_chance: int, guards: GuardConfig, *, last: bool = False
    ) -> str | None:
        return complain(values.ranking, self.dataset.num_items, evaluations_at_chance, guards, last=last)

    @override
    def finish(self, model: nn.Module, reader: SampleReader, values: Measured, place: Place) -> dict[str, Any]:
        other = self._rank(model, reader, place, filtered=not values.ranking.filtered)
        self._draw_space(model, place)
        return {"ranked": values.ranking.named() | other.ranking.named(), **self._best_possible(reader.split)}

    def _best_possible(self, split: str) -> dict[str, float]:
        """Return the recall that no model exceeds but by luck, where sequences are of our own making."""
        world = SyntheticWorld.of(self.dataset)
        if world is None:
            return {}
        ranks = world.best_ranks(self.dataset, split)
        if self.config.evaluation.skip_unseen_targets:
            ranks = ranks[self.dataset.item_counts[self.dataset.targets(split, np.arange(len(ranks)))] > 0]
        return {"best_recall_10": float((ranks < 10).mean())}

    @torch.no_grad()
    def _draw_space(self, model: nn.Module, place: Place) -> None:
        """Write what the report draws of the items' space, and how far apart views of a history are."""
        sequences = self._model(model)
        if min(sequences.dim, self.dataset.num_items) < 2:
            if place.ranks.is_first:
                got = f"{self.dataset.num_items:,} items, --dim {sequences.dim}"
                print(f"recforge: no picture of the space, which takes two items and --dim 2: {got}", file=sys.stderr)
            return
        was_training = model.training
        model.eval()
        try:
            reader = self.reader("train", self.config)
            reader.negatives = None  # all items are wanted
            batch = reader.read(0, SPACE_SAMPLES).to(place.device)
            rows = sequences.rows(batch)
            views = sequences.encode(rows, *batch.views) if len(batch.views) == 2 else None
            if place.ranks.is_first:
                pair = None if views is None else (views[0].cpu(), views[1].cpu())
                counts = torch.from_numpy(self.dataset.item_counts.copy())
                write_space(describe_space(rows.cpu(), counts, pair), place.folder)
        finally:
            model.train(was_training)

    @torch.no_grad()
    def _rank(self, model: nn.Module, reader: SampleReader, place: Place, *, filtered: bool) -> Measured:
        """Rank all items for a split's samples, of which each rank takes its share (a collective call)."""
        sequences, ranks, stopwatch = self._model(model), place.ranks, place.stopwatch
        counts = torch.from_numpy(self.dataset.item_counts.copy())
        skips = self.config.evaluation.skip_unseen_targets
        items = self.dataset.num_items
        metrics = RankingMetrics(items, filtered=filtered, item_counts=counts, trained_targets=skips)
        share = ranks.share_of if ranks.count > 1 else None
        batches = reader.batches(self.config.evaluation.batch_size, stop=reader.num_rows, share=share)
        was_training = model.training
        model.eval()
        try:
            rows: Tensor | None = None
            ranked = torch.empty(0)  # the same rows where they are ranked, on the CPU
            failure: DivergedError | None = None
            while failure is None:
                with stopwatch.stage("evaluation"):  # one per batch, so that who watches sees it go on
                    batch = next(batches, None)
                    if batch is None:
                        break
                    if rows is None:  # all items, the same for every batch
                        rows = sequences.rows(batch)
                        ranked = rows.cpu()
                    if len(batch):
                        kept = self._measured(batch)
                        hidden = sequences.encode(rows, batch.to(place.device).history)[0].cpu()[kept]
                        seen = self._seen(reader.split, batch.rows[kept]) if filtered else None
                        try:
                            metrics.update(hidden, ranked, batch.targets[kept], seen)
                        except DivergedError as error:  # that other ranks do not wait for this one
                            failure = error
            with stopwatch.stage("evaluation"):
                ranks.raise_any(failure)
                if ranks.count > 1:
                    metrics.sum_over(ranks)
                return Measured(metrics.compute())
        finally:
            model.train(was_training)

    def _measured(self, batch: SequenceBatch) -> Tensor:
        """Return which samples of a batch count, [B] bool."""
        if not self.config.evaluation.skip_unseen_targets:
            return torch.ones_like(batch.targets, dtype=torch.bool)
        return torch.from_numpy(self.dataset.item_counts[batch.targets.numpy()] > 0)

    def _seen(self, split: str, samples: Tensor) -> Seen:
        """Return all that users of samples have acted on before, also what is too long ago for their histories."""
        items, lengths = self.dataset.samples(split, samples.numpy()).histories
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        return Seen(torch.from_numpy(offsets), torch.from_numpy(items))

    def _negatives(self) -> NegativesConfig | None:
        sequence = self.config.sequence
        if sequence.negatives is None:
            return None
        return NegativesConfig(
            count=sequence.negatives, power=sequence.negatives_power, in_batch=sequence.in_batch_negatives
        )

    def _model(self, model: nn.Module) -> SequenceModel:
        if not isinstance(model, SequenceModel):
            raise ValueError(f"model: expected a SequenceModel for sequences, got {type(model).__name__}")
        return model
