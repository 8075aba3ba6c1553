"""The commands `recforge prepare` and `recforge init`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dlrm.cli import parse
from dlrm.data.known import KnownSource, known_schema
from dlrm.data.schema import DataSchema
from dlrm.this_machine import count_cores

if TYPE_CHECKING:
    from dlrm.data.dataset import Dataset


@dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Turn raw files into a prepared dataset; killed, it goes on where it stopped when it is started again."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files, folders or globs in chronological order, then the folder to write; or a configuration file, then that
    folder; or, with --verify, a dataset."""
    schema: Path | None = None
    """A configuration file (see `recforge init`) whose [data] describes the columns; without it they are inferred."""
    recipe: KnownSource | None = None
    """The columns of a known data set."""
    processes: int | None = None
    """Processes to work with; None takes one per core."""
    block_bytes: int = 16 << 20
    """Of the source per task; a process needs about ten times as much memory."""
    verify: bool = False
    """Check an existing dataset instead: the checksum of every part, and that nothing leaked from test to training."""


@dataclass(frozen=True, kw_only=True)
class InitArguments:
    """Look at the first rows of data and write a configuration for it."""

    data: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files, folders or globs, all of one format."""
    output: Path = Path("recforge.toml")
    """The configuration file to write."""
    label: str | None = None
    """The column to predict, where it cannot be told."""
    time: str | None = None
    """The column that orders events, where it cannot be told."""


def run_prepare(argv: list[str]) -> int:
    """Prepare a dataset, or verify one."""
    arguments = parse(PrepareArguments, argv, program="recforge prepare")
    if arguments.verify:
        return _verify(arguments)
    schema, sources, out = _find_schema(arguments)
    from dlrm.data.prepare import prepare

    print(
        describe_dataset(
            prepare(schema, sources, out, processes=arguments.processes, block_bytes=arguments.block_bytes)
        )
    )
    return 0


def _find_schema(arguments: PrepareArguments) -> tuple[DataSchema, tuple[Path, ...], Path]:
    """Return schema, files and folder; without a configuration or a recipe, the schema is inferred, and shown."""
    *sources, out = arguments.paths or (Path(),)
    if not sources:
        raise ValueError("expected SOURCE... OUT, got fewer than two paths; see `recforge prepare --help`")
    if arguments.recipe is not None:
        return known_schema(arguments.recipe), tuple(sources), out
    from dlrm.data.config_file import load_config

    if arguments.schema is not None:
        return load_config(arguments.schema).schema, tuple(sources), out
    if len(sources) == 1 and sources[0].suffix == ".toml":
        config = load_config(sources[0])
        return config.schema, config.sources, out
    from dlrm.data.config_text import format_config
    from dlrm.data.infer import infer_schema

    inference = infer_schema(sources)
    print(format_config(inference, sources, Path("recforge.toml")))
    return inference.schema, tuple(sources), out


def _verify(arguments: PrepareArguments) -> int:
    from dlrm.data.dataset import Dataset
    from dlrm.data.leakage import check_leakage
    from dlrm.data.progress import ProgressBar
    from dlrm.data.work import Workers

    if len(arguments.paths) != 1:
        raise ValueError(f"--verify: expected one dataset, got {len(arguments.paths)} paths")
    dataset = Dataset(arguments.paths[0])
    dataset.verify()
    if "schema" in dataset.info.origin:
        processes = arguments.processes or count_cores()
        with ProgressBar.unless(None) as progress, Workers(processes, progress) as workers:
            check_leakage(dataset, workers)
    print(describe_dataset(dataset))
    print("every part is what was written, and nothing of the validation or test rows went into the fit")
    return 0


def run_init(argv: list[str]) -> int:
    """Infer a schema and write it."""
    arguments = parse(InitArguments, argv, program="recforge init")
    if not arguments.data:
        raise ValueError("expected a file or folder to look at, got none; see `recforge init --help`")
    from dlrm.data.config_text import write_config
    from dlrm.data.infer import infer_schema

    inference = infer_schema(arguments.data, label=arguments.label, time=arguments.time)
    write_config(inference, arguments.data, arguments.output)
    schema = inference.schema
    print(
        f"{arguments.output}: {schema.format}, label {schema.label}, time {schema.time or '(order of the rows)'}, "
        f"{len(schema.numeric)} numeric and {len(schema.categorical)} categorical columns"
    )
    for name, reason in inference.dropped.items():
        print(f"  left out {name}: {reason}")
    print(f"next: look it over, then recforge train {arguments.output}", file=sys.stderr)
    return 0


def describe_dataset(dataset: Dataset) -> str:
    """Return a table of a dataset: its splits, and how many ids of each feature have a row of their own."""
    lines = [f"{dataset.folder}"]
    for split in dataset.info.splits:
        first, last = dataset.info.time_ranges.get(split, (0, 0))
        lines.append(f"  {split:6} {dataset.rows(split):>12,} rows   {first:.15g} ... {last:.15g}")
    times = dataset.info.origin.get("leakage_check", {}).get("time_ranges", {})
    if any(before[1] > after[0] for before, after in pairwise(times.values())):
        lines.append('  note: the times of these splits overlap; split = {by = "time"} sorts the rows first')
    width = max(len(feature.name) for feature in dataset.info.features)
    facts = {fact["feature"]: fact for fact in dataset.info.origin.get("vocabulary", ())}
    lines += [f"  {len(dataset.info.numeric)} numeric columns, {len(dataset.info.features)} features:"]
    for feature in dataset.info.features:
        line = f"    {feature.name:{width}} {feature.num_rows:>12,} rows"
        fact = facts.get(feature.name, {})
        if "kept" in fact:
            share = fact["kept_ids"] / max(fact["training_ids"], 1)
            line += (
                f"   {fact['kept']:,} of {fact['distinct']:,} values kept, which are {share:.1%} of the training ids"
            )
        lines.append(line)
    return "\n".join(lines)
