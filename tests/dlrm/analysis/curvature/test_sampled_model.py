"""The network that an analysis looks at is the trained one, row by row, only twice differentiable and in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dlrm.analysis.curvature.objective import Objective
from dlrm.analysis.curvature.sample import Sample, draw_sample
from dlrm.analysis.curvature.sampled_model import (
    SampledModel,
    check_same_architecture,
    read_solution,
    read_tables,
)
from dlrm.checkpoints.run_state import take_model
from dlrm.config import ModelConfig, RunConfig, TablesConfig
from dlrm.data.dataset import Dataset
from dlrm.data.reader import Reader
from dlrm.model import DLRM, build_dlrm
from dlrm.training.run_config import describe_run


def build(dataset: Dataset, pooling: str = "sum", **model: Any) -> tuple[DLRM, dict[str, Any]]:
    """Make a model as a run does, and what its folder says of it."""
    config = RunConfig(model=ModelConfig(dim=4, bottom=(8,), top=(8,), **model), tables=TablesConfig(pooling=pooling))
    torch.manual_seed(0)
    built = build_dlrm(dataset.info, config.model, config.tables, seed=0, device="cpu")
    return built, describe_run(config, built, "")


def sampled(dataset: Dataset, model: DLRM, config: dict[str, Any], samples: int = 700) -> tuple[SampledModel, Sample]:
    features = {name: table["features"] for name, table in read_tables(config).items()}
    sample = draw_sample(dataset, features, splits=["train", "valid"], samples=samples, seed=3)
    made = SampledModel(config, sample)
    made.load(read_solution(take_model(model), config, sample))
    return made, sample


@pytest.mark.parametrize(
    ("interaction", "pooling", "more"),
    [
        ("dot", "sum", {"dropout": 0.2}),
        ("dcn", "mean", {}),
        ("fm", "sum", {"dropout": 0.2}),
        ("projection", "mean", {"batch_norm": "ghost", "ghost_size": 32}),
    ],
)
def test_its_loss_is_the_trained_networks_own(
    click_log: Dataset, interaction: str, pooling: str, more: dict[str, Any]
) -> None:
    model, config = build(click_log, pooling, interaction=interaction, **more)
    model(Reader(click_log, "valid").read(0, 100))  # running statistics, where there are some, are no longer the first
    made, sample = sampled(click_log, model, config)
    model.eval()
    reader = Reader(click_log, "train", shuffle=True, seed=3)
    pieces = [reader.read(1500 * i, 700 * (i + 1) // 8 - 700 * i // 8) for i in range(8)]
    with torch.no_grad():
        losses = [
            nn.functional.binary_cross_entropy_with_logits(model(piece), piece.labels, reduction="sum")
            for piece in pieces
        ]
    ((part, size),) = sample.parts["train"]
    assert size == 700
    assert made(part).item() == pytest.approx(sum(losses).item() / 700, rel=1e-5)
    rows = torch.cat([piece.rows for piece in pieces])
    assert len(rows.unique()) == 700
    assert len((rows // 3000).unique()) == 4  # from every part of the data


def test_hessian_products_over_dense_weights_and_rows_are_those_of_gradients_nearby(click_log: Dataset) -> None:
    made, sample = sampled(click_log, *build(click_log), samples=300)
    smooth = [module for module in made.dense.modules() if isinstance(module, nn.Sequential)]
    for sequential in smooth:  # at a kink of ReLU, differences say nothing of derivatives
        for place, layer in enumerate(sequential):
            if isinstance(layer, nn.ReLU):
                sequential[place] = nn.Softplus()
    objective = Objective(made, sample.parts["train"], names=made.names("all"))
    at = objective.weights()
    assert objective.num_weights == sum(parameter.numel() for parameter in made.parameters())
    assert objective.num_weights > Objective(made, sample.parts["train"], names=made.names("dense")).num_weights
    direction, step = torch.randn_like(at), 1e-5
    ends = [objective.gradient(at + sign * step * direction)[1] for sign in (1, -1)]
    product = objective.hessian_product(at, direction)
    assert product.norm() > 0
    torch.testing.assert_close(product, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-8)


def test_only_rows_that_the_sample_touches_are_held(click_log: Dataset) -> None:
    model, config = build(click_log)
    made, sample = sampled(click_log, model, config, samples=40)
    for place, rows in enumerate(model.tables.rows()):
        ids = sample.touched[rows.config.name]
        assert 0 < len(ids) <= 80 * 10
        torch.testing.assert_close(made.rows[place].detach(), rows.weight[ids].double(), rtol=0, atol=0)
    assert sum(map(len, sample.touched.values())) < sum(table.num_rows for table in model.tables.table_configs) / 2


def test_networks_that_differ_have_no_line_between_them(click_log: Dataset) -> None:
    runs = Path("a"), Path("b")
    _, first = build(click_log)
    _, other = build(click_log, interaction="fm")
    check_same_architecture(first, first, runs)
    with pytest.raises(ValueError, match=r"expected two runs of the same network, got .* in a and .* in b; train both"):
        check_same_architecture(first, other, runs)


def test_a_run_that_does_not_describe_its_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected a run of `recforge train`"):
        read_tables({"network": {"tables": {}}})


def test_weights_of_another_network_are_an_error(click_log: Dataset) -> None:
    model, config = build(click_log)
    made, sample = sampled(click_log, model, config, samples=40)
    solution = read_solution(take_model(model), config, sample)
    del solution["dense.top.0.weight"]
    with pytest.raises(ValueError, match=r"expected weights of the network in config\.json, got others: .*top\.0"):
        made.load(solution)


def test_a_large_sample_comes_in_parts_that_fit_in_memory(click_log: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = build(click_log)
    whole, sample = sampled(click_log, model, config)
    monkeypatch.setattr("dlrm.analysis.curvature.sample.SAMPLES_PER_PART", 200)
    made, parted = sampled(click_log, model, config)
    assert [size for _, size in parted.parts["train"]] == [175, 175, 175, 175]
    losses = [Objective(its, drawn.parts["train"]) for its, drawn in ((whole, sample), (made, parted))]
    values = [objective.value(objective.weights()) for objective in losses]
    assert values[0] == pytest.approx(values[1], rel=1e-12)
