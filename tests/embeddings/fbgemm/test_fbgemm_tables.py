"""fbgemm's tables: what they are asked for is what is done, or one line says why not; no check waits for a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings import IdOutOfRangeError, RowAdagrad, RowAdam, RowCowClip, RowLamb, RowSGD, RowWiseAdagrad, TableConfig
from embeddings.build import build_tables
from embeddings.fbgemm.fbgemm_settings import check_supported, kernel_settings
from embeddings.fbgemm.fbgemm_tables import FbgemmTables, set_updates
from embeddings.fbgemm.late_check import LateCheck, read_features
from embeddings.jagged import Jagged
from embeddings.row_optimizers import counts_updates, state_columns

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TABLE = TableConfig(name="a", num_rows=9, dim=8)


@pytest.mark.parametrize(
    ("settings", "device", "said"),
    [
        ({"dim": 6}, CUDA, "expected dim to be a multiple of 4 for fbgemm, got 6"),
        ({"memory": "uvm"}, CPU, "expected memory 'device', got 'uvm'"),
        ({"row_type": "bf16"}, CUDA, "expected row_type 'fp32' or 'fp16', got 'bf16'"),
        ({"row_type": "fp16"}, CPU, "expected row_type 'fp32', got 'fp16'"),
        ({"optimizer": RowAdam(learning_rate=0.1)}, CPU, "expected SGD, Adagrad or row-wise Adagrad, got RowAdam"),
        (
            {"optimizer": RowSGD(learning_rate=0.1, weight_decay=0.2)},
            CUDA,
            "expected RowSGD without weight_decay, got 0.2",
        ),
        (
            {"optimizer": RowAdagrad(learning_rate=0.1, weight_decay=0.2)},
            CUDA,
            "expected RowAdagrad without weight_decay, got 0.2",
        ),
        (
            {"optimizer": RowLamb(learning_rate=0.1, trust="touched")},
            CUDA,
            "expected RowLamb with trust='row', got 'touched'",
        ),
        (
            {"optimizer": RowLamb(learning_rate=0.1, trust="table")},
            CUDA,
            "expected RowLamb with trust='row', got 'table'",
        ),
        (
            {"optimizer": RowCowClip(learning_rate=0.1)},
            CUDA,
            "expected another --tables.optimizer than cowclip, got RowCowClip",
        ),
        (
            {"optimizer": RowCowClip(learning_rate=0.1)},
            CPU,
            "expected SGD, Adagrad or row-wise Adagrad, got RowCowClip",
        ),
        (
            {"optimizer": RowLamb(learning_rate=0.1), "init_scale": 0.0},
            CUDA,
            "expected init_scale > 0 under RowLamb, got 0.0",
        ),
    ],
)
def test_what_fbgemm_cannot_do_is_refused(settings, device, said):
    with pytest.raises(ValueError, match=f"^table 'a': {said}: fbgemm has it so on {device.type}$"):
        check_supported(replace(TABLE, **settings), device)


def test_the_build_without_cuda_is_refused_on_cuda(monkeypatch):
    monkeypatch.setattr("fbgemm_gpu.__variant__", "cpu")
    with pytest.raises(ValueError, match=r"^kernel 'fbgemm': expected fbgemm's build for CUDA on device 'cuda', got"):
        FbgemmTables([TABLE], device="cuda")


@pytest.mark.parametrize(
    ("optimizer", "kind", "names", "more"),
    [
        (RowSGD(learning_rate=0.5), "exact_sgd", [], {}),
        (RowAdagrad(learning_rate=0.5, eps=1e-3), "exact_adagrad", ["sum_of_squares"], {"eps": 1e-3}),
        (
            RowWiseAdagrad(learning_rate=0.5, weight_decay=0.1),
            "exact_row_wise_adagrad",
            ["sum_of_squares"],
            {"weight_decay": 0.1},
        ),
        (
            RowAdam(learning_rate=0.5, betas=(0.8, 0.9), weight_decay=0.1),
            "adam",
            ["first_moment", "second_moment"],
            {"beta1": 0.8, "beta2": 0.9, "weight_decay": 0.1},
        ),
        (RowLamb(learning_rate=0.5), "lamb", ["first_moment", "second_moment"], {"eps": 1e-6}),
        (RowLamb(learning_rate=0.5, partial=True), "partial_row_wise_lamb", ["first_moment", "second_moment"], {}),
    ],
)
def test_row_optimizers_have_their_names_on_cuda(optimizer, kind, names, more):
    config = replace(TABLE, optimizer=optimizer, row_type="fp16")
    check_supported(config, CUDA)
    settings = kernel_settings(config)
    assert settings["optimizer"].value == kind
    assert settings["learning_rate"] == 0.5
    assert settings["stochastic_rounding"]
    assert not kernel_settings(replace(config, row_type="fp32"))["stochastic_rounding"]
    assert settings.items() >= more.items()
    assert list(state_columns(optimizer)) == names
    assert counts_updates(optimizer, config.row_type)
    assert counts_updates(optimizer, "fp32") == (len(names) == 2)
    if kind == "exact_row_wise_adagrad":
        assert settings["weight_decay_mode"].name == "L2"


def test_tables_of_one_kernel_have_one_learning_rate(keyed_jagged):
    configs = [replace(TABLE, optimizer=RowSGD(learning_rate=1.0)), replace(TABLE, name="b", features=("b",))]
    configs[1] = replace(configs[1], optimizer=configs[0].optimizer)
    said = "^table 'b': expected the learning rate factor of table 'a', 1.0, .* got 2.0; give them different"
    with pytest.raises(ValueError, match=said):
        FbgemmTables(configs).set_learning_rate_factors([1.0, 2.0])
    tables = FbgemmTables([configs[0], replace(configs[1], group="other")])
    with pytest.raises(ValueError, match="expected one of each of 2 tables, got 1"):
        tables.set_learning_rate_factors([1.0])
    tables.set_learning_rate_factors([1.0, 2.0])
    before = [rows.weight.clone() for rows in tables.rows()]
    tables(keyed_jagged({"a": [[1]], "b": [[1]]})).values().sum().backward()
    steps = [float((start - rows.weight).max()) for start, rows in zip(before, tables.rows(), strict=True)]
    assert steps == pytest.approx([1.0, 2.0])


def late_check(*num_rows: int) -> LateCheck:
    return LateCheck(torch.tensor(num_rows))


def batch_of(ids: list[int], lengths: list[int], num_keys: int, positions: list[int]) -> Jagged:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Jagged(
        ids=torch.tensor(ids),
        offsets=offsets,
        positions=positions,
        ids_per_feature=[],
        batch_size=len(lengths) // num_keys,
    )


def test_a_wrong_id_is_replaced_and_found_later():
    check = late_check(4, 9)
    batch = batch_of([8, 0, 3, 2, 4, 3], [1, 1, 0, 4], num_keys=2, positions=[1, 0])
    safe = check.begin(batch)
    assert safe.tolist() == [8, 0, 3, 2, 0, 3]
    assert batch.ids.tolist() == [8, 0, 3, 2, 4, 3]
    wrong = check.finish()
    assert wrong is not None
    assert (wrong.feature, wrong.at, wrong.batch.bag_of(wrong.at)) == (0, 4, 1)
    assert check.finish() is None


def test_random_ids_are_judged_as_by_hand():
    random = np.random.default_rng(0)
    for _ in range(200):
        limits = random.integers(1, 6, 3)
        lengths = random.integers(0, 4, 6)
        ids = random.integers(-1, 6, lengths.sum())
        place = np.repeat(np.arange(6) // 2, lengths)
        wrong_ids = np.flatnonzero((ids < 0) | (ids >= limits[place]))
        check = late_check(*limits)
        check.begin(batch_of(ids.tolist(), lengths.tolist(), num_keys=3, positions=[0, 1, 2]))
        found = check.finish()
        assert (found is None) == (len(wrong_ids) == 0)
        if found is not None:
            assert (found.at, found.feature) == (wrong_ids[0], place[wrong_ids[0]])


def test_a_length_below_zero_is_found_later():
    check = late_check(9)
    check.begin(batch_of([1, 2], [3, -1], num_keys=1, positions=[0]))
    with pytest.raises(ValueError, match="expected lengths >= 0"):
        check.finish()


class LateTables(FbgemmTables):
    """Finds wrong ids out as late as on a GPU."""

    def forward(self, features: KeyedJaggedTensor) -> object:
        asked, self.check_ids = self.check_ids, lambda: None  # type: ignore[method-assign]
        try:
            return super().forward(features)
        finally:
            self.check_ids = asked  # type: ignore[method-assign]


@pytest.fixture
def after_a_wrong_id() -> LateTables:
    tables = LateTables([TABLE])
    pooled = tables(KeyedJaggedTensor(["a"], torch.tensor([1, 9]), lengths=torch.tensor([1, 1]))).values()
    assert torch.equal(pooled[1], next(iter(tables._groups)).kernel.split_embedding_weights()[0][0])
    return tables


def test_the_batchs_own_check_names_the_sample(after_a_wrong_id):
    with pytest.raises(IdOutOfRangeError, match="row 1 of the batch: expected an id in \\[0, 9\\)"):
        after_a_wrong_id.check_ids()
    assert len(list(after_a_wrong_id.rows())) == 1


def test_a_later_batch_is_not_blamed(after_a_wrong_id):
    with pytest.raises(ValueError, match="in an earlier batch: feature 'a', row 1") as caught:
        after_a_wrong_id(KeyedJaggedTensor(["a"], torch.tensor([1]), lengths=torch.tensor([1])))
    assert not isinstance(caught.value, IdOutOfRangeError)


def test_nothing_is_saved_after_a_wrong_id(after_a_wrong_id):
    with pytest.raises(ValueError, match="in an earlier batch"):
        after_a_wrong_id.state_dict()


def test_read_features_asks_nothing_of_batches_that_know_their_lengths():
    features = KeyedJaggedTensor(["b", "x", "a"], torch.arange(6), lengths=torch.tensor([2, 1, 0, 1, 1, 1]))
    read = read_features(features, ["a", "b"])
    assert (read.keys(), read.values().tolist(), read.lengths().tolist()) == (["a", "b"], [4, 5, 0, 1, 2], [1, 1, 2, 1])
    assert read.length_per_key() == [2, 3]


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_weighted_bags_are_those_of_our_kernels(pooling, draw_bags, keyed_jagged):
    configs = [
        replace(TABLE, pooling=pooling, features=("x", "y")),
        replace(TABLE, name="b", optimizer=RowSGD(learning_rate=0.3)),
    ]
    tables = {kernel: build_tables(configs, seed=2, kernel=kernel) for kernel in ("numba", "fbgemm")}
    random = np.random.default_rng(1)
    for _ in range(5):
        plain = keyed_jagged(draw_bags(configs, batch_size=7, longest=4, random=random))
        weights = torch.from_numpy(random.normal(size=len(plain.values()))).float()
        features = KeyedJaggedTensor(plain.keys(), plain.values(), weights=weights, lengths=plain.lengths())
        pooled = {kernel: its(features).values() for kernel, its in tables.items()}
        torch.testing.assert_close(pooled["fbgemm"], pooled["numba"], rtol=1e-5, atol=1e-6)
        for vectors in pooled.values():
            vectors.sin().sum().backward()
    for theirs, ours in zip(tables["fbgemm"].rows(), tables["numba"].rows(), strict=True):
        torch.testing.assert_close(theirs.weight, ours.weight, rtol=1e-5, atol=1e-6)


def test_updates_are_counted_by_gradients_and_told_to_fbgemm():
    tables = FbgemmTables([TABLE])
    (group,) = tables._groups
    features = KeyedJaggedTensor(["a"], torch.tensor([1]), lengths=torch.tensor([1]))
    for _ in range(3):
        tables(features).values().sum().backward()
    tables.eval()
    tables(features)
    assert group.updates.item() == 3
    set_updates(group.kernel, 3)
    assert group.kernel.iter_cpu.item() == 3
    group.kernel.iter.fill_(7)
    set_updates(group.kernel, 0)
    assert (group.kernel.iter.item(), group.kernel.iter_cpu.item()) == (0, 0)
