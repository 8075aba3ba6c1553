"""A change of the batch size in mid-run leaves rare rows their pace and frequent rows alone, in shards too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from embeddings import RowAdagrad, RowAdam, RowCowClip, RowLamb, RowOptimizer, RowSGD, RowWiseAdagrad, TableConfig
from embeddings.interface import TableRows, Tables
from embeddings.local.local_rows import LocalRows, RowsPart
from embeddings.local.local_tables import LocalTables
from embeddings.rescaling import rescale_states

LAZY: dict[str, RowOptimizer] = {
    "sgd": RowSGD(learning_rate=0.1),
    "row-wise adagrad": RowWiseAdagrad(learning_rate=0.1, eps=0.0),
    "adagrad": RowAdagrad(learning_rate=0.1, eps=0.0),
    "adam": RowAdam(learning_rate=0.02, eps=0.0),
    "lamb": RowLamb(learning_rate=0.02, eps=0.0),
    "partial lamb": RowLamb(learning_rate=0.02, eps=0.0, partial=True),
    "lazy cowclip": RowCowClip(learning_rate=0.02, eps=0.0, l2_mode="lazy"),
}


@pytest.mark.parametrize("name", [name for name in LAZY if name != "sgd"])
def test_a_rare_row_takes_the_steps_of_a_constant_scale(name, keyed_jagged):
    """The gradient of one occurrence is h / B: with B four times as large from the tenth on, or ever the same."""
    h = torch.from_numpy(np.random.default_rng(0).normal(1, 1, size=(20, 1, 4))).float()
    weights = {}
    for kind in ("constant", "rescaled", "forgotten"):
        tables = LocalTables([TableConfig(name="a", num_rows=1000, dim=4, optimizer=LAZY[name], init_scale=0.5)])
        (rows,) = tables.rows()
        batch, states = 16.0, []
        for touch in range(20):
            if touch == 10 and kind != "constant":
                if kind == "rescaled":
                    rescale_states(tables, batch, 4 * batch, {"a": torch.zeros(1000)})
                batch *= 4
            tables(keyed_jagged({"a": [[7]]})).values().backward(h[touch] / batch)
            states.append(rows.weight[7].clone())
        weights[kind] = torch.stack(states)
    torch.testing.assert_close(weights["rescaled"], weights["constant"], rtol=2e-5, atol=1e-6)
    away = (weights["forgotten"] - weights["constant"]).abs().amax(dim=1)
    assert (away[:10] == 0).all()
    assert (away[11:] > 1e-4).all()
    assert away[-1] > 2e-3


@pytest.mark.parametrize("rate", [1e-3, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("optimizer", [LAZY["adam"], RowCowClip(learning_rate=0.0), LAZY["adagrad"]], ids=str)
def test_moments_become_those_that_the_new_batches_lead_to(optimizer, rate):
    """Against drawn batches: a row that occurs so often has all gradients alike, and moments are means over touches."""
    random, before, after = np.random.default_rng(0), 32, 128
    tables = LocalTables([TableConfig(name="a", num_rows=2, dim=3, optimizer=optimizer)])
    (rows,) = tables.rows()
    is_lazy = not isinstance(optimizer, RowCowClip)
    means = {}
    for batch in (before, after):
        drawn = random.poisson(rate * batch, 100_000) / batch
        g = drawn[drawn > 0] if is_lazy else drawn
        means[batch] = g.mean(), (g**2).mean()
    for state in rows.state.values():
        state.fill_(1.0)
    rescale_states(tables, before, after, {"a": torch.tensor([rate, 0.0])})
    first, second = (means[after][i] / means[before][i] for i in (0, 1))
    near = {"rel": 0.05}
    if "first_moment" in rows.state:
        assert rows.state["first_moment"][0].tolist() == pytest.approx([first] * 3, **near)
    squares = rows.state["second_moment" if "second_moment" in rows.state else "sum_of_squares"]
    assert squares[0].tolist() == pytest.approx([second] * 3, **near)
    assert squares[1, 0] == pytest.approx(1 / 16 if is_lazy else 1 / 4)
    if "updates" in rows.state:
        assert rows.state["updates"] == 1


def test_frequent_rows_and_sgd_and_weights_are_left_alone():
    for name, optimizer in LAZY.items():
        tables = LocalTables([TableConfig(name="a", num_rows=3, dim=2, optimizer=optimizer)])
        for state in next(tables.rows()).state.values():
            state.fill_(2.0)
        before = {key: tensor.clone() for key, tensor in tables.state_dict().items()}
        rescale_states(tables, 1000, 4000, {"a": torch.tensor([50.0, 1.0, 1.0])})
        for key, tensor in tables.state_dict().items():
            torch.testing.assert_close(tensor, before[key], rtol=2e-3, atol=0, msg=f"{name} {key}")
        assert torch.equal(tables.state_dict()["a.weight"], before["a.weight"])


@pytest.mark.parametrize("optimizer", [*LAZY.values(), RowLamb(learning_rate=0.1, trust="table")], ids=str)
def test_frequencies_may_be_a_sparse_tensor(optimizer):
    """As that of a table with so many rows that as many numbers of 64 bits would be a burden."""
    rates, states = torch.zeros(20, dtype=torch.float64), []
    rates[[3, 9, 15]] = torch.tensor([0.5, 0.01, 0.002], dtype=torch.float64)
    for given in (rates, rates.to_sparse()):
        config = TableConfig(name="a", num_rows=20, dim=6, optimizer=optimizer)
        held = LocalRows([RowsPart(config, r, n, 0, 6) for r, n in ((0, 9), (9, 7), (16, 4))])
        for rows in held.rows():
            for state in rows.state.values():
                state.fill_(2.0)
        rescale_states(Shards(config, held), 16, 64, {"a": given})
        states.append([state.clone() for rows in held.rows() for state in rows.state.values()])
    for whole, sparse in zip(*states, strict=True):
        torch.testing.assert_close(sparse, whole, rtol=1e-6, atol=0)


def test_without_frequencies_the_size_of_a_table_decides():
    configs = [
        TableConfig(name="large", num_rows=100_000, dim=1, features=("x", "y")),
        TableConfig(name="small", num_rows=3, dim=1),
    ]
    tables = LocalTables(configs)
    large, small = tables.rows()
    for rows in (large, small):
        rows.state["sum_of_squares"].fill_(1.0)
    rescale_states(tables, 10, 20, {"small": torch.tensor([0.0, 0.0, 500.0])})
    assert large.state["sum_of_squares"][[0, -1]].tolist() == pytest.approx([0.25, 0.25], rel=1e-3)
    assert small.state["sum_of_squares"].tolist() == pytest.approx([0.25, 0.25, 1.0], rel=2e-3)
    small.state["sum_of_squares"].fill_(1.0)
    rescale_states(tables, 1000, 2000)
    assert small.state["sum_of_squares"].numpy() == pytest.approx(1.0, rel=3e-3)


class Shards(Tables):
    """Rectangles of one table."""

    def __init__(self, config: TableConfig, held: LocalRows) -> None:
        super().__init__([config])
        self.held = held

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        raise NotImplementedError

    def set_learning_rate_factors(self, factors: Any) -> None:
        raise NotImplementedError

    def set_eps_factor(self, factor: float) -> None:
        raise NotImplementedError

    def rows(self) -> Any:
        return self.held.rows()


@pytest.mark.parametrize("optimizer", [*LAZY.values(), RowLamb(learning_rate=0.1, trust="table")], ids=str)
def test_shards_are_rescaled_as_the_whole(optimizer):
    config = TableConfig(name="a", num_rows=20, dim=6, optimizer=optimizer)
    whole = LocalTables([config])
    parts = [RowsPart(config, r, n, c, 3) for r, n in ((0, 7), (7, 13)) for c in (0, 3)]
    shards = Shards(config, LocalRows(parts))
    (rows,) = whole.rows()
    random = torch.Generator().manual_seed(0)
    for state in rows.state.values():
        state.copy_(torch.rand(state.shape, generator=random))

    def cut(part: TableRows, name: str) -> torch.Tensor:
        columns = slice(part.first_column, part.first_column + 3)
        own = rows.state[name]
        return own[(slice(part.first_row, part.first_row + len(part.weight)), columns)[: own.ndim]]

    for part in shards.rows():
        for name, state in part.state.items():
            state.copy_(cut(part, name))
    rates = {"a": torch.rand(20, generator=random) / 100}
    for tables in (whole, shards):
        rescale_states(tables, 64, 512, rates)
    for part in shards.rows():
        for name, state in part.state.items():
            assert torch.equal(state, cut(part, name)), name


@pytest.mark.parametrize(
    ("batches", "rates", "said"),
    [
        ((0, 8), None, "expected batch sizes above 0, got 0 and 8"),
        ((8, float("inf")), None, "expected batch sizes above 0, got 8 and inf"),
        ((8, 16), torch.ones(3), r"^frequencies of table 'a': expected 2 numbers >= 0, got shape \(3,\)"),
        ((8, 16), torch.tensor([0.5, -0.1]), r"expected 2 numbers >= 0, got shape \(2,\), the least -0.1"),
        ((8, 16), torch.tensor([0.5, float("nan")]), r"expected 2 numbers >= 0, got shape \(2,\), the least nan"),
    ],
)
def test_what_makes_no_sense_is_one_line(batches, rates, said):
    tables = LocalTables([TableConfig(name="a", num_rows=2, dim=1)])
    with pytest.raises(ValueError, match=said):
        rescale_states(tables, *batches, None if rates is None else {"a": rates})
