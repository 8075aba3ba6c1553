"""Rows of 16 bits: read exactly, rounded without bias, and alike however the work and the table are spread."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embeddings import RowAdam, RowLamb, RowSGD, RowWiseAdagrad, TableConfig
from embeddings.initial_rows import initial_rows
from embeddings.kernels.sixteen_bit_kernels import Rounding, round_rows, widen_rows
from embeddings.local.local_tables import LocalTables

TYPES = {"bf16": (torch.bfloat16, np.uint16), "fp16": (torch.float16, np.int16)}


def _from_bits(stored, row_type):
    return torch.from_numpy(stored.view(np.int16)).view(TYPES[row_type][0])


def _round(numbers, row_type, *, stream=1, first_row=0, first_column=0):
    stored = np.zeros(numbers.shape, TYPES[row_type][1])
    rows = np.arange(len(numbers), dtype=np.uint64)
    round_rows(stored, rows, numbers, Rounding(stream, first_row, first_column))
    return _from_bits(stored, row_type)


@pytest.mark.parametrize("row_type", TYPES)
def test_all_numbers_are_read_exactly_and_stay_when_they_are_written_back(row_type):
    stored = np.arange(1 << 16, dtype=np.uint16).view(TYPES[row_type][1]).reshape(1024, 64)
    wide = np.empty(stored.shape, np.float32)
    widen_rows(stored, np.arange(1024, dtype=np.uint64), wide)
    expected = _from_bits(stored, row_type).float()
    torch.testing.assert_close(torch.from_numpy(wide), expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~torch.isnan(expected)
    assert torch.equal(torch.from_numpy(wide).signbit()[numbers], expected.signbit()[numbers])
    back = _round(wide, row_type).float()
    torch.testing.assert_close(back, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 3e-8])
@pytest.mark.parametrize("row_type", TYPES)
def test_rounding_goes_to_a_neighbour_and_has_no_bias(row_type, scale):
    numbers = (np.random.default_rng(0).normal(size=64) * scale).astype(np.float32)
    rounded = _round(np.tile(numbers, (20_000, 1)), row_type)
    exact = torch.from_numpy(numbers)
    nearest = exact.to(TYPES[row_type][0])
    below = torch.where(nearest.float() > exact, nearest.nextafter(torch.tensor(-9.0).to(nearest)), nearest)
    above = below.nextafter(torch.tensor(9.0).to(below))
    assert ((rounded == below) | (rounded == above)).all()
    # 64 means of 20,000 draws each, in units of their standard errors
    error = rounded.double().mean(dim=0) - exact.double()
    share = (exact.double() - below.double()) / (above.double() - below.double())
    step = (above.double() - below.double()) * (share * (1 - share) / 20_000).sqrt()
    deviations = (error / step)[step > 0]
    assert deviations.numel() > 50
    assert deviations.abs().max() < 4
    assert 0.7 < deviations.square().mean() < 1.5


@pytest.mark.parametrize("row_type", TYPES)
def test_what_is_not_a_number_stays_so(row_type):
    most = torch.finfo(TYPES[row_type][0]).max
    numbers = np.array([[np.nan, np.inf, -np.inf, most, -most, 0.0, -0.0, np.finfo(np.float32).max]], np.float32)
    rounded = _round(np.tile(numbers, (1000, 1)), row_type).float()
    assert torch.isnan(rounded[:, 0]).all()
    assert (rounded[:, 1:7] == torch.from_numpy(numbers[:, 1:7])).all()
    assert torch.equal(rounded[:, 6].signbit(), torch.ones(1000, dtype=torch.bool))
    assert not torch.isnan(rounded[:, 7]).any()


def test_random_numbers_differ_by_table_update_row_and_column():
    numbers = np.full((64, 64), 1 + 2.0**-8, np.float32)  # halfway between two of bfloat16

    def up(**place):
        return _round(numbers, "bf16", **place) > 1

    assert 0.45 < up().float().mean() < 0.55
    for other in ({"stream": 2}, {"first_row": 64}, {"first_column": 64}):
        assert 0.4 < (up() == up(**other)).float().mean() < 0.6
    # as one shard of the table that another part of it is
    assert torch.equal(up()[5:], up(first_row=5)[:-5])
    assert torch.equal(up()[:, 7:], up(first_column=7)[:, :-7])


@pytest.mark.parametrize("row_type", TYPES)
def test_initial_rows_are_rounded_to_nearest(row_type):
    config = TableConfig(name="a", num_rows=50, dim=6, row_type=row_type)
    (rows,) = LocalTables([config], seed=3).rows()
    assert torch.equal(rows.weight, initial_rows(config, seed=3).to(TYPES[row_type][0]))
    assert list(rows.state) == ["sum_of_squares", "updates"]
    assert rows.state["sum_of_squares"].dtype == torch.float32


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("row_type", TYPES)
def test_pooling_computes_in_float32(row_type, pooling, plain_tables, draw_bags, draw_weights, keyed_jagged):
    configs = [TableConfig(name="a", num_rows=50, dim=20, row_type=row_type, pooling=pooling, init_scale=1.0)]
    tables = LocalTables(configs).eval()
    plain = plain_tables(tables)
    random = np.random.default_rng(0)
    bags = draw_bags(configs, batch_size=20, longest=30, random=random)
    weights = draw_weights(bags, random)
    pooled = tables(keyed_jagged(bags, weights=weights)).values()
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), plain.look_up(bags, weights).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        RowSGD(learning_rate=0.02),
        RowWiseAdagrad(learning_rate=0.02),
        RowAdam(learning_rate=0.02),
        RowLamb(learning_rate=0.02),
    ],
)
@pytest.mark.parametrize("row_type", TYPES)
def test_many_small_updates_arrive_as_in_float32(row_type, optimizer, keyed_jagged):
    # each moves a number by far less than bfloat16 can tell apart there; to nearest, all of them would be lost
    trained = {}
    for kind in ("fp32", row_type):
        config = TableConfig(name="a", num_rows=64, dim=32, row_type=kind, optimizer=optimizer)
        tables = LocalTables([config])
        weight = next(tables.rows()).weight
        weight.fill_(1.0)
        tables.set_learning_rate_factors([0.01])
        batch = keyed_jagged({"a": [[row] for row in range(64)]})
        for _ in range(100):
            tables(batch).values().backward(torch.ones(64, 32))
        trained[kind] = weight.double().mean(dim=0)
    moved = 1 - trained["fp32"]
    assert (moved > 0.003).all()
    assert abs(float((trained[row_type] - trained["fp32"]).mean() / moved.mean())) < 0.05


@pytest.mark.parametrize("row_type", TYPES)
def test_rounding_depends_on_the_seed_and_goes_on_from_a_saved_state(row_type, keyed_jagged):
    config = TableConfig(name="a", num_rows=9, dim=8, row_type=row_type, optimizer=RowSGD(learning_rate=0.01))
    batch = keyed_jagged({"a": [[row] for row in range(9)]})

    def train(tables, steps):
        for _ in range(steps):
            tables(batch).values().sin().sum().backward()
        return {name: tensor.clone() for name, tensor in tables.state_dict().items()}

    first, again, other = (LocalTables([config], seed=seed) for seed in (1, 1, 2))
    half = train(first, 5)
    assert half["a.updates"] == 5
    whole = train(first, 5)
    again.load_state_dict(half)
    other.load_state_dict(half)
    resumed = train(again, 5)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert not torch.equal(train(other, 5)["a.weight"], whole["a.weight"])
