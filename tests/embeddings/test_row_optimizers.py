"""Every row optimizer trains as its docstring says, with weighted bags too, and survives rows and gradients of 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embeddings import RowAdagrad, RowAdam, RowCowClip, RowLamb, RowSGD, RowWiseAdagrad, TableConfig
from embeddings.local.local_tables import LocalTables
from embeddings.row_optimizers import moves_all_rows

# eps is large enough that the sign of a gradient near 0, which float32 rounds, decides nothing
OPTIMIZERS = {
    "sgd": RowSGD(learning_rate=0.1, weight_decay=0.1),
    "row-wise adagrad": RowWiseAdagrad(learning_rate=0.1, weight_decay=0.1),
    "adagrad": RowAdagrad(learning_rate=0.1, weight_decay=0.1, eps=1e-3),
    "adam": RowAdam(learning_rate=0.02, eps=1e-3),
    "adam with decay": RowAdam(learning_rate=0.02, betas=(0.5, 0.9), weight_decay=0.1, eps=1e-3),
    "lamb": RowLamb(learning_rate=0.02, eps=1e-3),
    "lamb with decay": RowLamb(learning_rate=0.02, betas=(0.5, 0.9), weight_decay=0.1, eps=1e-3),
    "partial lamb": RowLamb(learning_rate=0.02, partial=True, weight_decay=0.1, eps=1e-3),
    "lamb over touched rows": RowLamb(learning_rate=0.02, trust="touched", eps=1e-3),
    "partial lamb over touched rows": RowLamb(learning_rate=0.02, trust="touched", partial=True, eps=1e-3),
    "lamb over the table": RowLamb(learning_rate=0.02, trust="table", weight_decay=0.1, eps=1e-3),
    "partial lamb over the table": RowLamb(learning_rate=0.02, trust="table", partial=True, eps=1e-3),
    "cowclip": RowCowClip(learning_rate=0.02, eps=1e-3, clip=0.5, l2=0.05),
    "lazy cowclip": RowCowClip(learning_rate=0.02, eps=1e-3, clip=0.5, l2=0.05, l2_mode="lazy"),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_steps_equal_plain_tables(
    name, pooling, weighted, plain_tables, assert_equals_plain, draw_bags, draw_weights, keyed_jagged
):
    configs = [
        TableConfig(name="a", num_rows=40, dim=20, features=("x", "y"), optimizer=OPTIMIZERS[name], pooling=pooling),
        TableConfig(name="b", num_rows=3, dim=5, optimizer=OPTIMIZERS[name], pooling=pooling),
    ]
    tables = LocalTables(configs, seed=1)
    plain = plain_tables(tables)
    random = np.random.default_rng(0)
    for step in range(20):
        bags = draw_bags(configs, batch_size=6, longest=0 if step == 7 else 4, random=random)
        weights = draw_weights(bags, random) if weighted else None
        factors = [1 / (1 + step), 2 / (1 + step)]
        tables.set_learning_rate_factors(factors)
        target = torch.from_numpy(random.normal(size=(6, sum(tables.feature_dims))))
        pooled, expected = tables(keyed_jagged(bags, weights=weights)).values(), plain.look_up(bags, weights)
        torch.testing.assert_close(pooled.double(), expected, rtol=1e-4, atol=1e-5)
        (pooled - target.float()).square().sum().backward()
        (expected - target).square().sum().backward()
        plain.update(bags, factors)
    assert_equals_plain(tables, plain)


@pytest.mark.parametrize("name", [name for name, its in OPTIMIZERS.items() if not moves_all_rows(its)])
def test_rows_that_are_not_in_a_batch_stay(name, keyed_jagged):
    tables = LocalTables([TableConfig(name="a", num_rows=5, dim=3, optimizer=OPTIMIZERS[name])])
    rows = next(tables.rows())
    before = rows.weight.clone()
    for _ in range(3):
        tables(keyed_jagged({"a": [[1, 1], [3], []]})).values().sin().sum().backward()
    assert torch.equal(rows.weight[[0, 2, 4]], before[[0, 2, 4]])
    assert not torch.isclose(rows.weight[[1, 3]], before[[1, 3]]).any()
    assert all(state[[0, 2, 4]].eq(0).all() for state in rows.state.values() if state.dim())


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "make",
    [
        RowAdagrad,
        RowWiseAdagrad,
        RowAdam,
        RowLamb,
        lambda **settings: RowLamb(partial=True, **settings),
        lambda **settings: RowLamb(trust="touched", **settings),
        lambda **settings: RowLamb(trust="table", **settings),
    ],
)
def test_zero_gradients_and_zero_rows_give_no_nan(make, decay, eps, keyed_jagged):
    optimizer = make(learning_rate=0.1, eps=eps, weight_decay=decay)
    tables = LocalTables([TableConfig(name="a", num_rows=4, dim=3, optimizer=optimizer)])
    weight = next(tables.rows()).weight
    weight[2:] = 0
    before = weight.clone()
    batch = keyed_jagged({"a": [[0], [2]]})
    tables(batch).values().backward(torch.zeros(2, 3))
    assert torch.isfinite(weight).all()
    # what never had a gradient moves by decay alone, and rows of zeros not at all
    assert torch.equal(weight[0], before[0]) == (decay == 0)
    assert weight[2:].eq(0).all()
    tables(batch).values().backward(torch.tensor([[1.0, 2, 3], [1, 2, 0]]))
    assert torch.isfinite(weight).all()
    assert (weight[2, :2] < 0).all()


@pytest.mark.parametrize("partial", [False, True])
def test_lamb_moves_a_row_by_the_learning_rate_times_its_own_length(partial, keyed_jagged):
    optimizer = RowLamb(learning_rate=0.01, partial=partial)
    tables = LocalTables([TableConfig(name="a", num_rows=3, dim=16, optimizer=optimizer)])
    weight = next(tables.rows()).weight
    weight[2] = 0
    before = weight.clone()
    tables(keyed_jagged({"a": [[0], [1], [2]]})).values().square().sum().backward()
    moved = (weight - before).norm(dim=1)
    torch.testing.assert_close(moved[:2], 0.01 * before[:2].norm(dim=1), rtol=1e-4, atol=0)
    assert moved[2] == 0  # its gradient was 0
    tables(keyed_jagged({"a": [[2]]})).values().backward(torch.ones(1, 16))
    assert weight[2].ne(0).all()  # a ratio of 1, not of 0


def test_nan_in_a_gradient_reaches_the_row(keyed_jagged):
    # the guards look for it there; a kernel that swallowed it would hide a run that diverged
    for name, optimizer in OPTIMIZERS.items():
        tables = LocalTables([TableConfig(name="a", num_rows=3, dim=2, optimizer=optimizer)])
        tables(keyed_jagged({"a": [[1]]})).values().backward(torch.tensor([[float("nan"), 1.0]]))
        assert torch.isnan(next(tables.rows()).weight[1, 0]), name


def test_adams_bias_correction_counts_the_tables_updates(keyed_jagged):
    configs = [
        TableConfig(name=name, num_rows=2, dim=2, optimizer=RowAdam(learning_rate=0.1, eps=0.0)) for name in ("a", "b")
    ]
    tables = LocalTables(configs)
    for _ in range(3):
        tables(keyed_jagged({"a": [[0]], "b": [[]]})).values().sum().backward()
    rows = list(tables.rows())
    assert [float(row.state["updates"]) for row in rows] == [3, 3]
    before = rows[1].weight[1].clone()
    tables(keyed_jagged({"a": [[]], "b": [[1]]})).values().sum().backward()
    # m = .1, v = .001, corrected for 4 updates although it is this row's first
    expected = 0.1 * (0.1 / (1 - 0.9**4)) / (0.001 / (1 - 0.999**4)) ** 0.5
    torch.testing.assert_close(before - rows[1].weight[1], torch.full((2,), expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_from_a_saved_state_as_if_never_interrupted(name, keyed_jagged, draw_bags):
    configs = [TableConfig(name="a", num_rows=9, dim=4, optimizer=OPTIMIZERS[name])]
    random = np.random.default_rng(0)
    batches = [keyed_jagged(draw_bags(configs, batch_size=5, longest=3, random=random)) for _ in range(6)]
    whole, resumed = LocalTables(configs, seed=1), LocalTables(configs, seed=2)
    for i, batch in enumerate(batches):
        if i == 3:
            resumed.load_state_dict({key: tensor.clone() for key, tensor in whole.state_dict().items()})
        for tables in (whole, resumed)[: 1 if i < 3 else 2]:
            tables(batch).values().sin().sum().backward()
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key
