"""An exported folder holds the model's numbers, whatever ranks saved them; it is there whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from deploy.cli import main
from deploy.export import ExportArguments, export
from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.checkpoints.checkpoint_folder import complete_checkpoint, own_part, write_rank_files
from dlrm.checkpoints.pieces import PartedTensor, Parts, piece_of
from dlrm.checkpoints.run_state import take_model
from dlrm.checkpoints.state_tree import flatten
from dlrm.config import CheckpointConfig, EvaluationConfig, GuardConfig, ModelConfig, RunConfig, StepConfig
from dlrm.data.dataset import Dataset
from dlrm.data.reader import Reader
from dlrm.data.synthetic import SyntheticConfig, generate
from dlrm.model import DLRM, build_dlrm
from dlrm.training.trainer import Trainer
from embeddings import ShardingPlan, TableConfig
from embeddings.shards import Sharding, place

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DLRM, Dataset]:
    """A run of two checkpoints, of which the first is the best; and its model as it was at the last one."""
    folder = tmp_path_factory.mktemp("trained")
    dataset = generate(SyntheticConfig(num_train=1200, num_valid=200, num_test=200, max_ids=90), folder / "data")
    config = RunConfig(
        epochs=0.5,
        step=StepConfig(global_batch_size=200, device="cpu", threads=1),
        model=ModelConfig(dim=4, bottom=(8,), top=(8, 4), dropout=0.1),
        evaluation=EvaluationConfig(every_samples=400, test_best=False),
        guards=GuardConfig(chance_evaluations=0, constant_prediction=False),
        checkpoint=CheckpointConfig(keep_last=2),
    )
    torch.manual_seed(0)
    model = build_dlrm(dataset.info, config.model, config.tables, seed=1, device="cpu")
    Trainer(model, dataset, config, folder / "run", recipe="synthetic").fit()
    store = CheckpointStore(folder / "run" / "checkpoints", keep_last=2)
    store.save(take_model(model), samples=700, metric=0.7, is_best=True)
    with torch.no_grad():
        for rows in model.tables.rows():
            rows.weight.add_(0.25)
    store.save(take_model(model), samples=800, metric=0.7)
    store.wait()
    return folder / "run", model, dataset


def read_alone(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, with the library alone."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
    return tensors


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_is_exported_as_the_rows_and_weights_of_its_model(
    trained: tuple[Path, DLRM, Dataset], tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


def test_the_best_or_a_named_checkpoint_can_be_taken(trained: tuple[Path, DLRM, Dataset], tmp_path: Path) -> None:
    run, model, _ = trained
    rows = next(iter(model.tables.rows()))
    name = f"{rows.config.name}.weight"
    (tmp_path / "best").mkdir()  # an empty folder may be there
    assert export(ExportArguments(source=run, output=tmp_path / "best", best=True))["samples"] == 700
    torch.testing.assert_close(read_alone(tmp_path / "best")[name], rows.weight - 0.25, rtol=0, atol=1e-6)
    named = run / "checkpoints" / "samples-000000000700"
    export(ExportArguments(source=named, output=tmp_path / "named"))
    assert read_bytes(tmp_path / "named") == read_bytes(tmp_path / "best")


def test_row_states_are_written_if_asked_for(trained: tuple[Path, DLRM, Dataset], tmp_path: Path) -> None:
    run, model, _ = trained
    export(ExportArguments(source=run, output=tmp_path / "with", row_states=True))
    found = read_alone(tmp_path / "with")
    for rows in model.tables.rows():
        assert rows.state.keys() == {"sum_of_squares"}
        assert torch.equal(found[f"{rows.config.name}.sum_of_squares"], rows.state["sum_of_squares"])
    assert json.loads((tmp_path / "with" / "model.json").read_text())["tables"][0]["tensor"].endswith(".weight")


CONFIGS = [
    TableConfig(name="z", num_rows=50, dim=6, features=("item", "last_item"), pooling="mean"),
    TableConfig(name="a.b", num_rows=7, dim=6, row_type="bf16"),
    TableConfig(name="m", num_rows=31, dim=6),
]


def make_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for config in CONFIGS:
        shape = (config.num_rows, config.dim)
        dtype = torch.bfloat16 if config.row_type == "bf16" else torch.float32
        tensors[f"{config.name}.weight"] = torch.randn(shape, generator=generator).to(dtype)
        tensors[f"{config.name}.second_moment"] = torch.rand(config.num_rows, generator=generator)
        tensors[f"{config.name}.updates"] = torch.tensor(12.0, dtype=torch.float64)
    return tensors


def own_parts(tensors: dict[str, Tensor], plan: ShardingPlan, rank: int) -> Parts:
    """The rectangles of a rank, as a model under this plan gives them."""
    pieces: dict[str, list[Any]] = {}
    for table in plan.tables:
        for shard in table.shards:
            if shard.rank != rank or (table.sharding == "replicated" and rank):
                continue
            top, left = shard.first_row, shard.first_column
            for name, whole in tensors.items():
                if name.rpartition(".")[0] != shard.table or (whole.ndim < 2 and left) or (whole.ndim == 0 and top):
                    continue
                cut = (slice(top, top + shard.num_rows), slice(left, left + shard.num_columns))[: whole.ndim]
                pieces.setdefault(name, []).append(piece_of(whole[cut].contiguous(), (top, left)[: whole.ndim]))
    return Parts(
        {
            name: PartedTensor(shape=tuple(tensors[name].shape), dtype=tensors[name].dtype, pieces=tuple(held))
            for name, held in pieces.items()
        }
    )


def write_run(run: Path, tensors: dict[str, Tensor], plan: ShardingPlan, configs: Iterable[TableConfig]) -> Path:
    """Write a run's folder with one checkpoint, of the ranks of a plan."""
    folder = run / "checkpoints" / "samples-000000000005"
    folder.mkdir(parents=True)
    tables = {config.name: {"features": config.features, "pooling": config.pooling} for config in configs}
    (run / "config.json").write_text(json.dumps({"recipe": "", "ranks": plan.ranks, "network": {"tables": tables}}))
    states = [
        flatten(state if not rank else own_part(state))
        for rank in range(plan.ranks)
        for state in [{"dense": {"w": torch.arange(5.0)}, "tables": own_parts(tensors, plan, rank)}]
    ]
    written = [write_rank_files(folder, state, rank) for rank, state in enumerate(states)]
    complete_checkpoint(folder, states[0], written, samples=5, metric=None, is_best=False)
    return run


def make_plan(ranks: int, kinds: Iterable[Sharding], per_node: int = 1) -> ShardingPlan:
    everyone = list(range(ranks))
    tables = tuple(
        place(config, kind, everyone[::-1] if kind == "table_wise" else everyone, ranks_per_node=per_node)
        for config, kind in zip(CONFIGS, kinds, strict=True)
    )
    return ShardingPlan(ranks=ranks, ranks_per_node=per_node, tables=tables)


PLANS = {
    "two, row-wise": make_plan(2, ["row_wise"] * 3),
    "two, column-wise": make_plan(2, ["column_wise"] * 3),
    "two, nothing on rank 0": make_plan(2, ["table_wise"] * 3),
    "three, row-wise": make_plan(3, ["row_wise"] * 3),
    "three, each another": make_plan(3, ["table_wise", "replicated", "column_wise"]),
    "four, grid": make_plan(4, ["grid"] * 3, per_node=2),
}


@pytest.mark.parametrize("name", PLANS)
def test_ranks_and_plans_leave_no_trace(name: str, tmp_path: Path) -> None:
    tensors = make_tensors()
    alone = write_run(tmp_path / "alone", tensors, make_plan(1, ["table_wise"] * 3), CONFIGS)
    run = write_run(tmp_path / "run", tensors, PLANS[name], CONFIGS)
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


def test_files_are_split_between_tables(tmp_path: Path) -> None:
    tensors = make_tensors()
    run = write_run(tmp_path / "run", tensors, PLANS["three, row-wise"], CONFIGS)
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


def test_a_table_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    config = TableConfig(name="big", num_rows=1 << 19, dim=64)  # 128 MB
    plan = ShardingPlan(ranks=2, ranks_per_node=1, tables=(place(config, "column_wise", [0, 1]),))
    write_run(tmp_path / "run", {"big.weight": torch.ones(1 << 19, 64)}, plan, [config])
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


def test_what_one_process_wrote_before_there_were_ranks_is_exported_too(tmp_path: Path) -> None:
    tensors = make_tensors()
    run = write_run(tmp_path / "run", tensors, PLANS["two, row-wise"], CONFIGS)
    store = CheckpointStore(run / "checkpoints", keep_last=2)
    store.save({"dense": {"w": torch.arange(5.0)}, "tables": tensors}, samples=9)
    store.wait()
    assert export(ExportArguments(source=run, output=tmp_path / "out", row_states=True))["samples"] == 9
    found = read_alone(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


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


def _empty(run: Path, output: Path) -> list[str]:
    return [str(run.parent), "--output", str(output)]


def _no_checkpoint(run: Path, output: Path) -> list[str]:
    shutil.rmtree(run / "checkpoints" / "samples-000000000005")
    return [str(run), "--output", str(output)]


def _no_config(run: Path, output: Path) -> list[str]:
    (run / "config.json").unlink()
    return [str(run), "--output", str(output)]


def _no_best(run: Path, output: Path) -> list[str]:
    return [str(run), "--best", "--output", str(output)]


def _best_of_one(run: Path, output: Path) -> list[str]:
    return [str(run / "checkpoints" / "samples-000000000005"), "--best", "--output", str(output)]


def _output_is_a_file(run: Path, output: Path) -> list[str]:
    output.write_text("mine")
    return [str(run), "--output", str(output)]


def _output_is_full(run: Path, output: Path) -> list[str]:
    output.mkdir()
    (output / "mine").touch()
    return [str(run), "--output", str(output)]


def _output_in_a_file(run: Path, output: Path) -> list[str]:
    return [str(run), "--output", str(run / "config.json" / "out")]


def _no_such_source(run: Path, output: Path) -> list[str]:
    return [str(run / "nowhere"), "--output", str(output)]


def _no_output(run: Path, output: Path) -> list[str]:
    return [str(run)]


@pytest.mark.parametrize(
    ("prepare", "complaint"),
    [
        (_empty, "expected the folder of a run or a checkpoint, got "),
        (_no_such_source, "expected the folder of a run or a checkpoint, got "),
        (_no_checkpoint, "expected a checkpoint in "),
        (_no_config, "which says what the tables of "),
        (_no_best, "expected a checkpoint that was the best in "),
        (_best_of_one, "--best: expected the folder of a run to choose from, got the checkpoint "),
        (_output_is_a_file, "expected --output to be a new folder, got "),
        (_output_is_full, "expected --output to be a new folder, got "),
        (_output_in_a_file, "make room there or choose another --output"),
        (_no_output, "--output"),
    ],
)
def test_whatever_is_wrong_is_one_line(
    prepare: Callable[[Path, Path], list[str]], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", make_tensors(), PLANS["two, row-wise"], CONFIGS)
    argv = prepare(run, tmp_path / "out")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert main(["export", *argv]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("recforge: error: ")
    assert complaint in line
    assert said.out == ""
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", make_tensors(), PLANS["two, row-wise"], CONFIGS)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dlrm.checkpoints.tensor_file.write_tensors", fail)
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert "--output" in line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# Imports once, and forks an export for each number it is told, which dies before so many operations on its folder.
DYING = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    import safetensors.torch, torch, dlrm.checkpoints.checkpoint
    from deploy.export import ExportArguments, export

    def die_at(operation):
        left = [operation]
        def count(event, arguments):
            if any(isinstance(a, (str, os.PathLike)) and ".writing-" in os.fspath(a) for a in arguments):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)

    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            die_at(int(line))
            export(ExportArguments(source=Path("run"), output=Path("out")))
            os._exit(0)
        print(os.WIFSIGNALED(os.waitpid(child, 0)[1]), flush=True)
    """
)


def test_killed_before_any_operation_it_leaves_nothing_under_its_name(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_tensors(), PLANS["three, row-wise"], CONFIGS)
    export(ExportArguments(source=run, output=tmp_path / "expected"))
    expected, output = read_bytes(tmp_path / "expected"), tmp_path / "out"
    (tmp_path / ".writing-other").mkdir()  # somebody else's
    kills = partly_written = 0
    command = [sys.executable, "-c", DYING]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        killed = True
        while killed:
            kills += 1
            print(kills, file=process.stdin, flush=True)
            killed = process.stdout.readline() == "True\n"
            half = [path for path in tmp_path.glob(".writing-out*") if any(path.iterdir())]
            partly_written += bool(half)
            assert len(half) <= 1  # that of the kill before is removed
            if output.exists():
                assert read_bytes(output) == expected
                assert not killed or not half
                shutil.rmtree(output)
            else:
                assert killed
    assert kills > 12
    assert partly_written > 6
    assert [path.name for path in tmp_path.glob(".writing*")] == [".writing-other"]
