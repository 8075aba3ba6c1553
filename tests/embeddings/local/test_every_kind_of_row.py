"""Every row optimizer updates rows of every type as float64 would, alike for any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embeddings import RowAdagrad, RowAdam, RowCowClip, RowLamb, RowSGD, RowWiseAdagrad, TableConfig
from embeddings.local.local_tables import LocalTables

OPTIMIZERS = {
    "sgd": RowSGD(learning_rate=0.1, weight_decay=0.1),
    "row-wise adagrad": RowWiseAdagrad(learning_rate=0.1, weight_decay=0.1),
    "adagrad": RowAdagrad(learning_rate=0.1, weight_decay=0.1, eps=1e-3),
    "adam": RowAdam(learning_rate=0.02, weight_decay=0.1, eps=1e-3),
    "lamb": RowLamb(learning_rate=0.02, weight_decay=0.1, eps=1e-3),
    "partial lamb": RowLamb(learning_rate=0.02, partial=True, eps=1e-3),
    "lamb over touched rows": RowLamb(learning_rate=0.02, trust="touched", eps=1e-3),
    "lamb over the table": RowLamb(learning_rate=0.02, trust="table", weight_decay=0.1, eps=1e-3),
    "cowclip": RowCowClip(learning_rate=0.02, eps=1e-3, clip=0.2, l2=0.05),
    "lazy cowclip": RowCowClip(learning_rate=0.02, eps=1e-3, clip=0.2, l2=0.05, l2_mode="lazy"),
}
# the distance of two neighbours over a number, at most
SPACINGS = {"bf16": 2.0**-7, "fp16": 2.0**-10}


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("row_type", SPACINGS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_of_16_bits_come_to_lie_beside_what_float64_gives(
    name, row_type, pooling, plain_tables, draw_bags, draw_weights, keyed_jagged
):
    # 70 columns: one block of registers, and what is left over
    config = TableConfig(
        name="a",
        num_rows=40,
        dim=70,
        optimizer=OPTIMIZERS[name],
        row_type=row_type,
        pooling=pooling,
        init_scale=1.0,
    )
    tables = LocalTables([config], seed=1)
    plain = plain_tables(tables)
    random = np.random.default_rng(0)
    bags = draw_bags([config], batch_size=30, longest=4, random=random)
    weights = draw_weights(bags, random)
    gradient = torch.from_numpy(random.normal(size=(30, 70)))
    tables(keyed_jagged(bags, weights=weights)).values().backward(gradient.float())
    plain.look_up(bags, weights).backward(gradient)
    plain.update(bags)
    (rows,), expected = tables.rows(), plain.weights[0].detach()
    away = (rows.weight.double() - expected).abs()
    assert (away <= SPACINGS[row_type] * expected.abs() + 1e-5).all()
    assert away.max() > 0
    for state, tensor in rows.state.items():
        if tensor.dim():
            torch.testing.assert_close(tensor.double(), plain.states[0][state], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("row_type", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_are_the_same_for_any_number_of_threads(name, row_type, draw_bags, draw_weights, keyed_jagged):
    configs = [
        TableConfig(name="hot", num_rows=50, dim=70, features=("x", "y"), optimizer=OPTIMIZERS[name]),
        TableConfig(name="b", num_rows=500, dim=8, row_type=row_type, optimizer=OPTIMIZERS[name], pooling="mean"),
    ]
    before, trained = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            tables, random = LocalTables(configs), np.random.default_rng(0)
            for _ in range(2):
                bags = draw_bags(configs, batch_size=100, longest=6, random=random)
                weights = draw_weights(bags, random)
                tables(keyed_jagged(bags, weights=weights)).values().sin().sum().backward()
            trained[threads] = tables.state_dict()
    finally:
        torch.set_num_threads(before)
    for key, tensor in trained[1].items():
        assert torch.equal(tensor, trained[2][key]), key
        assert torch.equal(tensor, trained[3][key]), key
