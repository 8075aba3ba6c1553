"""A configuration gives the optimizer it names, with its options, or one line that names the flag."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from dlrm.optim.config import DenseOptimizerConfig
from dlrm.optim.dense import build_dense_optimizer
from dlrm.optim.lamb import Lamb

CASES: dict[str, tuple[dict[str, Any], Callable[[list[dict[str, Any]]], Optimizer]]] = {
    "lamb": ({"weight_decay": 0.1, "max_grad_norm": 0.5}, lambda groups: Lamb(groups, 0.02, max_grad_norm=0.5)),
    "lamb options": (
        {"betas": (0.8, 0.99), "eps": 1e-3},
        lambda groups: Lamb(groups, 0.02, betas=(0.8, 0.99), eps=1e-3),
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
    train(ours, build_dense_optimizer(config, ours.named_parameters()))
    train(theirs, reference)
    before = network().state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
        assert not torch.equal(value, before[name]), name


def test_groups_name_their_parameters_and_leave_frozen_ones_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = build_dense_optimizer(DenseOptimizerConfig(), model.named_parameters())
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["3.weight"],
        ["1.weight", "1.bias", "3.bias"],
    ]


def test_a_model_without_vectors_gets_one_group() -> None:
    optimizer = build_dense_optimizer(DenseOptimizerConfig(), torch.nn.Linear(2, 2, bias=False).named_parameters())
    assert len(optimizer.param_groups) == 1


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one dense parameter"):
        build_dense_optimizer(DenseOptimizerConfig(), [])


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"name": "lion"}, "--dense.name: expected one of lamb, sgd"),
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
    ],
)
def test_nonsense_names_its_flag(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag) as caught:
        DenseOptimizerConfig(**options)
    assert "\n" not in str(caught.value)


def test_configuration_does_not_import_torch() -> None:
    code = "import sys, dlrm.optim.config, dlrm.optim.lr_schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
