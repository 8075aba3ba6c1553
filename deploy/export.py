"""`recforge export`: a trained model as one folder of safetensors files, whatever ranks held it.

- `tables-00001.safetensors` ...: every table's rows, whole, as `<table>.weight` [num_rows, dim].
- `dense.safetensors`: every other weight.
- `model.json`: which file holds which table, and what is needed to use them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dlrm.cli import parse

if TYPE_CHECKING:
    from dlrm.training.checkpoint import Restored
    from dlrm.training.pieces import Parts

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

    A table is never in memory as a whole.

    Raises:
        ValueError: the source is no run or checkpoint or is damaged, or the output holds something.
    """
    from safetensors.torch import save_file

    from dlrm.training.atomic_folder import make_folder, sync
    from dlrm.training.tensor_file import write_tensors

    output = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"expected --output to be a new folder, got {output}, which is there")
    restored, run = _find(arguments)
    tables: Parts = restored.state["tables"]
    files = _distribute(tables, arguments)
    model = _describe(restored, run, files)
    with make_folder(output.absolute()) as folder:
        save_file({name: tensor.contiguous() for name, tensor in restored.state["dense"].items()}, folder / DENSE)
        for file, names in files.items():
            shapes = {name: (tables[name].dtype, tables[name].shape) for name in names}
            write_tensors(folder / file, shapes, lambda name: tables[name].blocks())
        (folder / MODEL).write_text(json.dumps(model, indent=1) + "\n", encoding="utf-8")
        for path in folder.iterdir():
            path.chmod((folder / MODEL).stat().st_mode)  # safetensors makes files that nobody else may read
            sync(path)
        sync(folder)
    return model


def _find(arguments: ExportArguments) -> tuple[Restored, dict[str, Any]]:
    """Read a checkpoint, whose tables stay on the disk, and the run's configuration."""
    from dlrm.training.checkpoint import CheckpointStore
    from dlrm.training.manifest import MANIFEST
    from dlrm.training.run_config import CONFIG

    source = arguments.source
    is_checkpoint = (source / MANIFEST).is_file()
    run = source.absolute().parent.parent if is_checkpoint else source
    if not is_checkpoint and not (run / "checkpoints").is_dir():
        raise ValueError(f"expected the folder of a run or a checkpoint, got {source}")
    if not (run / CONFIG).is_file():
        raise ValueError(f"expected {run / CONFIG}, which says what the tables of {source} are for, got no such file")
    store = CheckpointStore(run / "checkpoints", read_only=True)
    if is_checkpoint:
        restored: Restored | None = store.restore(source)
    else:
        restored = store.restore_best() if arguments.best else store.restore_latest()
    if restored is None:
        kind = "a checkpoint that was the best" if arguments.best else "a checkpoint"
        raise ValueError(f"expected {kind} in {run / 'checkpoints'}, got none")
    if not hasattr(next(iter(restored.state["tables"].values()), None), "blocks"):
        raise ValueError(
            f"{restored.info.folder}: expected a checkpoint of format 2, got 1; continue its run to save one"
        )
    return restored, json.loads((run / CONFIG).read_text(encoding="utf-8"))


def _distribute(tables: Parts, arguments: ExportArguments) -> dict[str, list[str]]:
    """Decide which tensors lie in which file; all of a table lie in one."""
    by_table: dict[str, list[str]] = {}
    for name in tables:
        if name.endswith(WEIGHT) or arguments.row_states:
            by_table.setdefault(name.rpartition(".")[0], []).append(name)
    groups: list[list[str]] = []
    room = 0.0
    for names in by_table.values():
        size = sum(math.prod(tables[name].shape) * tables[name].dtype.itemsize for name in names)
        if not groups or size > room:
            groups.append([])
            room = arguments.file_gigabytes * 1e9
        groups[-1] += names
        room -= size
    return {f"tables-{number:05d}.safetensors": names for number, names in enumerate(groups, 1)}


def _describe(restored: Restored, run: Mapping[str, Any], files: Mapping[str, list[str]]) -> dict[str, Any]:
    from dlrm.training.manifest import own_versions

    tensors: Parts = restored.state["tables"]
    file_of = {name: file for file, names in files.items() for name in names}
    configs = run["network"]["tables"]
    known = [name for name in configs if f"{name}{WEIGHT}" in tensors]
    others = [n.removesuffix(WEIGHT) for n in tensors if n.endswith(WEIGHT) and n.removesuffix(WEIGHT) not in known]
    tables = []
    for name in (*known, *others):  # in the order in which the model lays their vectors side by side
        key = f"{name}{WEIGHT}"
        rows, dim = tensors[key].shape
        config = configs.get(name, {})
        about = {"features": config.get("features"), "pooling": config.get("pooling")}
        numbers = {"num_rows": rows, "dim": dim, "dtype": str(tensors[key].dtype).removeprefix("torch.")}
        tables.append({"name": name, "file": file_of[key], "tensor": key, **numbers, **about})
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
        "tables": tables,
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
