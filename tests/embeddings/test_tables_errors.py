"""What a user can get wrong is one line that names the table or the feature, and nothing is updated by then."""

from __future__ import annotations

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings import IdOutOfRangeError, RowSGD, RowWiseAdagrad, TableConfig
from embeddings.build import build_tables

KERNELS = ["numba", "fbgemm"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_rows": 0}, "table 'a': expected num_rows >= 1, got 0"),
        ({"dim": 0}, "table 'a': expected dim >= 1, got 0"),
        ({"name": ""}, "table: expected a name, got ''"),
        ({"features": ("x", "y", "x")}, "table 'a': expected each feature once in features, got 'x' twice"),
        ({"pooling": "max"}, "table 'a': expected pooling 'sum' or 'mean', got 'max'"),
        ({"init_scale": -1.0}, "table 'a': expected init_scale to be a number >= 0, got -1.0"),
    ],
)
def test_a_tables_settings_are_checked(settings, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        TableConfig(**({"name": "a", "num_rows": 3, "dim": 4} | settings))


@pytest.mark.parametrize("settings", [{"learning_rate": -1.0}, {"learning_rate": 1.0, "weight_decay": float("nan")}])
@pytest.mark.parametrize("kind", [RowSGD, RowWiseAdagrad])
def test_an_optimizers_settings_are_checked(kind, settings):
    with pytest.raises(ValueError, match=f"{kind.__name__}: expected .* to be a finite number >= 0"):
        kind(**settings)


def test_tables_are_checked_together():
    def table(name, *features):
        return TableConfig(name=name, num_rows=3, dim=4, features=features)

    with pytest.raises(ValueError, match="table 'a': expected each table's name once"):
        build_tables([table("a", "x"), table("a", "y")])
    with pytest.raises(ValueError, match="feature 'x': expected one table per feature, got tables 'a' and 'b'"):
        build_tables([table("a", "x"), table("b", "x")])
    with pytest.raises(ValueError, match="at least one"):
        build_tables([])


def test_a_kernel_that_cannot_says_so():
    with pytest.raises(ValueError, match="kernel 'numba': expected device 'cpu', got 'cuda'"):
        build_tables([TableConfig(name="a", num_rows=3, dim=4)], device="cuda", kernel="numba")
    with pytest.raises(ValueError, match="kernel: expected 'auto', 'numba' or 'fbgemm', got 'best'"):
        build_tables([TableConfig(name="a", num_rows=3, dim=4)], kernel="best")
    with pytest.raises(ValueError, match="table 'a': expected dim to be a multiple of 4 for fbgemm, got 3"):
        build_tables([TableConfig(name="a", num_rows=3, dim=3)], kernel="fbgemm")
    for kind in (RowSGD, RowWiseAdagrad):
        decayed = TableConfig(name="a", num_rows=3, dim=4, optimizer=kind(learning_rate=1.0, weight_decay=0.1))
        with pytest.raises(ValueError, match=f"table 'a': expected {kind.__name__} without weight_decay, got 0.1"):
            build_tables([decayed], kernel="fbgemm")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("wrong", [-1, 6, 2**31 - 1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_id_outside_its_table_is_named_and_nothing_changes(kernel, wrong, dtype, keyed_jagged):
    configs = [
        TableConfig(name="a", num_rows=9, dim=4),
        TableConfig(name="b", num_rows=6, dim=4, features=("x", "y")),
    ]
    tables = build_tables(configs, kernel=kernel)
    before = {name: rows.clone() for name, rows in tables.state_dict().items()}
    # in another order than the tables', with a feature between that nobody looks up, and 8 outside `b` but not `a`
    bags = {"y": [[], [wrong, 5], []], "other": [[99], [99], [99]], "a": [[8], [], [1]], "x": [[1], [2], [3]]}
    with pytest.raises(IdOutOfRangeError) as caught:
        tables(keyed_jagged(bags, dtype)).values().sum().backward()
    error = caught.value
    assert (error.feature, error.table, error.num_rows, error.bag, error.id) == ("y", "b", 6, 1, wrong)
    assert str(error).startswith(
        f"feature 'y', row 1 of the batch: expected an id in [0, 6) for table 'b', got {wrong}"
    )
    assert "\n" not in str(error)
    for name, rows in tables.state_dict().items():
        assert torch.equal(rows, before[name])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_batch_that_does_not_fit_is_refused(kernel):
    tables = build_tables([TableConfig(name="a", num_rows=9, dim=4)], kernel=kernel)
    ids = torch.tensor([1, 2, 3])

    def batch(key="a", values=ids, lengths=(2, 1), **more):
        return KeyedJaggedTensor(keys=[key], values=values, lengths=torch.tensor(lengths), **more)

    for features, said in [
        (batch(key="b"), "feature 'a': expected it in the batch, got the features b"),
        (batch(values=ids.float()), "expected ids of type int32 or int64, got torch.float32"),
        (batch(lengths=(2, 2)), "expected lengths >= 0 that add up to 3 ids, got a sum of 4"),
        (batch(lengths=(4, -1)), "expected lengths >= 0 that add up to 3 ids"),
    ]:
        with pytest.raises(ValueError, match=said):
            tables(features)


def test_weights_that_are_to_be_learned_are_refused():
    tables = build_tables([TableConfig(name="a", num_rows=9, dim=4)])
    ids, lengths = torch.tensor([1, 2, 3]), torch.tensor([2, 1])
    learned = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="expected weights that need no gradient"):
        tables(KeyedJaggedTensor(keys=["a"], values=ids, lengths=lengths, weights=learned))
    with pytest.raises(ValueError, match="expected a weight for each of 3 ids, got 2 weights"):
        tables(KeyedJaggedTensor(keys=["a"], values=ids, lengths=lengths, weights=torch.ones(2)))
