"""A run that was trained, and checkpoints as any number of ranks write them, for the tests of their export."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.checkpoints.checkpoint_folder import complete_checkpoint, own_part, write_rank_files
from dlrm.checkpoints.pieces import PartedTensor, Parts, piece_of
from dlrm.checkpoints.run_state import take_model
from dlrm.checkpoints.state_tree import flatten
from dlrm.config import CheckpointConfig, EvaluationConfig, GuardConfig, ModelConfig, RunConfig, StepConfig
from dlrm.data.dataset import Dataset
from dlrm.data.synthetic import SyntheticConfig, generate
from dlrm.model import DLRM, build_dlrm
from dlrm.training.trainer import Trainer
from embeddings import ShardingPlan, TableConfig
from embeddings.shards import Sharding, place


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def read_alone() -> Callable[[Path], dict[str, Tensor]]:
    """Reads all tensors of a folder, with the library alone."""

    def read(folder: Path) -> dict[str, Tensor]:
        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
        return tensors

    return read


@pytest.fixture(scope="session")
def read_bytes() -> Callable[[Path], dict[str, bytes]]:
    """Reads all files of a folder."""

    def read(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    return read


class RankCheckpoints:
    """Writes a run's folder with one checkpoint, as the ranks of any plan would."""

    configs = (
        TableConfig(name="z", num_rows=50, dim=6, features=("item", "last_item"), pooling="mean"),
        TableConfig(name="a.b", num_rows=7, dim=6, row_type="bf16"),
        TableConfig(name="m", num_rows=31, dim=6),
    )

    def make_tensors(self) -> dict[str, Tensor]:
        """The tables' rows and states."""
        generator = torch.Generator().manual_seed(3)
        tensors = {}
        for config in self.configs:
            shape = (config.num_rows, config.dim)
            dtype = torch.bfloat16 if config.row_type == "bf16" else torch.float32
            tensors[f"{config.name}.weight"] = torch.randn(shape, generator=generator).to(dtype)
            tensors[f"{config.name}.second_moment"] = torch.rand(config.num_rows, generator=generator)
            tensors[f"{config.name}.updates"] = torch.tensor(12.0, dtype=torch.float64)
        return tensors

    def plan(self, ranks: int, *kinds: Sharding) -> ShardingPlan:
        """A kind for each table, or one for all; a grid is over machines of two ranks each."""
        everyone, per_node = list(range(ranks)), 2 if "grid" in kinds else 1
        tables = tuple(
            place(config, kind, everyone[::-1] if kind == "table_wise" else everyone, ranks_per_node=per_node)
            for config, kind in zip(self.configs, kinds * (len(self.configs) // len(kinds)), strict=True)
        )
        return ShardingPlan(ranks=ranks, ranks_per_node=per_node, tables=tables)

    def write(
        self,
        run: Path,
        plan: ShardingPlan,
        tensors: dict[str, Tensor] | None = None,
        configs: Iterable[TableConfig] | None = None,
    ) -> Path:
        """Writes the folder; without tensors and configurations, those from here."""
        tensors = self.make_tensors() if tensors is None else tensors
        configs = self.configs if configs is None else configs
        folder = run / "checkpoints" / "samples-000000000005"
        folder.mkdir(parents=True)
        tables = {config.name: {"features": config.features, "pooling": config.pooling} for config in configs}
        said = {"recipe": "", "ranks": plan.ranks, "network": {"tables": tables}}
        (run / "config.json").write_text(json.dumps(said))
        states = [
            flatten(state if not rank else own_part(state))
            for rank in range(plan.ranks)
            for state in [{"dense": {"w": torch.arange(5.0)}, "tables": _own_parts(tensors, plan, rank)}]
        ]
        written = [write_rank_files(folder, state, rank) for rank, state in enumerate(states)]
        complete_checkpoint(folder, states[0], written, samples=5, metric=None, is_best=False)
        return run


def _own_parts(tensors: dict[str, Tensor], plan: ShardingPlan, rank: int) -> Parts:
    # the rectangles of a rank, as a model under this plan gives them
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


@pytest.fixture(scope="session")
def rank_checkpoints() -> RankCheckpoints:
    """See ``RankCheckpoints``."""
    return RankCheckpoints()
