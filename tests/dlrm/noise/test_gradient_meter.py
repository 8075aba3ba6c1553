"""What the meter says of a step is what the gradient of every single sample says, made one by one with vmap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import dlrm.interaction
from dlrm.batch import Batch
from dlrm.distributed.ranks import Ranks
from dlrm.model import DLRM
from dlrm.noise.frequency_bands import FrequencyBands
from dlrm.noise.gradient_meter import GradientMeter, Measured
from dlrm.pairwise_dots import pairwise_dots_by_products
from dlrm.training.attachments import Attachment, Attachments
from dlrm.training.train_step import ClickTask, TrainStep
from embeddings import RowSGD, TableConfig

SIZE, NUMERIC, DIM = 24, 3, 4
CLOSE = {"rel": 1e-5}


def table(name: str, num_rows: int, *features: str, **settings: Any) -> TableConfig:
    return TableConfig(
        name=name, num_rows=num_rows, features=features, optimizer=RowSGD(learning_rate=0.1), init_scale=1.0,
        **({"dim": DIM} | settings),
    )  # fmt: skip


# A table that three features share, so that ids meet within a sample; one of means; one with few rows.
TABLES = (table("shared", 5, "a", "b", "c"), table("mean", 6, "d", pooling="mean"), table("alone", 30, "e"))


def draw_batch(features: list[str], *, most: int, num_rows: int = 5, weighted: bool = False, size: int = SIZE) -> Batch:
    lengths = torch.randint(0, most + 1, (len(features) * size,))
    ids = torch.randint(0, num_rows, (int(lengths.sum()),))
    sparse = KeyedJaggedTensor(
        keys=features, values=ids, lengths=lengths, weights=torch.randn(len(ids)) if weighted else None
    )
    return Batch(
        dense=torch.randn(size, NUMERIC),
        sparse=sparse,
        labels=torch.randint(0, 2, (size,)).float(),
        rows=torch.arange(size),
    )


def count_matrix(batch: Batch, feature: str, config: TableConfig) -> Tensor:
    """Return [B, num_rows]: what each row is multiplied by in each sample's bag."""
    jagged = batch.sparse[feature]
    lengths, ids = jagged.lengths(), jagged.values()
    weights = torch.ones(len(ids)) if jagged.weights_or_none() is None else jagged.weights()
    counts = torch.zeros(len(batch), config.num_rows, dtype=torch.float64)
    bags = torch.arange(len(batch)).repeat_interleave(lengths)
    counts.index_put_((bags, ids), weights.double(), accumulate=True)
    return counts / lengths.clamp(min=1)[:, None] if config.pooling == "mean" else counts


def gradients_of_samples(model: DLRM, batch: Batch) -> dict[str, Tensor]:
    """Return each sample's gradient of its own loss [B, ...] in float64, by parameter and by table."""
    configs = {feature: config for config in model.tables.table_configs for feature in config.features}
    counts = {feature: count_matrix(batch, feature, config) for feature, config in configs.items()}
    weights = {rows.config.name: rows.weight.double().clone() for rows in model.tables.rows()}
    dense = {name: parameter.detach().double() for name, parameter in model.dense.named_parameters()}

    def loss(dense: Any, weights: Any, numbers: Tensor, counts: Any, label: Tensor) -> Tensor:
        pooled = torch.cat([counts[f] @ weights[configs[f].name] for f in model.tables.feature_names])
        logit = functional_call(model.dense, dense, (numbers[None], pooled[None]))[0]
        return nn.functional.binary_cross_entropy_with_logits(logit, label)

    each = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, None, 0, 0, 0))
    of_dense, of_tables = each(dense, weights, batch.dense.double(), counts, batch.labels.double())
    return of_dense | {f"table/{name}": gradient for name, gradient in of_tables.items()}


def measure(model: nn.Module, batch: Batch, *, precision: str = "fp32", **options: Any) -> Measured:
    """Train on a batch and return what the meter has told."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    meter = GradientMeter(model)
    meter.open()
    found = {}

    class Watch(Attachment):
        name = "watch"

        def after_backward(self, moment: Any) -> None:
            found["measured"] = meter.finish(len(batch), len(batch), **options)

    step = TrainStep(ClickTask(model), optimizer, attachments=Attachments([Watch()]), precision=precision)
    step(batch, len(batch))
    return found["measured"]


def check_group(measured: Any, gradients: list[Tensor], **close: Any) -> None:
    flat = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
    assert measured.samples == len(flat)
    assert measured.pairs == len(flat) * (len(flat) - 1)
    assert measured.squares == pytest.approx(float(flat.square().sum()), **(close or CLOSE))
    assert measured.squared_sums == pytest.approx(float(flat.sum(dim=0).square().sum()), **(close or CLOSE))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("interaction", ["dot", "dcn", "fm", "projection"])
def test_whole_model_against_vmap(interaction: Any, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DLRM(
        num_numeric=NUMERIC, tables=TABLES, dim=DIM, bottom=(7,), top=(9,), interaction=interaction, projection=3,
        cross_rank=5,
    )  # fmt: skip
    batch = draw_batch(["e", "d", "c", "b", "a"], most=4, weighted=weighted)
    with monkeypatch.context() as patched:  # vmap knows torch's own operators only
        patched.setattr(dlrm.interaction, "pairwise_dots", pairwise_dots_by_products)
        expected = gradients_of_samples(model, batch)
    measured = measure(model, batch, products=True)
    for part in ("bottom", "interaction", "top"):
        own = [gradient for name, gradient in expected.items() if name.startswith(f"{part}.")]
        assert (part in measured.groups) == bool(own)
        if own:
            check_group(measured.groups[part], own)
    dense = [gradient for name, gradient in expected.items() if not name.startswith("table/")]
    check_group(measured.groups["dense"], dense)
    for name in ("shared", "mean", "alone"):
        check_group(measured.groups[f"table/{name}"], [expected[f"table/{name}"]])
    check_group(measured.groups["tables"], [gradient for name, gradient in expected.items() if "table/" in name])
    flat = torch.cat([gradient.flatten(1) for gradient in dense], dim=1)
    products = flat @ flat.mean(dim=0)
    assert measured.products is not None
    assert measured.products.products == pytest.approx(float(products.sum()), **CLOSE)
    assert measured.products.squared_products == pytest.approx(float(products.square().sum()), **CLOSE)
    assert measured.products.squared_norm == pytest.approx(float(flat.mean(dim=0).square().sum()), **CLOSE)


def test_one_id_per_bag_and_dims_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = (table("a", 5, dim=3), table("b", 9, dim=5), table("c", 4, dim=2))
    model = DLRM(num_numeric=NUMERIC, tables=tables, dim=DIM, bottom=(), top=(6,), interaction="dcn")
    batch = draw_batch(["a", "b", "c"], most=1, num_rows=4)
    expected = gradients_of_samples(model, batch)
    measured = measure(model, batch)
    for name in ("a", "b", "c"):
        check_group(measured.groups[f"table/{name}"], [expected[f"table/{name}"]])


def test_no_numbers_and_one_sample() -> None:
    model = DLRM(num_numeric=0, tables=TABLES, dim=DIM, top=(6,), interaction="fm")
    batch = draw_batch(["a", "b", "c", "d", "e"], most=3)
    batch.dense = batch.dense[:, :0]
    expected = gradients_of_samples(model, batch)
    check_group(measure(model, batch).groups["bottom"], [expected["bottom.vector"]])
    one = draw_batch(["a", "b", "c", "d", "e"], most=3, size=1)
    one.dense = one.dense[:, :0]
    measured = measure(model, one)
    assert measured.groups["dense"].estimate() is None


def test_bands_add_up_to_their_tables() -> None:
    model = DLRM(num_numeric=NUMERIC, tables=TABLES, dim=DIM, interaction="fm")
    batch = draw_batch(["a", "b", "c", "d", "e"], most=3)
    expected = gradients_of_samples(model, batch)
    listed = {"shared": {0: 0, 1: 0}, "mean": {}, "alone": {4: 0, 0: 0, 2: 0}}
    meter = GradientMeter(model, bands=FrequencyBands(("often", "seldom"), listed))
    meter.open()
    loss, _ = ClickTask(model)(batch)
    loss.backward()
    groups = meter.finish(SIZE, SIZE).groups
    alone = expected["table/alone"]
    check_group(groups["ids/often"], [expected["table/shared"][:, :2], alone[:, [0, 2, 4]]])
    seldom = [expected["table/shared"][:, 2:], expected["table/mean"], alone[:, [1, 3, *range(5, 30)]]]
    check_group(groups["ids/seldom"], seldom)
    assert groups["ids/often"].squares + groups["ids/seldom"].squares == pytest.approx(groups["tables"].squares)


def test_preconditioned_norms_are_those_of_every_sample() -> None:
    model = DLRM(num_numeric=NUMERIC, tables=TABLES, dim=DIM, interaction="projection", projection=2)
    batch = draw_batch(["a", "b", "c", "d", "e"], most=2)
    expected = gradients_of_samples(model, batch)
    weights = {id(parameter): torch.rand_like(parameter) for parameter in model.parameters()}
    names = {name: weights[id(parameter)].double() for name, parameter in model.dense.named_parameters()}
    measured = measure(model, batch, precondition=lambda parameter: weights[id(parameter)])
    check_group(measured.groups["dense"], [expected[name] * weight for name, weight in names.items()])


def test_what_is_not_known_is_named_and_left_out() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(NUMERIC, 5), nn.LayerNorm(5), nn.Linear(5, 1)
            self.twice = nn.Linear(5, 5)

        def forward(self, batch: Batch) -> Tensor:
            return self.last(self.twice(self.twice(self.norm(self.first(batch.dense))))).squeeze(-1)

    model = Model()
    batch = draw_batch(["a"], most=1)
    measured = measure(model, batch)
    assert GradientMeter(model).left_out == {"norm.weight": 5, "norm.bias": 5}
    assert set(measured.groups) == {"first", "last", "twice", "dense"}
    assert measured.groups["twice"].estimate() is None
    assert measured.groups["first"].estimate() is not None


def test_rows_of_one_sample_add_up_before_they_are_squared() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(3, 5), nn.Linear(5, 1)

        def forward(self, batch: Batch) -> Tensor:
            return self.last(torch.relu(self.layer(batch.dense.view(-1, 4, 3)))).sum(dim=(1, 2))

    model = Model()
    batch = draw_batch(["a"], most=1)
    batch.dense = torch.randn(SIZE, 12)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: Any, numbers: Tensor, label: Tensor) -> Tensor:
        hidden = torch.relu(numbers.view(4, 3) @ parameters["layer.weight"].T + parameters["layer.bias"])
        logit = (hidden @ parameters["last.weight"].T + parameters["last.bias"]).sum()
        return nn.functional.binary_cross_entropy_with_logits(logit, label)

    expected = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, batch.dense, batch.labels)
    measured = measure(model, batch, products=True)
    check_group(measured.groups["layer"], [expected["layer.weight"], expected["layer.bias"]])
    flat = torch.cat([gradient.flatten(1) for gradient in expected.values()], dim=1)
    assert measured.products is not None
    assert measured.products.squared_products == pytest.approx(
        float((flat @ flat.mean(0)).square().sum()), rel=1e-4
    )  # fmt: skip


def test_steps_that_are_not_measured_are_left_alone() -> None:
    model = DLRM(num_numeric=NUMERIC, tables=TABLES, dim=DIM)
    meter = GradientMeter(model)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    meter.open()
    assert [len(module._forward_hooks) for module in model.modules()] != hooks
    meter.close()
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


class Unequal(Ranks):
    """Two ranks of one machine each: the other's dense gradients are 1/8 longer, as no last bit would be."""

    others: list[float] | None = None

    def sum(self, numbers: Sequence[float]) -> list[float]:
        if Unequal.others is None:
            Unequal.others = list(numbers)
        return [own + other for own, other in zip(numbers, Unequal.others, strict=True)]


def test_ranks_whose_dense_gradients_differ_measure_the_same() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    meter, inputs = GradientMeter(model, Unequal(count=2)), torch.randn(8, 3)
    found = []
    for longer in (9 / 8, 1.0):
        meter.open()
        model.zero_grad()
        model(inputs).square().mean().backward()
        for parameter in model.parameters():
            parameter.grad *= longer
        found.append(meter.finish(8, 16).groups["dense"])
    both = 16**2 * sum(float(parameter.grad.double().square().sum()) for parameter in model.parameters())
    assert found[1].squared_sums == pytest.approx((1 + (9 / 8) ** 2) / 2 * both)
