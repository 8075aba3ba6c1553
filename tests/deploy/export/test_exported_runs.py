"""A trained run's export holds the rows and weights of its model, of the checkpoint that was asked for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deploy.cli import main
from deploy.export import ExportArguments, export
from dlrm.data.dataset import Dataset
from dlrm.data.reader import Reader
from dlrm.model import DLRM

PAGE = Path(__file__).resolve().parents[3] / "docs" / "checkpoints.md"
ReadAlone = Callable[[Path], dict[str, Tensor]]
ReadBytes = Callable[[Path], dict[str, bytes]]


def test_a_run_is_exported_as_the_rows_and_weights_of_its_model(
    trained: tuple[Path, DLRM, Dataset], read_alone: ReadAlone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model, dataset = trained
    before = sorted(str(path) for path in run.rglob("*"))
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    num_rows = sum(feature.num_rows for feature in dataset.info.features)
    assert said.out == (
        f"{tmp_path}/out: {len(dataset.info.features)} tables of {num_rows:,} rows in 2 files, from the checkpoint "
        "after 800 samples\n"
    )
    assert said.err == ""
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("model.json", "dense.safetensors", "tables-00001.safetensors")
    }
    found = read_alone(tmp_path / "out")
    for rows in model.tables.rows():
        assert torch.equal(found.pop(f"{rows.config.name}.weight"), rows.weight)
    dense = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("dense.")}
    assert found.keys() == dense.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in dense.items())
    said_of_it = json.loads((tmp_path / "out" / "model.json").read_text())
    assert [table["name"] for table in said_of_it["tables"]] == [feature.name for feature in dataset.info.features]
    assert {(table["pooling"], table["dim"], table["dtype"]) for table in said_of_it["tables"]} == {
        ("sum", 4, "float32")
    }
    assert [table["features"] for table in said_of_it["tables"]] == [[f.name] for f in dataset.info.features]
    assert said_of_it["numeric"] == list(dataset.info.numeric)
    assert said_of_it["model"]["interaction"] == "dot"
    assert (said_of_it["samples"], said_of_it["is_best"], said_of_it["recipe"]) == (800, False, "synthetic")
    # Whoever may read what this user makes may read it; and the run is as it was.
    (tmp_path / "ordinary").touch()
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {(tmp_path / "ordinary").stat().st_mode}
    assert sorted(str(path) for path in run.rglob("*")) == before


def test_the_program_in_the_documentation_predicts_what_the_model_does(
    trained: tuple[Path, DLRM, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model, dataset = trained
    export(ExportArguments(source=run, output=tmp_path / "exported"))
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (program,) = (program for program in programs if "model.json" in program)
    assert not re.search(r"import (dlrm|embeddings|deploy)|from (dlrm|embeddings|deploy)", program)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(program, names)
    batch = next(iter(Reader(dataset, "test").batches(100)))
    bags = {}
    for feature in dataset.info.features:
        jagged = batch.sparse[feature.name]
        bags[feature.name] = [part.tolist() for part in jagged.values().split(jagged.lengths().tolist())]
    assert any(len(bag) != 1 for feature in bags.values() for bag in feature)
    model.eval()
    with torch.no_grad():
        expected = model(batch)
    assert expected.std() > 1e-3
    torch.testing.assert_close(names["predict"](batch.dense, bags), expected, rtol=1e-5, atol=1e-5)


def test_the_best_or_a_named_checkpoint_can_be_taken(
    trained: tuple[Path, DLRM, Dataset], read_alone: ReadAlone, read_bytes: ReadBytes, tmp_path: Path
) -> None:
    run, model, _ = trained
    rows = next(iter(model.tables.rows()))
    name = f"{rows.config.name}.weight"
    (tmp_path / "best").mkdir()  # an empty folder may be there
    assert export(ExportArguments(source=run, output=tmp_path / "best", best=True))["samples"] == 700
    torch.testing.assert_close(read_alone(tmp_path / "best")[name], rows.weight - 0.25, rtol=0, atol=1e-6)
    named = run / "checkpoints" / "samples-000000000700"
    export(ExportArguments(source=named, output=tmp_path / "named"))
    assert read_bytes(tmp_path / "named") == read_bytes(tmp_path / "best")


def test_row_states_are_written_if_asked_for(
    trained: tuple[Path, DLRM, Dataset], read_alone: ReadAlone, tmp_path: Path
) -> None:
    run, model, _ = trained
    export(ExportArguments(source=run, output=tmp_path / "with", row_states=True))
    found = read_alone(tmp_path / "with")
    for rows in model.tables.rows():
        assert rows.state.keys() == {"sum_of_squares"}
        assert torch.equal(found[f"{rows.config.name}.sum_of_squares"], rows.state["sum_of_squares"])
    assert json.loads((tmp_path / "with" / "model.json").read_text())["tables"][0]["tensor"].endswith(".weight")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_told_of(
    trained: tuple[Path, DLRM, Dataset], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    flip(run / "checkpoints" / "samples-000000000800" / "tables.safetensors")
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "from the checkpoint after 700 samples" in said.out
    (line,) = said.err.splitlines()
    assert line.startswith(
        f"recforge: {run}/checkpoints/samples-000000000800: tables.safetensors is damaged (checksum)"
    )
    assert line.endswith("using an earlier checkpoint, after 700 samples")
    for checkpoint in run.glob("checkpoints/*/manifest.json"):
        flip(checkpoint)
    for source in (run / "checkpoints" / "samples-000000000800", run):
        assert main(["export", str(source), "--output", str(tmp_path / "none")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "samples-000000000800: manifest.json" in line
        assert not (tmp_path / "none").exists()
