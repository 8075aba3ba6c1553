"""Finds the prepared sequences of a run, and makes them first where they do not exist yet."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contrastive.data.sequence_dataset import SEQUENCES, SequenceDataset
from contrastive.data.sequence_schema import SequenceSchema
from contrastive.unused_settings import Need, refuse_unused
from dlrm.data.provide import FOLDER, alone_in, digest
from dlrm.training.run_config import leaves


def provide_sequences(schema: SequenceSchema, data: Path | None, *, is_synthetic: bool = False) -> SequenceDataset:
    """Open `data` if it is prepared, else prepare it once under `datasets/`.

    Args:
        schema: how the files are written, and what is held out.
        data: `--data`; None where sequences are generated.
        is_synthetic: generate some where none are named.

    Raises:
        ValueError: nothing to read was named, it does not exist, it does not fit the schema, or it was prepared by
            another one.
    """
    if data is not None and (data / SEQUENCES).is_file():
        dataset = SequenceDataset(data)
        _compare(schema, dataset)
        return dataset
    if data is None and is_synthetic:
        return _generate(schema)
    if data is None:
        raise ValueError("--data: expected a file of sequences or prepared ones, got nothing")
    from contrastive.data.prepare_sequences import prepare_sequences, sequences_identity

    identity = json.dumps(sequences_identity(schema, [data]), sort_keys=True, default=str)
    folder = FOLDER / f"sequences-{digest(f'{data.resolve()}{identity}')}"
    print(f"recforge: preparing {data} into {folder}", file=sys.stderr)
    with alone_in(folder):
        return prepare_sequences(schema, [data], folder)


def _generate(schema: SequenceSchema) -> SequenceDataset:
    from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, generate_sequences

    usual, config = SequenceSchema(), SyntheticSequencesConfig()
    of_files = tuple(name for name in _flatten(schema) if name != "min_actions" and not name.startswith("split."))
    refuse_unused(schema, usual, [Need("--data", False, of_files)], "schema.")
    folder = FOLDER / f"sequences-{digest(f'{config}{schema}' if schema != usual else str(config))}"
    with alone_in(folder):
        return generate_sequences(config, folder, schema)


def _compare(schema: SequenceSchema, dataset: SequenceDataset) -> None:
    """Check that prepared sequences are what a schema asks for, as far as it asks; tell what else they are.

    Raises:
        ValueError: naming the first flag that they were prepared without.
    """
    asked, usual = _flatten(schema), _flatten(SequenceSchema())
    held = usual | dict(leaves(dataset.info.origin.get("schema", {})))
    others = []
    for name in sorted(usual.keys() - {"items.files"}):  # the preparation keeps no paths
        flag = f"--schema.{name.replace('_', '-')}"
        if asked[name] != usual[name] and asked[name] != held[name]:
            raise ValueError(
                f"{flag}: expected {held[name]}, as {dataset.folder} was prepared with, got {asked[name]}; leave it "
                "out, or name the files that these sequences come from by --data"
            )
        if asked[name] != held[name] and not name.endswith("format"):
            others.append(f"{flag} {held[name]}")
    if others:
        print(f"recforge: {dataset.folder} was prepared with {', '.join(others)}", file=sys.stderr)


def _flatten(schema: SequenceSchema) -> dict[str, Any]:
    """Return all settings by their dotted names, as JSON has them."""
    return dict(leaves(json.loads(json.dumps(asdict(schema)))))
