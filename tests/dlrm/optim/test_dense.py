"""A configuration gives the optimizer it names, with its options, or one line that names the flag."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from dlrm.config import TrainingConfig
from dlrm.optim.config import DenseOptimizerConfig, HeadConfig
from dlrm.optim.dense import build_dense_optimizer
from dlrm.optim.factored import Factored
from dlrm.optim.hybrid import HybridOptimizer
from dlrm.optim.lamb import Lamb
from dlrm.optim.lars import Lars

CASES: dict[str, tuple[dict[str, Any], Callable[[list[dict[str, Any]]], Optimizer]]] = {
    "lamb": ({"weight_decay": 0.1, "max_grad_norm": 0.5}, lambda groups: Lamb(groups, 0.02, max_grad_norm=0.5)),
    "lamb options": (
        {"betas": (0.8, 0.99), "eps": 1e-3},
        lambda groups: Lamb(groups, 0.02, betas=(0.8, 0.99), eps=1e-3),
    ),
    "lamb in 16 bits": (
        {"moment_type": "bf16", "norm_bounds": (0.1, 2.0), "trust_clip": True},
        lambda groups: Lamb(groups, 0.02, moment_dtype=torch.bfloat16, norm_bounds=(0.1, 2.0), trust_clip=True),
    ),
    "lars": ({"weight_decay": 0.1}, lambda groups: Lars(groups, 0.02)),
    "lars options": (
        {"momentum": 0.0, "trust_coefficient": 0.1, "eps": 0.1},
        lambda groups: Lars(groups, 0.02, momentum=0.0, trust_coefficient=0.1, eps=0.1),
    ),
    "lars of LAMB's paper": ({"variant": "paper_lamb"}, lambda groups: Lars(groups, 0.02, variant="paper_lamb")),
    "factored": (
        {"momentum": 0.8, "moment_type": "fp32", "weight_decay": 0.1},
        lambda groups: Factored(groups, 0.02, momentum=0.8, moment_dtype=torch.float32),
    ),
    "sgd": ({}, lambda groups: SGD(groups, 0.02)),
    "sgd with momentum": ({"momentum": 0.9, "weight_decay": 0.1}, lambda groups: SGD(groups, 0.02, momentum=0.9)),
    "adam": ({"betas": (0.8, 0.99), "eps": 1e-3}, lambda groups: Adam(groups, 0.02, betas=(0.8, 0.99), eps=1e-3)),
    "adamw": ({"weight_decay": 0.1}, lambda groups: AdamW(groups, 0.02)),
    "adagrad": ({"eps": 1e-3, "weight_decay": 0.1}, lambda groups: Adagrad(groups, 0.02, eps=1e-3)),
}


def network() -> torch.nn.Module:
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.ReLU(), torch.nn.Linear(8, 1))


def train(model: torch.nn.Module, optimizer: Optimizer) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        optimizer.zero_grad()
        (model(torch.randn(16, 4, generator=generator)) ** 2).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("case", CASES)
def test_makes_the_named_optimizer(case: str) -> None:
    options, make = CASES[case]
    ours, theirs = network(), network()
    config = DenseOptimizerConfig(name=case.split()[0], learning_rate=0.02, **options)
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    reference = make(
        [
            {"params": matrices, "weight_decay": options.get("weight_decay", 0.0)},
            {"params": vectors, "weight_decay": 0.0},
        ]
    )
    train(ours, build_dense_optimizer(config, ours))
    train(theirs, reference)
    before = network().state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
        assert not torch.equal(value, before[name]), name


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one dense parameter"):
        build_dense_optimizer(DenseOptimizerConfig(), torch.nn.ReLU())


def test_the_head_has_its_own_rate_and_decay_and_vectors_have_none() -> None:
    dense, head = DenseOptimizerConfig(weight_decay=0.1), HeadConfig(learning_rate=0.5, weight_decay=0.3)
    groups = build_dense_optimizer(dense, network(), head).param_groups
    told = [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
    assert told == [("dense", 0.005, 0.1), ("head", 0.5, 0.3), ("vectors", 0.005, 0.0)]


def test_without_a_configuration_the_head_is_as_the_dense_part() -> None:
    groups = build_dense_optimizer(DenseOptimizerConfig(weight_decay=0.1), network()).param_groups
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups][:2] == [
        ("dense", 0.005, 0.1),
        ("head", 0.005, 0.1),
    ]


def test_a_head_of_another_kind_is_trained_by_its_own_optimizer() -> None:
    ours, theirs = network(), network()
    dense = DenseOptimizerConfig(name="lamb", learning_rate=0.02, weight_decay=0.1, eps=1e-4)
    optimizer = build_dense_optimizer(dense, ours, HeadConfig(name="sgd", learning_rate=0.5))
    head, vectors = theirs[3].weight, [p for p in theirs.parameters() if p.ndim == 1]
    lamb = Lamb([{"params": [theirs[0].weight], "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], 0.02)
    for group in lamb.param_groups:
        group["eps"] = 1e-4
    train(ours, optimizer)
    train(theirs, HybridOptimizer([lamb, SGD([head], 0.5, weight_decay=0.1)]))
    assert [group["name"] for group in optimizer.param_groups] == ["dense", "vectors", "head"]
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_a_head_that_is_all_there_is_needs_no_second_optimizer() -> None:
    optimizer = build_dense_optimizer(
        DenseOptimizerConfig(), torch.nn.Linear(2, 1, bias=False), HeadConfig(name="sgd", learning_rate=0.5)
    )
    assert isinstance(optimizer, SGD)
    assert [group["name"] for group in optimizer.param_groups] == ["head"]


def test_a_head_of_another_kind_wants_a_rate() -> None:
    with pytest.raises(ValueError, match=r"--head.learning-rate: expected a number beside --head.name sgd"):
        TrainingConfig(head=HeadConfig(name="sgd"))
    assert TrainingConfig(head=HeadConfig(name="lamb")).head.learning_rate is None


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"name": "lion"}, "--head.name: expected one of lamb"),
        ({"learning_rate": 0.0}, "--head.learning-rate: expected a number > 0, got 0.0"),
        ({"weight_decay": float("inf")}, "--head.weight-decay"),
    ],
)
def test_nonsense_about_the_head_names_its_flag(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        HeadConfig(**options)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"name": "lion"}, "--dense.name: expected one of lamb, lars, factored, sgd"),
        ({"learning_rate": 0.0}, "--dense.learning-rate"),
        ({"learning_rate": float("nan")}, "--dense.learning-rate"),
        ({"weight_decay": -1.0}, "--dense.weight-decay"),
        ({"betas": (0.9, 1.0)}, "--dense.betas"),
        ({"eps": 0.0}, "--dense.eps"),
        ({"name": "sgd", "momentum": 1.0}, "--dense.momentum"),
        ({"max_grad_norm": -1.0}, "--dense.max-grad-norm"),
        ({"momentum": 0.9}, "--dense.momentum: expected no value with --dense.name lamb, got 0.9"),
        ({"name": "adam", "max_grad_norm": 1.0}, "--dense.max-grad-norm: expected no value"),
        ({"name": "adagrad", "betas": (0.9, 0.9)}, "--dense.betas: expected no value"),
        ({"name": "sgd", "eps": 1e-8}, "--dense.eps: expected no value"),
        ({"norm_bounds": (2.0, 1.0)}, "--dense.norm-bounds: expected two numbers, 0 <= least <= most"),
        ({"moment_type": "fp8"}, "--dense.moment-type: expected fp32 or bf16, got fp8"),
        ({"name": "adam", "trust_clip": True}, "--dense.trust-clip: expected no value with --dense.name adam"),
        ({"name": "adam", "moment_type": "bf16"}, "--dense.moment-type: expected no value"),
        ({"name": "lars", "trust_coefficient": 0.0}, "--dense.trust-coefficient: expected a number > 0"),
        ({"name": "lars", "variant": "mine"}, "--dense.variant: expected original or paper_lamb"),
        ({"variant": "original"}, "--dense.variant: expected no value with --dense.name lamb"),
    ],
)
def test_nonsense_names_its_flag(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag) as caught:
        DenseOptimizerConfig(**options)
    assert "\n" not in str(caught.value)


def test_configuration_does_not_import_torch() -> None:
    code = "import sys, dlrm.optim.config, dlrm.optim.lr_schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
