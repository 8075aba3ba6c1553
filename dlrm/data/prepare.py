"""Turns raw click logs into a prepared dataset, once: bounded memory, several processes, and it goes on after a kill.

The stages, each a list of independent tasks whose outputs lie under `OUT/.work`:
parse (source -> typed chunks), sort (only if the split is by time and the source is not sorted), count, merge and
order (dictionaries and transforms, of the training rows only), encode (chunks -> parts), check (no leakage). The result
is the same, bit for bit, whatever the number of processes and however often it was killed.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from dlrm.data.dataset import DESCRIPTION, FORMAT_VERSION, Dataset, DatasetInfo, PartInfo
from dlrm.data.doubts import find_warnings
from dlrm.data.encode import EncodeTask, encode_chunk
from dlrm.data.fit import Fitted, fit
from dlrm.data.formats import Source, open_source
from dlrm.data.ingest import Ingested, ingest
from dlrm.data.leakage import check_leakage
from dlrm.data.progress import ProgressBar
from dlrm.data.schema import DataSchema
from dlrm.data.splits import SPLITS
from dlrm.data.vocabulary import VOCABULARY
from dlrm.data.work import Progress, WorkerDied, Workers, named_full_disk, remove_scratch, whole_file
from dlrm.this_machine import count_cores

BLOCK_BYTES = 16 << 20
ORIGIN, WORK, FAULT = "prepared_from.json", ".work", "fault"


def prepare(
    schema: DataSchema,
    sources: Sequence[Path | str],
    out: Path | str,
    *,
    processes: int | None = None,
    block_bytes: int = BLOCK_BYTES,
    progress: Progress | None = None,
) -> Dataset:
    """Turn raw files into a prepared dataset, or open it if that has been done already.

    Call it under `if __name__ == "__main__":`, as every program that starts processes.

    Args:
        schema: which columns are label, time, numbers and ids.
        sources: files, folders or globs, in chronological order where the split is by order.
        out: the dataset's folder; if an unfinished preparation of the same input lies there, it goes on.
        processes: to work with; None takes one per core.
        block_bytes: of the source per task; a process needs about ten times as much memory.
        progress: is told (stage, share that is done, rows); None shows a bar where stderr is a terminal.

    Raises:
        ValueError: the source does not fit the schema, is damaged or empty; `out` holds something else; the disk is
            full.
    """
    out = Path(out)
    source = open_source(schema, sources)
    origin = _describe_origin(schema, source, block_bytes)
    if _is_finished(out, origin):
        shutil.rmtree(out / WORK, ignore_errors=True)
        return Dataset(out)
    processes = _count_processes(processes, blocks=-(-origin["files_bytes"] // block_bytes))
    with named_full_disk(out), _locked(out), ProgressBar.unless(progress) as show, Workers(processes, show) as workers:
        with whole_file(out / ORIGIN) as scratch:
            scratch.write_text(json.dumps(origin, indent=1) + "\n")
        remove_scratch(out)
        info = _run_stages(schema, source, out, block_bytes, workers)
        info.write(out)
    for warning in info.origin["warnings"]:
        print(f"recforge: warning: {warning}", file=sys.stderr)
    shutil.rmtree(out / WORK, ignore_errors=True)
    return Dataset(out)


def _count_processes(wanted: int | None, *, blocks: int) -> int:
    if wanted is not None and wanted < 1:
        raise ValueError(f"--processes: expected at least 1, got {wanted}")
    return max(1, min(wanted or count_cores(), blocks))


def _run_stages(schema: DataSchema, source: Source, out: Path, block_bytes: int, workers: Workers) -> DatasetInfo:
    with _marked_faults(out / WORK / FAULT):
        ingested = ingest(schema, source, out / WORK, block_bytes, workers)
        fitted = fit(schema, ingested, out / WORK, out, workers)
    parts = _encode(schema, ingested, fitted, out, workers)
    info = _describe(schema, source, ingested, fitted, parts)
    check = check_leakage(Dataset(out, info), workers)
    found = check["time_ranges"] if schema.split.by == "time" else ingested.cuts.row_ranges
    ranges = {split: (float(first), float(last)) for split, (first, last) in found.items()}
    return dataclasses.replace(info, time_ranges=ranges, origin=info.origin | {"leakage_check": check})


def _describe_origin(schema: DataSchema, source: Source, block_bytes: int) -> dict[str, Any]:
    """Return what the result depends on; files are known by name, size and time of change, so that folders may move."""
    states = [(file, file.stat()) for file in source.all_files]
    origin = {
        "format_version": FORMAT_VERSION,
        "block_bytes": block_bytes,
        "schema": dataclasses.asdict(schema),
        "files_bytes": sum(state.st_size for _, state in states),
        "files": [[file.name, state.st_size, state.st_mtime_ns] for file, state in states],
    }
    as_read: dict[str, Any] = json.loads(json.dumps(origin))
    return as_read


def source_identity(schema: DataSchema, sources: Sequence[Path | str]) -> str:
    """Return a digest of all that `prepare` takes for its input, for the name of a folder: it follows every change.

    Raises:
        ValueError: a file is absent or does not fit the schema.
    """
    origin = _describe_origin(schema, open_source(schema, sources), BLOCK_BYTES)
    return xxhash.xxh3_64_hexdigest(json.dumps(origin).encode())


def _is_finished(out: Path, origin: dict[str, Any]) -> bool:
    """Return whether `out` holds the finished result.

    Raises:
        ValueError: it holds, finished or not, the result of other input, or files that are not ours.
    """
    path = out / ORIGIN
    if path.is_file():
        try:
            former = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            former = {}
        changed = [name for name in origin if former.get(name) != origin[name]]
        if changed and (out / WORK / FAULT).is_file():
            for name in (WORK, VOCABULARY, *SPLITS):
                shutil.rmtree(out / name, ignore_errors=True)
            path.unlink()
        elif changed:
            raise ValueError(
                f"{out} holds a dataset that was prepared from other input (differs in {', '.join(changed)}); "
                "delete it, or choose another folder"
            )
        return (out / DESCRIPTION).is_file()
    if out.is_dir() and any(entry.name != WORK for entry in out.iterdir()):
        raise ValueError(f"expected an empty or new folder for the dataset, {out} holds other files; choose another")
    return False


@contextmanager
def _marked_faults(mark: Path) -> Iterator[None]:
    """Leave a mark if the source or the schema is at fault: they will be changed, and then the work is of no use."""
    try:
        yield
    except ValueError as error:
        if not isinstance(error, WorkerDied):
            mark.touch()
        raise


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second process out of the work folder; the lock ends with the process."""
    try:
        (out / WORK).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"expected a folder that can be written for the dataset, {out} cannot be made ({error.strerror}); "
            "choose another"
        ) from error
    with (out / WORK / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{out} is being prepared by another process; wait for it") from error
        yield


def _encode(
    schema: DataSchema, ingested: Ingested, fitted: Fitted, out: Path, workers: Workers
) -> list[dict[str, Any]]:
    """Write the parts and return what is known of each, in their order."""
    pieces = ingested.cuts.pieces(ingested.rows)
    tasks = [
        EncodeTask(
            chunk=chunk,
            pieces=here,
            schema=schema,
            features=fitted.features,
            transforms=fitted.transforms,
            lookups=fitted.lookups,
            time_type=ingested.time_type,
            dataset=out,
            out=out / WORK / "encoded" / f"{chunk.name}.json",
        )
        for chunk, here in zip(ingested.chunks, pieces, strict=True)
    ]
    done = workers.run_stage(
        "encode",
        encode_chunk,
        tasks,
        total_rows=ingested.cuts.rows,
        count_rows=lambda task: sum(piece.stop - piece.start for piece in task.pieces),
    )
    return sorted((fact for _, facts in done for fact in facts), key=lambda fact: int(fact["part"]))


def _describe(
    schema: DataSchema, source: Source, ingested: Ingested, fitted: Fitted, parts: list[dict[str, Any]]
) -> DatasetInfo:
    by_split = {split: [part for part in parts if part["split"] == split] for split in SPLITS}
    splits = {split: tuple(PartInfo(**part["info"]) for part in found) for split, found in by_split.items() if found}
    labels = {
        split: (sum(part["clicks"] for part in by_split[split]), sum(info.rows for info in infos))
        for split, infos in splits.items()
    }
    return DatasetInfo(
        numeric=fitted.numeric,
        features=fitted.features,
        splits=splits,
        extra=("time",) if schema.time else (),
        origin={
            "schema": dataclasses.asdict(schema),
            "sources": [{"file": file.name, "bytes": file.stat().st_size} for file in source.all_files],
            "rows": ingested.cuts.rows,
            "clicks": {split: clicks for split, (clicks, _) in labels.items()},
            "warnings": find_warnings(schema, labels, fitted.origin["vocabulary"]),
        }
        | fitted.origin,
    )
