"""What some ranks saved under one plan is restored by others under another: every rectangle, bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from dlrm.checkpoints import pieces, tensor_file
from dlrm.checkpoints.checkpoint_folder import complete_checkpoint, own_part, read_state, write_rank_files
from dlrm.checkpoints.manifest import read_manifest, verify_files
from dlrm.checkpoints.run_state import load_model, take_model
from dlrm.checkpoints.state_tree import flatten
from embeddings import TableConfig
from embeddings.interface import TableRows, Tables
from embeddings.shards import SHARDINGS, Shard, place

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = {
    "none": (),
    "per row": ("sum_of_squares",),
    "per number": ("first_moment", "second_moment", "updates"),
    "partial": ("first_moment", "sum_of_squares", "updates"),
    "lazy": ("first_moment", "second_moment", "last_update", "updates"),
}


class Held(Tables):
    """Rectangles of tables, and nothing that looks them up."""

    def __init__(self, configs: Sequence[TableConfig], kinds: dict[str, str], shards: Sequence[tuple[Shard, bool]]):
        super().__init__(configs)
        by_name = {config.name: config for config in configs}
        self.held = []
        for shard, is_primary in shards:
            config = by_name[shard.table]
            shape = (shard.num_rows, shard.num_columns)
            state = {
                name: torch.full(
                    {"updates": (), "sum_of_squares": shape[:1], "last_update": shape[:1]}.get(name, shape), -7.0
                )
                for name in KINDS[kinds[config.name]]
            }
            if "updates" in state:
                state["updates"] = state["updates"].double()
            # Rows of a shard need not lie close together.
            weight = torch.full((shape[0], shape[1] + 3), -7.0, dtype=TYPES[config.row_type])[:, : shape[1]]
            self.held.append(TableRows(config, weight, state, shard.first_row, shard.first_column, is_primary))

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        raise NotImplementedError

    def set_learning_rate_factors(self, factors: Sequence[float]) -> None:
        raise NotImplementedError

    def set_eps_factor(self, factor: float) -> None:
        raise NotImplementedError

    def rows(self) -> Iterator[TableRows]:
        yield from self.held


class Model(nn.Module):
    """Tables and a dense weight."""

    def __init__(self, tables: Tables) -> None:
        super().__init__()
        self.tables = tables
        self.dense = nn.Linear(2, 3)


def truth(config: TableConfig, name: str, first: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Give every number of every tensor a value of its own."""
    salt = sum(map(ord, f"{config.name}{name}"))
    dtype = TYPES[config.row_type] if name == "weight" else torch.float32
    if not shape:
        return torch.tensor(float(salt), dtype=torch.float64)
    numbers = torch.arange(first[0], first[0] + shape[0], dtype=torch.float64)
    if len(shape) == 2:
        columns = torch.arange(first[1], first[1] + shape[1], dtype=torch.float64)
        numbers = numbers[:, None] * config.dim + columns
    return (salt + numbers).sin().to(dtype)


def each_tensor(model: Model) -> Iterator[tuple[TableConfig, str, Tensor, tuple[int, ...]]]:
    for rows in model.tables.rows():
        for name, tensor in {"weight": rows.weight, **rows.state}.items():
            yield rows.config, name, tensor, (rows.first_row, rows.first_column)[: tensor.ndim]


@st.composite
def tilings(draw: st.DrawFn, config: TableConfig, ranks: int) -> list[tuple[Shard, bool]]:
    """Cut a table again and again at any place, and put the pieces on any rank; or as one of the kinds of sharding."""
    if draw(st.booleans()):
        kind = draw(st.sampled_from(SHARDINGS))
        per_node = draw(st.sampled_from([n for n in (1, 2, 3) if ranks % n == 0]))
        plan = place(config, kind, range(ranks), ranks_per_node=per_node)
        return [(shard, kind != "replicated" or shard.rank == 0) for shard in plan.shards]
    boxes = [(0, config.num_rows, 0, config.dim)]
    for _ in range(draw(st.integers(0, 5))):
        top, bottom, left, right = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        if draw(st.booleans()):
            cut = draw(st.integers(top, bottom))
            boxes += [(top, cut, left, right), (cut, bottom, left, right)]
        else:
            cut = draw(st.integers(left, right))
            boxes += [(top, bottom, left, cut), (top, bottom, cut, right)]
        boxes = [box for box in boxes if box[0] < box[1] and box[2] < box[3]]
    boxes = draw(st.permutations(boxes))
    return [
        (
            Shard(
                table=config.name,
                rank=draw(st.integers(0, ranks - 1)),
                first_row=top,
                num_rows=bottom - top,
                first_column=left,
                num_columns=right - left,
            ),
            True,
        )
        for top, bottom, left, right in boxes
    ]


@st.composite
def models(draw: st.DrawFn) -> Any:
    """Tables, and how two crews of ranks hold them."""
    configs = [
        TableConfig(
            name=name,
            num_rows=draw(st.integers(1, 40)),
            dim=draw(st.integers(1, 9)),
            row_type=draw(st.sampled_from(["fp32", "bf16", "fp16"])),
        )
        for name in ("a", "a.b", "type")[: draw(st.integers(1, 3))]
    ]
    kinds = {config.name: draw(st.sampled_from(sorted(KINDS))) for config in configs}
    crews = []
    for ranks in (draw(st.integers(1, 4)), draw(st.integers(1, 4))):
        shards = [shard for config in configs for shard in draw(tilings(config, ranks))]
        crews.append([Held(configs, kinds, [s for s in shards if s[0].rank == rank]) for rank in range(ranks)])
    return configs, crews


def save(folder: Path, models: Sequence[Model], random: Sequence[Tensor]) -> None:
    folder.mkdir()
    states = [
        {**take_model(model), "random": {"torch": random[rank]}, "progress": {"samples": 5}}
        for rank, model in enumerate(models)
    ]
    flat = [flatten(state if not rank else own_part(state)) for rank, state in enumerate(states)]
    for state in flat:  # a store writes copies
        state.tensors = {g: {n: t.contiguous() for n, t in named.items()} for g, named in state.tensors.items()}
    written = [write_rank_files(folder, state, rank) for rank, state in reversed(list(enumerate(flat)))]
    complete_checkpoint(folder, flat[0], written[::-1], samples=5, metric=None, is_best=False)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=models(), block=st.sampled_from([1, 64, 1 << 20]))
def test_any_plan_is_restored_under_any_other(
    drawn: Any, block: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "BLOCK_BYTES", block)
    folder = tmp_path_factory.mktemp("pieces") / "samples-000000000005"
    configs, (before, after) = drawn
    savers = [Model(tables) for tables in before]
    for model in savers:
        for config, name, tensor, first in each_tensor(model):
            tensor.copy_(truth(config, name, first, tuple(tensor.shape)))
    save(folder, savers, [torch.full((3,), float(rank)) for rank in range(len(savers))])
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    assert manifest.ranks == len(savers)
    assert {path.name for path in folder.iterdir()} == {*manifest.files, "manifest.json"}

    for rank, tables in enumerate(after):
        model = Model(tables)
        state = read_state(folder, manifest, rank)
        assert load_model(model, state) == ()
        for config, name, tensor, first in each_tensor(model):
            assert torch.equal(tensor, truth(config, name, first, tuple(tensor.shape))), (config, name, first)
        assert torch.equal(model.dense.weight, savers[0].dense.weight)
        assert state["progress"] == {"samples": 5}
        if rank < len(savers):
            assert state["random"]["torch"].tolist() == [rank] * 3
        else:
            assert state["random"] == {"rank": rank, "samples": 5}
        # Every tensor is there once, whoever held copies of it.
        for name, whole in state["tables"].items():
            assert sum(math.prod(piece.shape) for piece in whole.pieces) == math.prod(whole.shape)
            config = next(config for config in configs if name.rpartition(".")[0] == config.name)
            assert torch.equal(whole.read(), truth(config, name.rpartition(".")[2], (0, 0), whole.shape))
            assert torch.equal(torch.cat([block.reshape(-1) for block in whole.blocks()]), whole.read().reshape(-1))


def held(config: TableConfig, kind: str, ranks: int, *, only: int | None = None) -> list[Model]:
    """Models of one table, row-wise over ranks; `only` leaves the others empty."""
    plan = place(config, "row_wise", range(ranks))
    models = []
    for rank in range(ranks):
        shards = [(shard, True) for shard in plan.shards if shard.rank == rank and only in (None, rank)]
        models.append(Model(Held([config], {config.name: kind}, shards)))
        for table, name, tensor, first in each_tensor(models[-1]):
            tensor.copy_(truth(table, name, first, tuple(tensor.shape)))
    return models


def test_a_rank_writes_its_own_rectangles_and_nothing_else(tmp_path: Path) -> None:
    config = TableConfig(name="a", num_rows=1000, dim=8)
    save(tmp_path / "c", held(config, "per number", 3), [torch.zeros(1)] * 3)
    found = {path.name: load_file(path) for path in (tmp_path / "c").glob("*tables.safetensors")}
    assert set(found) == {"tables.safetensors", "rank-00001.tables.safetensors", "rank-00002.tables.safetensors"}
    assert set(found["rank-00001.tables.safetensors"]) == {
        f"a.{name}[333:666, 0:8]" for name in ("weight", "first_moment", "second_moment")
    }
    assert set(found["tables.safetensors"]) > {"a.updates"}
    whole = 1000 * 8 * 4 * 3 + 8
    assert sum(tensor.nbytes for tensors in found.values() for tensor in tensors.values()) == whole
    assert set(json.loads((tmp_path / "c" / "rank-00001.state.json").read_text())["files"]) == {"random", "tables"}
    assert not (tmp_path / "c" / "rank-00001.dense.safetensors").exists()


def test_a_rank_reads_what_overlaps_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TableConfig(name="a", num_rows=1000, dim=8)
    save(tmp_path / "c", held(config, "per row", 2), [torch.zeros(1)] * 2)
    bytes_read, largest = [0], [0]
    read = tensor_file.TensorFile.read

    def counting(self: tensor_file.TensorFile, *arguments: Any) -> Tensor:
        tensor = read(self, *arguments)
        bytes_read[0] += tensor.nbytes
        largest[0] = max(largest[0], tensor.nbytes)
        return tensor

    monkeypatch.setattr(tensor_file.TensorFile, "read", counting)
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 640)
    for rank in range(4):
        bytes_read[0] = 0
        model = held(config, "per row", 4)[rank]
        load_model(model, read_state(tmp_path / "c", read_manifest(tmp_path / "c"), rank))
        assert bytes_read[0] == 250 * 8 * 4 + 250 * 4
    assert largest[0] == 640


def test_pieces_that_are_missing_are_named(tmp_path: Path) -> None:
    config = TableConfig(name="a", num_rows=10, dim=2)
    with pytest.raises(ValueError, match=r"a\.weight: expected pieces of 20 numbers over all ranks, got 10"):
        save(tmp_path / "c", held(config, "none", 2, only=1), [torch.zeros(1)] * 2)
    assert not (tmp_path / "c" / "manifest.json").exists()


@pytest.mark.parametrize(("rows", "line"), [(14, "rows from 10 on start"), (7, "rows from 7 on are dropped")])
def test_a_table_that_grew_or_shrank_keeps_the_rows_that_both_have(rows: int, line: str, tmp_path: Path) -> None:
    config = TableConfig(name="a", num_rows=10, dim=2)
    save(tmp_path / "c", held(config, "partial", 3), [torch.zeros(1)] * 3)
    other = TableConfig(name="a", num_rows=rows, dim=2)
    for rank in range(2):
        shards = [(shard, True) for shard in place(other, "row_wise", range(2)).shards if shard.rank == rank]
        model = Model(Held([other], {"a": "partial"}, shards))
        state = read_state(tmp_path / "c", read_manifest(tmp_path / "c"), rank)
        with pytest.raises(ValueError, match=rf"10 rows for table 'a', which has {rows} rows now \(--checkpoint\.res"):
            load_model(model, state)
        (said,) = load_model(model, state, resized_tables="keep")
        assert f"table 'a': 10 rows in the checkpoint, {rows} rows now; {line}" in said
        for _, name, tensor, first in each_tensor(model):
            whole = truth(config, name, (0, 0), tuple(tensor.shape[1:]) if not tensor.ndim else (10, *tensor.shape[1:]))
            if tensor.ndim:
                kept = max(0, min(10, first[0] + len(tensor)) - first[0])
                assert torch.equal(tensor[:kept], whole[first[0] : first[0] + kept])
                assert (tensor[kept:] == -7).all()  # as the new model has them
            else:
                assert tensor == whole


def test_new_and_gone_tables_and_other_dims(tmp_path: Path) -> None:
    def model(*tables: tuple[str, int], kind: str = "none") -> Model:
        configs = [TableConfig(name=name, num_rows=6, dim=dim) for name, dim in tables]
        shards = [(shard, True) for config in configs for shard in place(config, "table_wise", [0]).shards]
        return Model(Held(configs, {config.name: kind for config in configs}, shards))

    saved = model(("a", 2), ("b", 2))
    for config, name, tensor, first in each_tensor(saved):
        tensor.copy_(truth(config, name, first, tuple(tensor.shape)))
    save(tmp_path / "c", [saved], [torch.zeros(1)])
    state = read_state(tmp_path / "c", read_manifest(tmp_path / "c"))
    for tables, complaint in {
        (("a", 2),): "6 rows for table 'b', which has no such table now",
        (("a", 2), ("b", 2), ("c", 4)): "no such table for table 'c', which has 6 rows now",
    }.items():
        with pytest.raises(ValueError, match=complaint):
            load_model(model(*tables), state)
    other = model(("a", 2), ("c", 4))
    assert [line[:9] for line in load_model(other, state, resized_tables="keep")] == ["table 'c'", "table 'b'"]
    a, c = other.tables.rows()
    assert torch.equal(a.weight, truth(a.config, "weight", (0, 0), (6, 2)))
    assert (c.weight == -7).all()
    for keep in ("refuse", "keep"):
        with pytest.raises(ValueError, match=r"table 'a' of dim 2 instead of 4; choose another --output"):
            load_model(model(("a", 4), ("b", 2)), state, resized_tables=keep)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"table 'a' with weight instead of sum_of_squares, weight"):
            load_model(model(("a", 2), ("b", 2), kind="per row"), state, resized_tables=keep)  # type: ignore[arg-type]


def test_tensors_whose_rows_come_side_by_side_make_one_file_and_missing_rows_none(tmp_path: Path) -> None:
    wide, narrow = torch.randn(5, 3), torch.arange(5, dtype=torch.float64)
    shapes = {"wide": (torch.float32, (5, 3)), "narrow": (torch.float64, (5,))}
    blocks = [("wide", wide[:2]), ("narrow", narrow[:4]), ("wide", wide[2:]), ("narrow", narrow[4:])]
    tensor_file.write_blocks(tmp_path / "file", shapes, blocks)
    found = load_file(tmp_path / "file")
    assert torch.equal(found["wide"], wide)
    assert torch.equal(found["narrow"], narrow)
    with pytest.raises(ValueError, match=r"^file: expected all rows of narrow, got \[5\] in part"):
        tensor_file.write_blocks(tmp_path / "file", shapes, blocks[:3])
