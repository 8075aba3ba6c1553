"""Sequences to test with: a small world with times and side features, and files of lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from contrastive.data.prepare_sequences import prepare_sequences
from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.data.sequence_schema import SequenceSchema
from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, generate_sequences

SMALL = SyntheticSequencesConfig(num_users=200, num_items=60, num_tastes=4, most_actions=25, seed=1)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    """Two hundred users, sixty items, sequences of 3 to 25 actions."""
    return generate_sequences(SMALL, tmp_path_factory.mktemp("sequences") / "small")


@pytest.fixture
def prepare_lines(tmp_path: Path) -> Callable[..., SequenceDataset]:
    """Prepare sequences given as lists of items, one per user."""

    def prepare(sequences: Sequence[Sequence[int]], schema: SequenceSchema | None = None) -> SequenceDataset:
        file = tmp_path / "sequences.txt"
        lines = [f"u{user} {' '.join(map(str, items))}\n" for user, items in enumerate(sequences)]
        file.write_text("".join(lines), encoding="utf-8")
        return prepare_sequences(schema or SequenceSchema(), [file], tmp_path / "prepared")

    return prepare
