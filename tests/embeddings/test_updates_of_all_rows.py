"""LAMB of a whole table is LAMB of a dense weight, and CowClip is what was published, in both ways to count its L2."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dlrm.optim.lamb import Lamb
from embeddings import RowCowClip, RowLamb, TableConfig
from embeddings.local.local_tables import LocalTables

STEPS = 20


def draw(num_rows: int, step: int, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """One id per bag, popular ones more than once and many not at all; what their rows are trained towards."""
    random = np.random.default_rng(step)
    ids = np.minimum(random.geometric(0.2, size) - 1, num_rows - 1)
    return torch.from_numpy(ids), torch.from_numpy(random.normal(size=(size, 6))).float()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("num_rows", [3, 40])
def test_lamb_of_the_table_is_lamb_of_a_dense_weight(num_rows, decay, keyed_jagged):
    settings = {"betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": decay}
    rule = RowLamb(learning_rate=0.02, trust="table", **settings)
    tables = LocalTables([TableConfig(name="a", num_rows=num_rows, dim=6, optimizer=rule, init_scale=0.5)])
    (rows,) = tables.rows()
    dense = nn.EmbeddingBag(num_rows, 6, mode="sum", _weight=rows.weight.clone())
    optimizer = Lamb(dense.parameters(), lr=0.02, **settings)
    for step in range(STEPS):
        ids, target = draw(num_rows, step)
        bags = {"a": [[int(i)] for i in ids]}
        (tables(keyed_jagged(bags)).values() - target).square().mean().backward()
        optimizer.zero_grad()
        (dense(ids[:, None]) - target).square().mean().backward()
        optimizer.step()
        torch.testing.assert_close(rows.weight, dense.weight.detach(), rtol=1e-6, atol=1e-6)
    assert float(rows.state["updates"]) == STEPS


class PublishedCowClip:
    """The published program's order of operations on one dense weight: L2 in the loss, clipping by id, Adam."""

    def __init__(self, rule: RowCowClip, w: np.ndarray) -> None:
        self.rule, self.w = rule, w.astype(np.float64)
        self.m, self.v, self.t = np.zeros_like(self.w), np.zeros_like(self.w), 0
        self.clipped = 0

    def step(self, ids: np.ndarray, gradients: np.ndarray) -> None:
        rule, w = self.rule, self.w
        g = np.zeros_like(w)
        np.add.at(g, ids, gradients)
        g += 2 * rule.l2 * w
        counts = np.ones(len(w))
        present, times = np.unique(ids, return_counts=True)
        counts[present] = times
        bound = rule.clip * np.sqrt(w.shape[1]) * rule.zeta
        most = rule.clip * np.maximum(np.linalg.norm(w, axis=1), bound) * counts
        norm = np.sqrt((g * g).sum(axis=1))
        self.clipped += (norm > most).sum()
        g = g * (most / np.maximum(np.where(norm > 0, norm, 1), most))[:, None]
        self.t += 1
        b1, b2 = rule.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        root = np.sqrt(self.v / (1 - b2**self.t)) + rule.eps
        self.w = w - rule.learning_rate * self.m / (1 - b1**self.t) / root


@pytest.mark.parametrize(
    ("clip", "zeta", "l2", "init_scale"),
    [(1.0, 1e-5, 0.0, 0.01), (0.3, 1e-5, 0.05, 0.1), (0.3, 0.2, 0.01, 0.0), (100.0, 1e-5, 0.02, 0.5)],
    ids=["defaults", "short", "short rows", "never"],
)
def test_cow_clip_is_the_published_one(clip, zeta, l2, init_scale, keyed_jagged):
    rule = RowCowClip(learning_rate=0.02, eps=1e-3, clip=clip, zeta=zeta, l2=l2)
    config = TableConfig(name="a", num_rows=30, dim=6, optimizer=rule, init_scale=init_scale)
    tables = LocalTables([config])
    (rows,) = tables.rows()
    published = PublishedCowClip(rule, rows.weight.numpy())
    for step in range(STEPS):
        ids, target = draw(30, step)
        pooled = tables(keyed_jagged({"a": [[int(i)] for i in ids]})).values()
        gradients = 2 * (pooled.detach() - target).double().numpy() / target.numel()
        (pooled - target).square().mean().backward()
        published.step(ids.numpy(), gradients)
        np.testing.assert_allclose(rows.weight, published.w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows.state["first_moment"], published.m, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows.state["second_moment"], published.v, rtol=1e-5, atol=1e-6)
    assert (published.clipped > 0) == (clip < 100), published.clipped


def test_lazy_cow_clip_differs_in_rows_that_are_away_only(keyed_jagged):
    trained = {}
    for mode in ("dense", "lazy"):
        rule = RowCowClip(learning_rate=0.02, l2=0.01, l2_mode=mode)
        tables = LocalTables([TableConfig(name="a", num_rows=3, dim=4, optimizer=rule, init_scale=0.1)], seed=1)
        for step in range(6):
            bags = {"a": [[0], [0, 1] if step == 3 else []]}
            tables(keyed_jagged(bags)).values().backward(torch.ones(2, 4))
        (trained[mode],) = tables.rows()
    # a row of every batch is the same; one that comes at times is not, and one that never comes stays where it was
    assert not torch.isclose(trained["lazy"].weight[1], trained["dense"].weight[1]).any()
    torch.testing.assert_close(trained["lazy"].weight[0], trained["dense"].weight[0], rtol=1e-6, atol=1e-7)
    start = next(LocalTables([trained["lazy"].config], seed=1).rows()).weight
    assert torch.equal(trained["lazy"].weight[2], start[2])
    assert not torch.isclose(trained["dense"].weight[1:], start[1:]).any()
    assert trained["lazy"].state["last_update"].tolist() == [6, 4, 0]
    assert "last_update" not in trained["dense"].state


def test_l2_of_a_row_that_was_away_is_made_up_for(keyed_jagged):
    # without clipping, after four steps alone the gradient of a row is 2 * l2 * 4 * w
    rule = RowCowClip(learning_rate=0.0, clip=1e6, l2=0.01, l2_mode="lazy", betas=(0.0, 0.0))
    tables = LocalTables([TableConfig(name="a", num_rows=2, dim=4, optimizer=rule, init_scale=0.1)])
    for ids in ([0], [0], [0], [1]):
        tables(keyed_jagged({"a": [ids]})).values().backward(torch.zeros(1, 4))
    (rows,) = tables.rows()
    torch.testing.assert_close(rows.state["first_moment"][1], 0.08 * rows.weight[1])
    torch.testing.assert_close(rows.state["first_moment"][0], 0.02 * rows.weight[0])


def test_many_occurrences_may_move_a_row_further(keyed_jagged):
    rule = RowCowClip(learning_rate=0.1, clip=0.5, betas=(0.0, 0.0))
    tables = LocalTables([TableConfig(name="a", num_rows=3, dim=4, optimizer=rule, init_scale=0.1)])
    (rows,) = tables.rows()
    lengths = rows.weight.norm(dim=1)
    weighted = keyed_jagged({"a": [[0], [1], [1], [1]]}, weights={"a": [[9.0], [9.0], [9.0], [9.0]]})
    tables(weighted).values().backward(torch.ones(4, 4))
    torch.testing.assert_close(rows.state["first_moment"].norm(dim=1)[:2], 0.5 * torch.tensor([1, 3]) * lengths[:2])


def test_rows_and_gradients_of_0_give_no_nan(keyed_jagged):
    for mode in ("dense", "lazy"):
        rule = RowCowClip(learning_rate=0.1, eps=0.0, l2=0.01, l2_mode=mode)
        tables = LocalTables([TableConfig(name="a", num_rows=3, dim=4, optimizer=rule, init_scale=0.0)])
        (rows,) = tables.rows()
        tables(keyed_jagged({"a": [[0]]})).values().backward(torch.zeros(1, 4))
        assert rows.weight.eq(0).all()
        tables(keyed_jagged({"a": [[0]]})).values().backward(torch.ones(1, 4))
        assert (rows.weight[0] < 0).all(), "a row of zeros learns"
        assert rows.weight[1:].eq(0).all()
