"""Rows learn from a trainer's part of a batch as they would in a run whose batch is as small."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.asynchronous.config import AsynchronousConfig, ServersConfig
from dlrm.asynchronous.dense_average_config import DenseAverageConfig
from dlrm.asynchronous.shared_batch import SharedBatch
from dlrm.optim.scaling import scale_config
from dlrm.recipes import RECIPES
from dlrm.tables_config import TablesConfig
from embeddings import RowWiseAdagrad, TableConfig
from embeddings.build import build_tables

CONFIG = replace(AsynchronousConfig.of(RECIPES["synthetic"].config), servers=ServersConfig(trainers=4))


@pytest.mark.parametrize(("optimizer", "expected"), [("rowwise_adagrad", 1.0), ("sgd", 0.25)])
def test_rates_of_rows_are_those_of_a_smaller_batch(
    optimizer: Literal["rowwise_adagrad", "sgd"], expected: float
) -> None:
    config = replace(CONFIG, tables=TablesConfig(optimizer=optimizer, learning_rate=1.0))
    part = SharedBatch(nn.Linear(1, 1), config)
    smaller = replace(config.step, global_batch_size=config.trainer_batch_size)
    scaled, _ = scale_config(replace(config, step=smaller, scale_from=config.step.global_batch_size))
    assert part.factor("tables") == scaled.tables.learning_rate == expected
    assert part.factor("dense") == 1.0


def test_rows_move_as_with_gradients_of_the_whole_batch() -> None:
    eps = 0.01
    table = TableConfig(name="t", num_rows=3, dim=2, optimizer=RowWiseAdagrad(learning_rate=1.0, eps=eps))
    ids = KeyedJaggedTensor(keys=["t"], values=torch.tensor([1]), lengths=torch.tensor([1]))
    moved = []
    for config, gradient in ((CONFIG, 4.0), (replace(CONFIG, servers=ServersConfig()), 1.0)):
        tables = build_tables([table])
        SharedBatch(nn.ModuleList([tables]), config)
        before = next(tables.rows()).weight.clone()
        (tables(ids).values().sum() * gradient * 1e-3).backward()
        moved.append(next(tables.rows()).weight - before)
    torch.testing.assert_close(*moved)
    assert moved[0][1].abs().min() > 0


def test_where_servers_update_the_batch_is_whole_and_nothing_changes() -> None:
    on_servers = replace(
        CONFIG, dense=replace(CONFIG.dense, name="adam"), dense_average=DenseAverageConfig(mode="adam")
    )
    part = SharedBatch(nn.Linear(1, 1), on_servers)
    assert {part.factor(group) for group in ("dense", "head", "tables", "small_tables")} == {1.0}
