"""The problem of the next item where all tables lie on shards, which take one push of all of them for each pass."""

from __future__ import annotations

from typing_extensions import override

from contrastive.data.sequence_reader import SequenceReader
from contrastive.next_item import NextItem
from dlrm.config import TrainingConfig


class ServedNextItem(NextItem):
    """The next item, with the side features of a batch looked up together with its items."""

    @override
    def reader(self, split: str, config: TrainingConfig) -> SequenceReader:
        reader = super().reader(split, config)
        reader.joins_sides = True
        return reader
