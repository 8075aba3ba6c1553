"""Rows start, are saved and are found the same way under every kernel, and stay out of the dense parameters."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings import RowSGD, TableConfig
from embeddings.build import build_tables
from embeddings.initial_rows import initial_rows

KERNELS = ["numba", "fbgemm"]
CONFIGS = [
    TableConfig(name="type", num_rows=9, dim=4, features=("x", "y")),
    TableConfig(name="user.id", num_rows=6, dim=8, optimizer=RowSGD(learning_rate=0.1)),
]


def test_initial_rows_depend_on_seed_and_name_only():
    config = TableConfig(name="a", num_rows=1000, dim=16)
    rows = initial_rows(config, seed=3)
    assert torch.equal(rows, initial_rows(config, seed=3))
    assert not torch.equal(rows, initial_rows(config, seed=4))
    assert not torch.equal(rows, initial_rows(TableConfig(name="b", num_rows=1000, dim=16), seed=3))
    scale = 1000**-0.5
    assert -scale <= rows.min() < -0.99 * scale
    assert 0.99 * scale < rows.max() <= scale
    assert abs(float(rows.mean())) < 0.02 * scale
    assert initial_rows(TableConfig(name="a", num_rows=2, dim=2, init_scale=0.0), seed=3).eq(0).all()


def test_initial_rows_are_the_same_in_every_process():
    # written down: a hash that differs from process to process, or a change of the stream, would show here
    rows = initial_rows(TableConfig(name="a", num_rows=1, dim=3), seed=3)
    torch.testing.assert_close(rows, torch.tensor([[0.984889, -0.689886, 0.104367]]), rtol=0, atol=1e-6)


def test_both_kernels_start_equal_and_take_each_others_state(keyed_jagged):
    bags = {"x": [[1, 2], [3]], "y": [[], [3]], "user.id": [[5], [5]]}
    numba, fbgemm = (build_tables(CONFIGS, seed=7, kernel=kernel) for kernel in KERNELS)
    assert list(numba.state_dict()) == list(fbgemm.state_dict())
    assert list(numba.state_dict()) == ["type.weight", "type.sum_of_squares", "user.id.weight"]
    for name, rows in numba.state_dict().items():
        assert torch.equal(rows, fbgemm.state_dict()[name]), name
    for trained, other in [(numba, fbgemm), (fbgemm, numba)]:
        trained(keyed_jagged(bags)).values().sin().sum().backward()
        other.load_state_dict(trained.state_dict())
        for name, rows in trained.state_dict().items():
            assert torch.equal(rows, other.state_dict()[name]), name
        assert torch.equal(trained(keyed_jagged(bags)).values(), other(keyed_jagged(bags)).values())


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_model_saves_its_tables_and_gives_none_to_the_dense_optimizer(kernel, keyed_jagged):
    model = nn.ModuleDict({"tables": build_tables(CONFIGS, kernel=kernel), "top": nn.Linear(16, 1)})
    assert [name for name, _ in model.named_parameters()] == ["top.weight", "top.bias"]
    assert list(model.buffers()) == []
    saved = {name: rows.clone() for name, rows in model.state_dict().items()}
    assert saved["tables.user.id.weight"].shape == (6, 8)
    pooled = model["tables"](keyed_jagged({"x": [[1]], "y": [[2]], "user.id": [[0]]})).values()
    model["top"](pooled).sum().backward()
    assert not torch.equal(model.state_dict()["tables.type.weight"], saved["tables.type.weight"])
    model.load_state_dict(saved)
    assert torch.equal(model.state_dict()["tables.type.weight"], saved["tables.type.weight"])
    assert model.state_dict()["tables.type.sum_of_squares"].eq(0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_state_that_does_not_fit_is_refused(kernel):
    tables = build_tables(CONFIGS, kernel=kernel)
    state = tables.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*type\.weight"):
        tables.load_state_dict({name: rows for name, rows in state.items() if name != "type.weight"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*another\.weight"):
        tables.load_state_dict(state | {"another.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"type\.weight: expected shape \(9, 4\), got \(8, 4\)"):
        tables.load_state_dict(state | {"type.weight": torch.zeros(8, 4)})


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_change_in_training_mode_only(kernel, keyed_jagged):
    tables = build_tables(CONFIGS, kernel=kernel)
    batch = keyed_jagged({"x": [[1]], "y": [[2]], "user.id": [[0]]})
    before = copy.deepcopy(tables.state_dict())
    scale = torch.ones((), requires_grad=True)
    (tables.eval()(batch).values() * scale).sum().backward()
    with torch.no_grad():
        assert not tables.train()(batch).values().requires_grad
    for name, rows in tables.state_dict().items():
        assert torch.equal(rows, before[name]), name
    (tables(batch).values() * scale).sum().backward()
    assert not torch.equal(tables.state_dict()["type.weight"], before["type.weight"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_columns_are_named_in_table_order(kernel, keyed_jagged):
    tables = build_tables(CONFIGS, kernel=kernel)
    pooled = tables(keyed_jagged({"user.id": [[5]], "y": [[2]], "other": [[7]], "x": [[]]}))
    assert pooled.keys() == ["x", "y", "user.id"]
    assert pooled.length_per_key() == [4, 4, 8]
    rows = {row.config.name: row.weight for row in tables.rows()}
    assert torch.equal(pooled["x"], torch.zeros(1, 4))
    assert torch.equal(pooled["y"], rows["type"][2:3])
    assert torch.equal(pooled["user.id"], rows["user.id"][5:6])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("batch_size", [0, 3])
def test_a_batch_without_ids(kernel, batch_size):
    tables = build_tables(CONFIGS, kernel=kernel)
    before = copy.deepcopy(tables.state_dict())
    empty = KeyedJaggedTensor(
        keys=["x", "y", "user.id"],
        values=torch.zeros(0, dtype=torch.int64),
        lengths=torch.zeros(3 * batch_size, dtype=torch.int64),
    )
    pooled = tables(empty).values()
    assert torch.equal(pooled, torch.zeros(batch_size, 16))
    pooled.sum().backward()
    for name, rows in tables.state_dict().items():
        assert torch.equal(rows, before[name]), name


def test_copies_are_independent(keyed_jagged):
    tables = build_tables(CONFIGS)
    twin = copy.deepcopy(tables)
    twin(keyed_jagged({"x": [[1]], "y": [[2]], "user.id": [[0]]})).values().sum().backward()
    assert not torch.equal(twin.state_dict()["type.weight"], tables.state_dict()["type.weight"])


def test_describing_tables_does_not_load_torch():
    code = "import sys, embeddings; print({'torch', 'numba', 'numpy'} & set(sys.modules))"
    ran = [sys.executable, "-c", code]
    assert subprocess.check_output(ran, env={"PYTHONPATH": ":".join(sys.path)}, text=True) == "set()\n"
