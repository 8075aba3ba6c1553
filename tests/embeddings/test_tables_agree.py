"""Both kernels train rows as plain tables in float64 do: pooling, duplicates, shared tables, every row optimizer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embeddings import RowAdagrad, RowAdam, RowLamb, RowSGD, RowWiseAdagrad, TableConfig
from embeddings.build import build_tables
from embeddings.local.local_tables import LocalTables

CASES = {
    "sgd": [TableConfig(name="a", num_rows=7, dim=8, optimizer=RowSGD(learning_rate=0.1))],
    "adagrad": [TableConfig(name="a", num_rows=7, dim=8, optimizer=RowWiseAdagrad(learning_rate=0.1))],
    "adagrad with decay": [
        TableConfig(
            name="a", num_rows=7, dim=8, optimizer=RowWiseAdagrad(learning_rate=0.1, weight_decay=0.1, eps=1e-3)
        )
    ],
    "an accumulator per number": [
        TableConfig(name="a", num_rows=7, dim=8, optimizer=RowAdagrad(learning_rate=0.1, eps=1e-3))
    ],
    "mean": [
        TableConfig(name="a", num_rows=9, dim=4, pooling="mean", optimizer=RowSGD(learning_rate=0.1)),
        TableConfig(name="b", num_rows=9, dim=4, pooling="mean"),
    ],
    "several features share a table": [
        TableConfig(name="a", num_rows=5, dim=4),
        TableConfig(name="b", num_rows=6, dim=4, features=("x", "y", "z")),
        TableConfig(name="c", num_rows=4, dim=4, features=("u", "v"), pooling="mean"),
    ],
    "everything differs": [
        TableConfig(name="a", num_rows=3000, dim=4, optimizer=RowSGD(learning_rate=0.2)),
        TableConfig(name="b", num_rows=1, dim=64, pooling="mean", init_scale=0.5),
        TableConfig(name="c", num_rows=2049, dim=36, features=("x", "y"), optimizer=RowWiseAdagrad(learning_rate=0.3)),
    ],
}


@pytest.mark.parametrize(
    ("kernel", "device"),
    [("numba", "cpu"), ("fbgemm", "cpu"), pytest.param("fbgemm", "cuda", marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_equal_plain_tables(
    case, dtype, kernel, device, plain_tables, assert_equals_plain, draw_bags, keyed_jagged
):
    configs = [replace(config, group=config.name) for config in CASES[case]]
    if (kernel, device) == ("fbgemm", "cpu") and any(config.optimizer.weight_decay for config in configs):
        pytest.skip("fbgemm on the CPU has no weight decay")
    tables = build_tables(configs, seed=1, kernel=kernel, device=device)
    plain = plain_tables(tables)
    random = np.random.default_rng(0)
    for step in range(20):
        bags = draw_bags(configs, batch_size=6, longest=4, random=random)
        factors = [(1 + table) / (1 + step) for table in range(len(configs))]
        tables.set_learning_rate_factors(factors)
        target = torch.from_numpy(random.normal(size=(6, sum(tables.feature_dims))))
        pooled = tables(keyed_jagged(bags, dtype).to(torch.device(device))).values().cpu()
        expected = plain.look_up(bags)
        torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=1e-6)
        (pooled - target.float()).square().sum().backward()
        (expected - target).square().sum().backward()
        plain.update(bags, factors)
    assert_equals_plain(tables, plain)


@pytest.mark.parametrize(
    ("kernel", "device"),
    [("numba", "cpu"), ("fbgemm", "cpu"), pytest.param("fbgemm", "cuda", marks=pytest.mark.gpu)],
)
def test_a_factor_on_eps_is_another_eps(kernel, device, keyed_jagged):
    def train(factor: float, **own: float) -> list[torch.Tensor]:
        configs = [
            TableConfig(name="a", num_rows=5, dim=4, optimizer=RowWiseAdagrad(learning_rate=0.3, **own), group="a"),
            TableConfig(name="b", num_rows=5, dim=4, optimizer=RowAdagrad(learning_rate=0.3, **own), group="b"),
            TableConfig(name="c", num_rows=5, dim=4, optimizer=RowSGD(learning_rate=0.3), group="c"),
        ]
        tables = build_tables(configs, seed=1, kernel=kernel, device=device)
        tables.set_eps_factor(factor)
        for _ in range(3):
            features = keyed_jagged({"a": [[1, 1], [3]], "b": [[2], [4]], "c": [[0], []]}).to(torch.device(device))
            tables(features).values().sin().sum().backward()
        return [rows.weight.cpu().clone() for rows in tables.rows()]

    multiplied, given, plain = train(8.0, eps=0.25), train(1.0, eps=2.0), train(1.0, eps=0.25)
    for table in range(3):
        assert torch.equal(multiplied[table], given[table])
        assert torch.equal(multiplied[table], plain[table]) == (table == 2)


@pytest.mark.parametrize("kernel", ["numba", "fbgemm"])
def test_features_come_in_any_order_and_among_others(kernel, plain_tables, draw_bags, keyed_jagged):
    configs = CASES["several features share a table"]
    tables = build_tables(configs, kernel=kernel)
    plain = plain_tables(tables)
    bags = draw_bags(configs, batch_size=6, longest=4, random=np.random.default_rng(0))
    others = {"other": [[99]] * 6}
    shuffled = {name: (bags | others)[name] for name in ("y", "u", "other", "a", "x", "v", "z")}
    tables(keyed_jagged(shuffled)).values().sin().sum().backward()
    plain.look_up(bags).sin().sum().backward()
    plain.update(bags)
    for row, plain_weight in zip(tables.rows(), plain.weights, strict=True):
        torch.testing.assert_close(row.weight.double(), plain_weight.detach(), rtol=1e-5, atol=1e-6)


def test_sgd_decays_the_rows_of_the_batch_and_no_others(plain_tables, keyed_jagged):
    # fbgemm has no weight decay under SGD to compare with.
    configs = [TableConfig(name="a", num_rows=5, dim=3, optimizer=RowSGD(learning_rate=0.1, weight_decay=0.5))]
    tables = LocalTables(configs, seed=2)
    before = next(tables.rows()).weight.clone()
    plain = plain_tables(tables)
    bags = {"a": [[1, 1], [3], []]}
    tables(keyed_jagged(bags)).values().sin().sum().backward()
    plain.look_up(bags).sin().sum().backward()
    plain.update(bags)
    after = next(tables.rows()).weight
    torch.testing.assert_close(after.double(), plain.weights[0].detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(after[[0, 2, 4]], before[[0, 2, 4]])


def test_ids_of_one_row_are_summed_before_the_row_is_updated(keyed_jagged):
    config = TableConfig(name="a", num_rows=2, dim=1, features=("x", "y"), optimizer=RowWiseAdagrad(learning_rate=1.0))
    tables = LocalTables([config])
    weight, state = next(tables.rows())[1:3]
    weight.zero_()
    pooled = tables(keyed_jagged({"x": [[0, 0]], "y": [[0]]})).values()
    pooled.backward(torch.tensor([[3.0, -2.0]]))
    # one update by 3 + 3 - 2 = 4, not three
    assert state["sum_of_squares"].tolist() == [16.0, 0.0]
    torch.testing.assert_close(weight, torch.tensor([[-1.0], [0.0]]))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_equals_plain_tables(data, plain_tables, keyed_jagged):
    configs, bags = [], {}
    batch_size = data.draw(st.integers(1, 9), "batch_size")
    for t in range(data.draw(st.integers(1, 3), "tables")):
        num_rows = data.draw(st.sampled_from([1, 2, 3, 40, 2048, 5000]), "num_rows")
        features = tuple(f"{t}.{f}" for f in range(data.draw(st.integers(1, 3), "features")))
        configs.append(
            TableConfig(
                name=str(t),
                num_rows=num_rows,
                dim=data.draw(st.integers(1, 35), "dim"),
                features=features,
                pooling=data.draw(st.sampled_from(["sum", "mean"]), "pooling"),
                optimizer=data.draw(
                    st.sampled_from(
                        [
                            RowSGD(learning_rate=0.1),
                            RowWiseAdagrad(learning_rate=0.1, weight_decay=0.01),
                            RowAdagrad(learning_rate=0.1, weight_decay=0.01),
                            RowAdam(learning_rate=0.1, eps=1e-2),
                            RowLamb(learning_rate=0.1, eps=1e-2, partial=True),
                            RowLamb(learning_rate=0.1, eps=1e-2, trust="touched"),
                        ]
                    )
                ),
            )
        )
        ids = st.lists(st.integers(0, num_rows - 1), max_size=70)
        for feature in features:
            bags[feature] = data.draw(st.lists(ids, min_size=batch_size, max_size=batch_size), feature)
    tables = LocalTables(configs)
    plain = plain_tables(tables)
    for _ in range(2):
        pooled, expected = tables(keyed_jagged(bags)).values(), plain.look_up(bags)
        # Sums of large numbers may come out small: what fp32 keeps of them is as large as its share of the summands.
        largest = max(float(weight.detach().abs().max()) for weight in plain.weights)
        longest = max(len(bag) for feature in bags.values() for bag in feature)
        torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=max(1e-5, 2e-6 * longest * largest))
        pooled.square().sum().backward()
        expected.square().sum().backward()
        plain.update(bags)
    for row, plain_weight in zip(tables.rows(), plain.weights, strict=True):
        scale = max(1.0, float(plain_weight.detach().abs().max()))
        torch.testing.assert_close(row.weight.double(), plain_weight.detach(), rtol=1e-3, atol=1e-4 * scale)
