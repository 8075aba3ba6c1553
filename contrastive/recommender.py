"""A trained recommender of sequences, opened from its run to be asked: for a user, or for what is near an item."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import cattrs
import numpy as np
import torch
from torch import Tensor

from contrastive.build import build_model
from contrastive.config import SequenceRunConfig
from contrastive.data.sequence_dataset import SEQUENCES, SequenceDataset
from contrastive.data.sequence_reader import SequenceReader
from contrastive.ranking.ranks import Seen
from contrastive.ranking.recommend import find_nearest, recommend_items
from contrastive.sequence_batch import Histories
from dlrm.checkpoints.find_run import open_run
from dlrm.checkpoints.run_state import load_model
from dlrm.training.run_config import CONFIG

Scored = list[tuple[str, float]]
"""Names of items and their scores, best first."""


class Recommender:
    """The weights of a run, with the sequences that it was trained on.

    Args:
        run: its folder, or one of its checkpoints; of a run the best checkpoint is taken, where there is one.
        data: the prepared sequences, where they are not where the run found them.

    Raises:
        ValueError: it is no run on sequences, holds no checkpoint, or the sequences are others or gone.
    """

    def __init__(self, run: Path, data: Path | None = None) -> None:
        restored, settings = _open(run)
        self.config = read_config(settings, run)
        self.dataset = _open_data(data or Path(settings["dataset"]), run)
        if restored.state["progress"]["dataset"] != self.dataset.fingerprint:
            raise ValueError(
                f"--data: expected the sequences that {run} was trained on, got others in {self.dataset.folder}"
            )
        self.model = build_model(self.config, self.dataset).eval()
        load_model(self.model, restored.state)
        split = next(split for split in ("test", "valid", "train") if self.dataset.rows(split))
        with torch.no_grad():
            self.rows: Tensor = self.model.rows(SequenceReader(self.dataset, split).read(0, 1))
            """[num_items + 1, dim], of all items."""
        self.trained: Tensor = torch.from_numpy(np.flatnonzero(self.dataset.item_counts))
        """[m] int64, ids of the items that training saw; the rows of others are what they were at first."""

    @torch.no_grad()
    def recommend(
        self, users: Sequence[str], count: int = 10, *, keep_seen: bool = False, keep_unseen: bool = False
    ) -> list[Scored]:
        """Say which items come next for users, by all that they have done.

        Args:
            users: by name.
            count: items for each.
            keep_seen: also what they have acted on.
            keep_unseen: also items that training never saw.

        Raises:
            ValueError: no user is named, there is no such user, or nothing is known of what one did.
        """
        if not users:
            raise ValueError("--user: expected at least one name, got none")
        numbers = np.array([self.dataset.find_user(name) for name in users])
        whole = self.dataset.histories(numbers)
        if (whole.lengths == 0).any():
            raise ValueError(f"--user: expected users with actions, got '{users[int(np.argmin(whole.lengths))]}'")
        latest = self.dataset.histories(numbers, self.config.sequence.max_length)
        if self.config.sequence.skip_unseen:
            latest = self.dataset.without_unseen(latest)
        histories = Histories(torch.from_numpy(latest.items), torch.from_numpy(latest.lengths))
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(whole.lengths)]))
        seen = None if keep_seen else Seen(offsets, torch.from_numpy(whole.items))
        vectors = self.model.encode(self.rows, histories)[0]
        found = recommend_items(vectors, self.rows, count, seen, among=None if keep_unseen else self.trained)
        return [self._name(*each) for each in zip(found.items, found.scores, strict=True)]

    def nearest(
        self,
        items: Sequence[str],
        count: int = 10,
        by: Literal["cosine", "dot"] = "cosine",
        *,
        keep_unseen: bool = False,
    ) -> list[Scored]:
        """Say which items are like others.

        Args:
            items: by name.
            count: items for each.
            by: see `find_nearest`.
            keep_unseen: also items that training never saw, and what is like them.

        Raises:
            ValueError: no item is named, there is no such item, or training never saw one.
        """
        if not items:
            raise ValueError("--item: expected at least one name, got none")
        ids = torch.tensor([self.dataset.find_item(name) for name in items])
        for name, id in zip(items, ids.tolist(), strict=True):
            if not (keep_unseen or self.dataset.item_counts[id]):
                raise ValueError(
                    f"--item: expected items that training saw, got '{name}', whose row is what it was at first; "
                    "--keep-unseen takes it nevertheless"
                )
        found = find_nearest(self.rows, ids, count, by, among=None if keep_unseen else self.trained)
        return [self._name(*each) for each in zip(found.items, found.scores, strict=True)]

    def _name(self, items: Tensor, scores: Tensor) -> Scored:
        pairs = zip(items.tolist(), scores.tolist(), strict=True)
        return [(self.dataset.item_name(item), score) for item, score in pairs if item]


def read_config(settings: dict[str, Any], run: Path) -> SequenceRunConfig:
    """Read a run's configuration back from what its folder holds.

    Raises:
        ValueError: it is none of a run on sequences.
    """
    if "encoder" not in settings:
        raise ValueError(f"expected a run on sequences, got {run}, a run of '{settings.get('recipe')}'")
    try:
        return cattrs.structure(settings, SequenceRunConfig)
    except cattrs.BaseValidationError as error:
        told = cattrs.transform_error(error)[0]
        raise ValueError(f"{run / CONFIG}: expected a configuration of this release, {told}") from error


def _open(run: Path) -> tuple[Any, dict[str, Any]]:
    opened = open_run(run, best=None)
    for line in opened[0].skipped:
        print(f"recforge: {line}", file=sys.stderr)
    return opened


def _open_data(folder: Path, run: Path) -> SequenceDataset:
    if not (folder / SEQUENCES).is_file():
        raise ValueError(
            f"--data: expected the folder of prepared sequences (datasets/sequences-...) that {run} was trained on, "
            f"got {folder}, which is none; name the right one"
        )
    return SequenceDataset(folder)
