"""Finds the prepared sequences of a run, and makes them first where they do not exist yet."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from contrastive.data.sequence_dataset import SEQUENCES, SequenceDataset
from contrastive.data.sequence_schema import SequenceSchema
from dlrm.data.provide import FOLDER, alone_in, digest


def provide_sequences(schema: SequenceSchema, data: Path | None, *, is_synthetic: bool = False) -> SequenceDataset:
    """Open `data` if it is prepared, else prepare it once under `datasets/`.

    Args:
        schema: how the files are written, and what is held out.
        data: `--data`; None where sequences are generated.
        is_synthetic: generate some where none are named.

    Raises:
        ValueError: nothing to read was named, it does not exist, or it does not fit the schema.
    """
    if data is not None and (data / SEQUENCES).is_file():
        return SequenceDataset(data)
    if data is None and is_synthetic:
        from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, generate_sequences

        config = SyntheticSequencesConfig()
        folder = FOLDER / f"sequences-{digest(str(config))}"
        with alone_in(folder):
            return generate_sequences(config, folder)
    if data is None:
        raise ValueError("--data: expected a file of sequences or prepared ones, got nothing")
    from contrastive.data.prepare_sequences import prepare_sequences, sequences_identity

    identity = json.dumps(sequences_identity(schema, [data]), sort_keys=True, default=str)
    folder = FOLDER / f"sequences-{digest(f'{data.resolve()}{identity}')}"
    print(f"recforge: preparing {data} into {folder}", file=sys.stderr)
    with alone_in(folder):
        return prepare_sequences(schema, [data], folder)
