"""What ranks saved, under whatever plan, is exported as if one process had saved it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deploy.export import ExportArguments, export
from dlrm.checkpoints.checkpoint import CheckpointStore
from embeddings import ShardingPlan, TableConfig
from embeddings.shards import place

ReadAlone = Callable[[Path], dict[str, Tensor]]
ReadBytes = Callable[[Path], dict[str, bytes]]

# what `RankCheckpoints.plan` is told
PLANS: dict[str, tuple[Any, ...]] = {
    "two, row-wise": (2, "row_wise"),
    "two, column-wise": (2, "column_wise"),
    "two, nothing on rank 0": (2, "table_wise"),
    "three, row-wise": (3, "row_wise"),
    "three, each another": (3, "table_wise", "replicated", "column_wise"),
    "four, grid": (4, "grid"),
}


@pytest.mark.parametrize("name", PLANS)
def test_ranks_and_plans_leave_no_trace(
    name: str, rank_checkpoints: Any, read_alone: ReadAlone, read_bytes: ReadBytes, tmp_path: Path
) -> None:
    tensors = rank_checkpoints.make_tensors()
    alone = rank_checkpoints.write(tmp_path / "alone", rank_checkpoints.plan(1, "table_wise"))
    run = rank_checkpoints.write(tmp_path / "run", rank_checkpoints.plan(*PLANS[name]))
    for states in (False, True):
        folders = tmp_path / f"alone-{states}", tmp_path / f"run-{states}"
        for source, output in zip((alone, run), folders, strict=True):
            export(ExportArguments(source=source, output=output, row_states=states, file_gigabytes=1.3e-6))
        ours, theirs = (read_bytes(folder) for folder in folders)
        assert ours == theirs
        assert set(ours) == {"model.json", "dense.safetensors", *(f"tables-0000{n}.safetensors" for n in (1, 2))}
        found = read_alone(folders[1])
        assert torch.equal(found.pop("w"), torch.arange(5.0))
        assert set(found) == {name for name in tensors if states or name.endswith(".weight")}
        for key, tensor in found.items():
            assert tensor.dtype == tensors[key].dtype
            assert torch.equal(tensor, tensors[key])
        model = json.loads(ours["model.json"])
        assert [table["name"] for table in model["tables"]] == ["z", "a.b", "m"]
        assert model["tables"][0]["features"] == ["item", "last_item"]
        assert model["tables"][0]["pooling"] == "mean"
        assert model["tables"][1]["dtype"] == "bfloat16"


def test_files_are_split_between_tables(rank_checkpoints: Any, tmp_path: Path) -> None:
    tensors = rank_checkpoints.make_tensors()
    run = rank_checkpoints.write(tmp_path / "run", rank_checkpoints.plan(3, "row_wise"))
    for number, (limit, expected) in enumerate(
        {
            4.0: [["z", "a.b", "m"]],
            1.3e-6: [["z", "a.b"], ["m"]],  # of 1200, 84 and 744 bytes
            1e-9: [["z"], ["a.b"], ["m"]],
        }.items()
    ):
        output = tmp_path / f"out-{number}"
        model = export(ExportArguments(source=run, output=output, file_gigabytes=limit))
        assert model["files"] == [
            "dense.safetensors",
            *(f"tables-{n:05d}.safetensors" for n in range(1, 1 + len(expected))),
        ]
        for file, names in zip(model["files"][1:], expected, strict=True):
            assert sorted(load_file(output / file)) == sorted(f"{name}.weight" for name in names)
        for table in model["tables"]:
            assert torch.equal(load_file(output / table["file"])[table["tensor"]], tensors[table["tensor"]])
    with pytest.raises(ValueError, match="--file-gigabytes: expected a number above 0, got 0"):
        ExportArguments(source=run, output=tmp_path / "out", file_gigabytes=0.0)


def test_a_table_is_never_in_memory_as_a_whole(rank_checkpoints: Any, tmp_path: Path) -> None:
    config = TableConfig(name="big", num_rows=1 << 19, dim=64)  # 128 MB
    plan = ShardingPlan(ranks=2, ranks_per_node=1, tables=(place(config, "column_wise", [0, 1]),))
    rank_checkpoints.write(tmp_path / "run", plan, {"big.weight": torch.ones(1 << 19, 64)}, [config])
    program = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        import safetensors.torch, torch, dlrm.checkpoints.checkpoint
        from deploy.export import ExportArguments, export
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        export(ExportArguments(source=Path("run"), output=Path("out")))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 64 * 1024
    assert load_file(tmp_path / "out" / "tables-00001.safetensors")["big.weight"].sum() == 1 << 25


def test_what_one_process_wrote_before_there_were_ranks_is_exported_too(
    rank_checkpoints: Any, read_alone: ReadAlone, tmp_path: Path
) -> None:
    tensors = rank_checkpoints.make_tensors()
    run = rank_checkpoints.write(tmp_path / "run", rank_checkpoints.plan(2, "row_wise"))
    store = CheckpointStore(run / "checkpoints", keep_last=2)
    store.save({"dense": {"w": torch.arange(5.0)}, "tables": tensors}, samples=9)
    store.wait()
    assert export(ExportArguments(source=run, output=tmp_path / "out", row_states=True))["samples"] == 9
    found = read_alone(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
