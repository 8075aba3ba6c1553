"""Turns files of sequences into a prepared folder, once; it is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from contrastive.data.action_files import find_unused_times, read_actions
from contrastive.data.item_features import ItemFeature, read_item_features
from contrastive.data.line_format import PATTERNS as LINE_PATTERNS
from contrastive.data.line_format import read_lines
from contrastive.data.ragged import spans
from contrastive.data.sequence_dataset import (
    ACTIONS,
    FORMAT_VERSION,
    ITEMS,
    SEQUENCES,
    USERS,
    SequenceDataset,
    SequenceInfo,
)
from contrastive.data.sequence_schema import SequenceFormat, SequenceSchema
from contrastive.data.sequence_splits import SequenceCuts, cut_sequences
from contrastive.data.sequences import SequenceData
from dlrm.data.chunk import write_batches
from dlrm.data.dataset import FeatureInfo, IntArray, checksum
from dlrm.data.formats import PATTERNS, find_source
from dlrm.data.source import find_files
from dlrm.data.splits import SPLITS
from dlrm.data.work import SCRATCH_SUFFIX, named_full_disk, whole_folder

ENDINGS: dict[str, SequenceFormat] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".inter": "movielens",
}
ORIGIN = "prepared_from.json"
PACKED = (".gz", ".zst")


def prepare_sequences(schema: SequenceSchema, sources: Sequence[Path | str], out: Path | str) -> SequenceDataset:
    """Read sequences, divide them, and write the folder that runs open; or open it if that has been done already.

    What is left out of training is told on stderr.

    Args:
        schema: how the files are written, and what is held out.
        sources: files, folders or globs.
        out: the folder to write.

    Raises:
        ValueError: the files do not fit the schema (file and line are named), or `out` holds something else.
    """
    out = Path(out)
    schema = _complete(schema, sources)
    origin = _describe_origin(schema, sources)
    if is_prepared(out, origin):
        return SequenceDataset(out)
    is_lines = schema.format == "lines"
    data = read_lines(sources, schema.num_items) if is_lines else read_actions(schema, sources)
    if is_lines and (absent := data.num_items - len(np.unique(data.actions))):
        _warn(f"{absent:,} of the {data.num_items:,} numbers of items do not occur; they are items nevertheless")
    if not is_lines and schema.time is None and (times := find_unused_times(schema, sources)):
        _warn(
            f"rows are taken for the order of actions, as no --schema.time is given; {', '.join(times)} may hold "
            f"times: --schema.time {times[0]} goes by them"
        )
    features, unknown = read_item_features(schema.items, data.items) if schema.items.files else ((), 0)
    dataset = write_sequences(data, schema, out, origin, features)
    for feature in features:
        if not feature.values:
            _warn(
                f"--schema.items: no value of '{feature.name}' is one of {schema.items.min_count} items or more, so "
                "that all share a row and say nothing; divide numbers into classes, or lower --schema.items.min-count"
            )
    if unknown:
        _warn(f"{unknown:,} of {data.num_items:,} items are not in the files of items; their features are absent")
    return dataset


def sequences_identity(schema: SequenceSchema, sources: Sequence[Path | str]) -> Mapping[str, Any]:
    """Return all that `prepare_sequences` takes for its input, for the name of a folder: it follows every change.

    Raises:
        ValueError: a file is absent.
    """
    return _describe_origin(_complete(schema, sources), sources)


def write_sequences(
    data: SequenceData,
    schema: SequenceSchema,
    out: Path,
    origin: Mapping[str, Any],
    features: Sequence[ItemFeature] = (),
) -> SequenceDataset:
    """Divide sequences and write them.

    Args:
        data: what users did.
        schema: what is held out.
        out: the folder.
        origin: what the result depends on, for `is_prepared`.
        features: side features of items.

    Raises:
        ValueError: a split would be empty.
    """
    cuts = cut_sequences(data, schema)
    counts = _count_trained(data, cuts)
    with named_full_disk(out), _new_folder(out) as scratch:
        write_batches(scratch / USERS, [_describe_users(data, cuts)])
        write_batches(scratch / ACTIONS, [_describe_actions(data)])
        write_batches(scratch / ITEMS, [_describe_items(data, counts, features)])
        info = _describe(data, cuts, counts, features, schema.min_actions)
        files = {name: checksum(scratch / name) for name in (USERS, ACTIONS, ITEMS)}
        times = {} if cuts.times is None else dict(zip(("valid_from", "test_from"), map(str, cuts.times), strict=True))
        # Times of change are no property of the sequences: copies of a file give equal fingerprints.
        known = {name: value for name, value in origin.items() if name != "files"}
        known["sources"] = [{"file": name, "bytes": size} for name, size, _ in origin.get("files", ())]
        (scratch / ORIGIN).write_text(json.dumps(dict(origin), indent=1) + "\n", encoding="utf-8")
        replace(info, files=files, origin=known | times).write(scratch)
    if info.users_left_out:
        first = int(np.argmax(data.lengths < schema.min_actions))
        place = "" if data.places is None else "{}, line {}: ".format(*data.places[first])
        _warn(
            f"{place}{info.users_left_out:,} of {info.num_users:,} users have fewer than {schema.min_actions} actions "
            f"(the first is '{data.users[first]}', with {data.lengths[first]}): they are neither learned nor tested"
        )
    for split, count in info.unseen_targets.items():
        if count:
            _warn(
                f"{count:,} of {info.samples[split]:,} targets of the {split} split are items that training never saw"
            )
    return SequenceDataset(out)


def _complete(schema: SequenceSchema, sources: Sequence[Path | str]) -> SequenceSchema:
    if schema.format is None:
        schema = replace(schema, format=_guess_format(sources))
    items = schema.items
    if items.files and items.format is None:
        guessed = _guess_format(items.files)
        if guessed == "lines" or guessed == "movielens":
            raise ValueError(f"expected .csv, .tsv or .parquet files of items, got {items.files[0]}; convert them")
        schema = replace(schema, items=replace(items, format=guessed))
    schema.check_used()
    return schema


def _guess_format(sources: Sequence[Path | str]) -> SequenceFormat:
    for source in sources:
        path = Path(source)
        names = [path.name] if not path.is_dir() else sorted(file.name for file in path.iterdir())
        for name in names:
            for packed in PACKED:
                name = name.removesuffix(packed)
            if (found := ENDINGS.get(Path(name).suffix)) is not None:
                return found
    return "lines"


def _describe_origin(schema: SequenceSchema, sources: Sequence[Path | str]) -> dict[str, Any]:
    """Return what the result depends on; files are known by name, size and time of change, so that folders may move."""
    files = [*_list_files(schema.format or "lines", sources)]
    if schema.items.files:
        files += _list_files(schema.items.format or "csv", schema.items.files)
    states = [(file, file.stat()) for file in files]
    described = asdict(schema)
    del described["items"]["files"]
    origin = {
        "format_version": FORMAT_VERSION,
        "schema": described,
        "files": [[file.name, state.st_size, state.st_mtime_ns] for file, state in states],
    }
    as_read: dict[str, Any] = json.loads(json.dumps(origin))
    return as_read


def _list_files(kind: SequenceFormat | str, sources: Sequence[Path | str]) -> tuple[Path, ...]:
    if kind == "movielens":
        return find_source("movielens", [Path(source) for source in sources]).files
    return find_files(sources, LINE_PATTERNS if kind == "lines" else PATTERNS[kind])


def is_prepared(out: Path, origin: Mapping[str, Any]) -> bool:
    """Return whether `out` holds what was prepared from `origin`.

    Raises:
        ValueError: it holds the result of other input, or files that are not ours.
    """
    if (out / SEQUENCES).is_file():
        try:
            former = json.loads((out / ORIGIN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            former = {}
        changed = [name for name in origin if former.get(name) != origin[name]]
        if changed:
            raise ValueError(
                f"{out} holds sequences that were prepared from other input (differs in {', '.join(changed)}); delete "
                "it, or choose another folder"
            )
        return True
    if out.is_dir() and os.listdir(out):
        raise ValueError(f"expected an empty or new folder for the sequences, {out} holds other files; choose another")
    return False


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Give a scratch folder that becomes `out`; nothing is left of it where that fails."""
    scratch = out.with_name(f"{out.name}.{os.getpid()}{SCRATCH_SUFFIX}")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process of this number that was killed
    try:
        with whole_folder(out) as folder:
            yield folder
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _count_trained(data: SequenceData, cuts: SequenceCuts) -> IntArray:
    """Return how often each id occurs in the training part."""
    trained = data.actions[spans(data.offsets[:-1], cuts.train_actions)]
    return np.bincount(trained, minlength=data.num_items + 1)


def _describe_users(data: SequenceData, cuts: SequenceCuts) -> pa.RecordBatch:
    columns = {"user": data.users, "first_action": pa.array(data.offsets[:-1]), "actions": pa.array(data.lengths)}
    for split in SPLITS:
        first, count = cuts.targets[split]
        columns |= {f"{split}_target": pa.array(first), f"{split}_samples": pa.array(count)}
    return pa.record_batch(columns)


def _describe_actions(data: SequenceData) -> pa.RecordBatch:
    narrow = np.int32 if data.num_items <= np.iinfo(np.int32).max else np.int64
    columns = {"item": pa.array(data.actions.astype(narrow))}
    return pa.record_batch(columns | ({} if data.times is None else {"time": pa.array(data.times)}))


def _describe_items(data: SequenceData, counts: IntArray, features: Sequence[ItemFeature]) -> pa.RecordBatch:
    names = pa.concat_arrays([pa.array([None], pa.large_string()), data.items])
    columns = {"item": names, "train_count": pa.array(counts)}
    for feature in features:
        offsets, rows = pa.array(feature.bags.offsets), pa.array(feature.bags.values)
        columns[feature.name] = pa.LargeListArray.from_arrays(offsets, rows)
    return pa.record_batch(columns)


def _describe(
    data: SequenceData, cuts: SequenceCuts, counts: IntArray, features: Sequence[ItemFeature], min_actions: int
) -> SequenceInfo:
    samples, unseen = {}, {}
    for split in SPLITS:
        first, count = cuts.targets[split]
        samples[split] = int(count.sum())
        unseen[split] = int((counts[data.actions[spans(data.offsets[:-1] + first, count)]] == 0).sum())
    return SequenceInfo(
        num_users=len(data.users),
        num_items=data.num_items,
        num_actions=len(data.actions),
        samples=samples,
        unseen_targets=unseen,
        users_left_out=int((data.lengths < min_actions).sum()),
        sides=tuple(FeatureInfo(name=f.name, num_rows=f.num_rows, is_list=True) for f in features),
        has_times=data.times is not None,
    )


def _warn(text: str) -> None:
    print(f"recforge: warning: {text}", file=sys.stderr)
