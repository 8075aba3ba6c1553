"""`recforge export`: a trained model as one folder of safetensors files, whatever ranks held it.

- `tables-00001.safetensors` ...: every table's rows, whole, as `<table>.weight` [num_rows, dim].
- `dense.safetensors`: every other weight.
- `model.json`: which file holds which table, and what is needed to use them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dlrm.cli import parse

if TYPE_CHECKING:
    from torch import Tensor

    from dlrm.checkpoints.checkpoint import Restored
    from dlrm.checkpoints.pieces import Parts

MODEL, DENSE, WEIGHT = "model.json", "dense.safetensors", ".weight"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Write a run's weights as one folder of safetensors files, without ranks and without optimizers."""

    source: Annotated[Path, tyro.conf.Positional]
    """A run's folder, or one checkpoint of a run."""
    output: Path
    """The folder to write; it must not hold anything yet."""
    best: bool = False
    """Of a run, take the best checkpoint instead of the last."""
    row_states: bool = False
    """Write the row optimizers' states beside the rows, as `<table>.<state>`."""
    file_gigabytes: float = 4.0
    """Begin another file when the tables of one have grown to this; a table is never split."""

    def __post_init__(self) -> None:
        if not self.file_gigabytes > 0:
            raise ValueError(f"--file-gigabytes: expected a number above 0, got {self.file_gigabytes}")


def run_export(argv: list[str]) -> int:
    """Export what `argv` names."""
    arguments = parse(ExportArguments, argv, program="recforge export")
    model = export(arguments)
    rows = sum(table["num_rows"] for table in model["tables"])
    print(
        f"{arguments.output}: {len(model['tables'])} tables of {rows:,} rows in {len(model['files'])} files, from the "
        f"checkpoint after {model['samples']:,} samples"
    )
    return 0


def export(arguments: ExportArguments) -> dict[str, Any]:
    """Write the folder, so that it is there whole or not at all, and return the contents of `model.json`.

    Ranks and plan of the run leave no trace in it. A table is never in memory as a whole.

    Raises:
        ValueError: the source is no run or checkpoint or is damaged, the output holds something, or there is no room.
    """
    from safetensors import SafetensorError

    from dlrm.checkpoints.find_run import open_run
    from dlrm.checkpoints.pieces import as_parts

    output = arguments.output
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise ValueError(f"expected --output to be a new folder, got {output}, which is there")
    restored, run = open_run(arguments.source, best=arguments.best)
    for line in restored.skipped:
        print(f"recforge: {line}", file=sys.stderr)
    tables = as_parts(restored.state["tables"])
    files = _distribute(_order(tables, run, row_states=arguments.row_states), tables, arguments.file_gigabytes)
    model = _describe(restored, run, tables, files)
    try:
        _write(output.absolute(), restored.state["dense"], tables, files, model)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{output} was not written ({error}); make room there or choose another --output") from error
    return model


def _write(
    output: Path,
    dense: Mapping[str, Tensor],
    tables: Parts,
    files: Mapping[str, Sequence[str]],
    model: Mapping[str, Any],
) -> None:
    from safetensors.torch import save_file

    from dlrm.checkpoints.atomic_folder import make_folder, sync
    from dlrm.checkpoints.tensor_file import write_tensors

    with make_folder(output) as folder:
        save_file({name: tensor.contiguous() for name, tensor in dense.items()}, folder / DENSE)
        for file, names in files.items():
            shapes = {name: (tables[name].dtype, tables[name].shape) for name in names}
            write_tensors(folder / file, shapes, lambda name: tables[name].blocks())
        (folder / MODEL).write_text(json.dumps(model, indent=1) + "\n", encoding="utf-8")
        for path in folder.iterdir():
            path.chmod((folder / MODEL).stat().st_mode)  # safetensors makes files that nobody else may read
            sync(path)
        sync(folder)


def _order(tables: Parts, run: Mapping[str, Any], *, row_states: bool) -> dict[str, list[str]]:
    """Return each table's tensors, its rows first, in the order in which the model lays their vectors side by side."""
    stored = {name.removesuffix(WEIGHT) for name in tables if name.endswith(WEIGHT)}
    known = [name for name in run["network"]["tables"] if name in stored]
    ordered = {table: [f"{table}{WEIGHT}"] for table in (*known, *sorted(stored - set(known)))}
    if row_states:
        for name in sorted(tables):
            if not name.endswith(WEIGHT):
                ordered[name.rpartition(".")[0]].append(name)
    return ordered


def _distribute(ordered: Mapping[str, list[str]], tables: Parts, file_gigabytes: float) -> dict[str, list[str]]:
    """Decide which tensors lie in which file; all of a table lie in one."""
    groups: list[list[str]] = []
    room = 0.0
    for names in ordered.values():
        size = sum(math.prod(tables[name].shape) * tables[name].dtype.itemsize for name in names)
        if not groups or size > room:
            groups.append([])
            room = file_gigabytes * 1e9
        groups[-1] += names
        room -= size
    return {f"tables-{number:05d}.safetensors": names for number, names in enumerate(groups, 1)}


def _describe(
    restored: Restored, run: Mapping[str, Any], tables: Parts, files: Mapping[str, list[str]]
) -> dict[str, Any]:
    from dlrm.checkpoints.manifest import own_versions

    configs = run["network"]["tables"]
    described = []
    for file, key in ((file, name) for file, names in files.items() for name in names if name.endswith(WEIGHT)):
        rows, dim = tables[key].shape
        config = configs.get(key.removesuffix(WEIGHT), {})
        about = {"features": config.get("features"), "pooling": config.get("pooling")}
        numbers = {"num_rows": rows, "dim": dim, "dtype": str(tables[key].dtype).removeprefix("torch.")}
        described.append({"name": key.removesuffix(WEIGHT), "file": file, "tensor": key, **numbers, **about})
    return {
        "format": "recforge",
        "format_version": FORMAT_VERSION,
        "written_with": own_versions(),
        "recipe": run.get("recipe"),
        "samples": restored.info.samples,
        "metric": restored.info.metric,
        "is_best": restored.info.is_best,
        "files": [DENSE, *files],
        "dense": {"file": DENSE, "shapes": {n: list(tensor.shape) for n, tensor in restored.state["dense"].items()}},
        "tables": described,
        "model": run.get("model"),
        **_describe_data(run),
    }


def _describe_data(run: Mapping[str, Any]) -> dict[str, Any]:
    """Say which columns the model was trained on, if the dataset is still there."""
    path = Path(run.get("dataset") or "") / "dataset.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"dataset": run.get("dataset"), "numeric": None}
    return {"dataset": run.get("dataset"), "numeric": data["numeric"]}
