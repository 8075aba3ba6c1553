"""The state of a run is taken apart and put back: tables by their names, any model, every generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.checkpoints.run_state import (
    load_model,
    load_random_state,
    seed_generators,
    take_model,
    take_random_state,
)
from dlrm.data.dataset import Dataset
from dlrm.model import DLRM
from embeddings import RowOptimizer, RowSGD, RowWiseAdagrad, TableConfig
from embeddings.build import build_tables

CPU = torch.device("cpu")


class TwoSets(nn.Module):
    """A model whose tables lie in two modules, deeper down, and which has a buffer."""

    def __init__(self, seed: int, rows: int = 5) -> None:
        super().__init__()
        optimizers: tuple[RowOptimizer, ...] = (RowWiseAdagrad(learning_rate=0.1), RowSGD(learning_rate=0.1))
        self.towers = nn.ModuleList(
            build_tables([TableConfig(name="user", num_rows=rows, dim=4, optimizer=optimizer)], seed=seed + i)
            for i, optimizer in enumerate(optimizers)
        )
        self.norm = nn.BatchNorm1d(4)
        nn.init.normal_(self.norm.weight)


@pytest.mark.parametrize(
    "make", [TwoSets, lambda seed: nn.Sequential(nn.Linear(2, 3), nn.PReLU(), nn.Linear(3, seed + 1 - seed))]
)
def test_any_model_comes_back(make: Callable[[int], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = make(1), make(7)
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    store = CheckpointStore(tmp_path)
    store.save(take_model(model), samples=1)
    restored = store.restore_latest()
    assert restored is not None
    load_model(other, restored.state)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_rows_lie_under_their_table_s_name(tmp_path: Path, make_dlrm: Callable[..., DLRM], click_log: Dataset) -> None:
    model = make_dlrm(click_log)
    store = CheckpointStore(tmp_path)
    store.save(take_model(model), samples=1)
    store.wait()
    rows = load_file(store.list()[0].folder / "tables.safetensors")
    for config, weight, state, *_ in model.tables.rows():
        assert torch.equal(rows.pop(f"{config.name}.weight"), weight)
        assert torch.equal(rows.pop(f"{config.name}.sum_of_squares"), state["sum_of_squares"])
    assert not rows


def test_tables_that_carried_their_set_s_name_come_back() -> None:
    def make(seed: int) -> nn.ModuleDict:
        sgd = RowSGD(learning_rate=0.1)
        sets = {"catalogue": TableConfig(name="item", num_rows=5, dim=4, optimizer=sgd)}
        sets["sides"] = TableConfig(name="brand", num_rows=3, dim=4, optimizer=sgd)
        return nn.ModuleDict({name: build_tables([table], seed=seed) for name, table in sets.items()})

    model, other = make(1), make(7)
    state = take_model(model)
    sets = {"item": "catalogue", "brand": "sides"}
    former = {f"{sets[key.split('.')[0]]}.{key}": part for key, part in state["tables"].items()}
    assert load_model(other, state | {"tables": former}) == ()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_another_model_is_one_line() -> None:
    complaint = r"^expected .*6 rows for table 'towers\.0\.user', .* 5 rows now .*resized-tables keep.*--output$"
    with pytest.raises(ValueError, match=complaint) as caught:
        load_model(TwoSets(0), take_model(TwoSets(0, rows=6)))
    assert "\n" not in str(caught.value)


def draw() -> list[float]:
    legacy = np.random  # what a model may use
    return [torch.rand(()).item(), torch.randn(()).item(), random.gauss(0, 1), legacy.rand(), legacy.standard_normal()]


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    draw()  # leaves half of a pair of normal numbers behind
    store = CheckpointStore(tmp_path)
    store.save({"random": take_random_state(CPU)}, samples=1)
    expected = [draw() for _ in range(3)]
    restored = store.restore_latest()
    assert restored is not None
    load_random_state(restored.state["random"], CPU)
    assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize("seed", [3, -1, 2**40])
def test_equal_seeds_draw_equal_numbers(seed: int) -> None:
    draws = []
    for given in (seed, seed + 1, seed):
        seed_generators(given)
        draws.append(draw())
    assert draws[0] == draws[2]
    assert all(one != other for one, other in zip(draws[0], draws[1], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")
def test_the_generator_of_a_gpu_goes_on_where_it_was() -> None:
    device = torch.device("cuda", 0)
    torch.rand(3, device=device)
    state = take_random_state(device)
    expected = torch.rand(5, device=device)
    load_random_state(state, device)
    assert torch.equal(torch.rand(5, device=device), expected)
