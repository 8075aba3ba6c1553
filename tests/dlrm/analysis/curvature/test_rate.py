"""A rate and a momentum from eigenvalues: as fast as theory says on a quadratic, and part of a run that goes on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dlrm.analysis.curvature.lanczos import RitzValues, lanczos
from dlrm.analysis.curvature.rate import DenseLoss, SlqLrLearner, heavy_ball
from dlrm.analysis.curvature.rate_config import CurvatureRateConfig
from dlrm.config import CheckpointConfig, EvaluationConfig, GuardConfig, StepConfig, TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.model import DLRM
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.training.run_log import read_records
from dlrm.training.trainer import Trainer

Make = Callable[..., DLRM]
EXACT = CurvatureRateConfig(
    every_samples=1, noise_cut=1e-8, smoothing=0.0, share=1.0, least_rate=1e-9, most_rate=1e9, most_momentum=0.9999
)
CONFIG = TrainingConfig(
    epochs=3000 / 12_000,
    step=StepConfig(global_batch_size=250),
    dense=DenseOptimizerConfig(name="sgd", learning_rate=0.02),
    curvature_rate=CurvatureRateConfig(every_samples=1000, steps=6),
    log_every_samples=250,
    evaluation=EvaluationConfig(every_samples=100_000, test_best=False),
    guards=GuardConfig(chance_evaluations=0),
)


class Parts(nn.Module):
    """What the learner asks of a model: tables apart from the dense part."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.tables, self.dense = nn.Identity(), dense


def learner(config: CurvatureRateConfig, optimizer: torch.optim.Optimizer) -> SlqLrLearner:
    return SlqLrLearner(config, Parts(nn.Linear(2, 2)), optimizer)


def attached(trainer: Trainer) -> SlqLrLearner:
    """Return the learner among all that is attached to a run."""
    return next(member for member in trainer.attachments.members if isinstance(member, SlqLrLearner))


def ritz(*values: float) -> RitzValues:
    numbers = torch.tensor(values, dtype=torch.float64)
    return RitzValues(values=numbers, weights=torch.ones_like(numbers), errors=torch.zeros_like(numbers))


@pytest.mark.parametrize("kappa", [10.0, 100.0, 1000.0])
def test_a_quadratics_error_shrinks_at_the_rate_of_theory(quadratic, kappa: float) -> None:
    curvatures = torch.logspace(0, math.log10(kappa), 25).double() * 0.3
    objective = quadratic(curvatures, torch.randn(25).double())
    weights = nn.Parameter(objective.weights())
    optimizer = torch.optim.SGD([weights], lr=1.0)
    learned = learner(EXACT, optimizer)
    learned.take(lanczos(lambda vector: objective.hessian_product(weights.detach(), vector), weights.detach(), 25))
    rate, momentum = learned.rate_and_momentum
    optimizer.param_groups[0].update(lr=rate, momentum=momentum)
    distances = []
    for _ in range(600):
        weights.grad = objective.gradient(weights.detach())[1]
        optimizer.step()
        distances.append(weights.detach().norm().item())
    steps = next(step for step, distance in enumerate(distances) if distance < 1e-9 or step == 599)
    shrinkage = (distances[steps] / distances[steps // 2]) ** (1 / (steps - steps // 2))
    expected = (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
    assert shrinkage == pytest.approx(expected, rel=0.1)
    assert learned.factor("dense") == pytest.approx(heavy_ball(float(curvatures[-1]), float(curvatures[0]))[0])


def test_eigenvalues_are_smoothed_cut_and_clipped() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    learned = learner(replace(EXACT, smoothing=0.5, noise_cut=0.01), optimizer)
    assert learned.factor("dense") == 1.0
    assert learned.values() == {}
    learned.take(ritz(-5.0, 0.5, 1.0, 16.0, 100.0))
    assert (learned.largest, learned.smallest) == (100.0, 16.0)  # 1.0 is no more than a hundredth
    learned.take(ritz(4.0, 9.0, 400.0))
    assert learned.largest == pytest.approx(200.0)
    assert learned.smallest == pytest.approx(12.0)  # 4.0 is a hundredth of the new, and does not count
    learned.take(ritz(-3.0, -1.0))
    assert learned.largest == pytest.approx(200.0)
    assert learned.factor("tables") == 1.0
    assert learned.factor("head") == pytest.approx(heavy_ball(200.0, 12.0)[0] / 0.1)
    bounded = learner(CurvatureRateConfig(every_samples=1, most_rate=0.001, most_momentum=0.3), optimizer)
    bounded.take(ritz(1.0, 100.0))
    assert bounded.rate_and_momentum == (0.001, 0.3)


def test_the_smallest_never_passes_the_largest() -> None:
    learned = learner(replace(EXACT, smoothing=0.5), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    learned.take(ritz(100.0, 100.0))
    learned.take(ritz(1.0, 1.0))
    assert learned.largest == learned.smallest == pytest.approx(10.0)
    assert learned.rate_and_momentum == pytest.approx((0.1, 0.0))


def test_it_measures_the_dense_parts_hessian_on_the_batch(
    tmp_path: Path, make_dlrm: Make, click_log: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest eigenvalue of the first batch, by torch.func on a copy of the model as it was before training."""
    model = make_dlrm(click_log, interaction="fm", dropout=0.3)
    dense = copy.deepcopy(model.dense).double().eval()
    batch = None

    def keep(self: SlqLrLearner, moment: object) -> None:
        nonlocal batch
        batch = moment.batch if batch is None else batch
        before(self, moment)

    before = SlqLrLearner.before_step
    monkeypatch.setattr(SlqLrLearner, "before_step", keep)
    rows = model.tables
    pooled: list[torch.Tensor] = []
    rows.register_forward_hook(lambda _module, _inputs, output: pooled.append(output.values().detach().double()))
    config = replace(CONFIG, epochs=250 / 12_000, curvature_rate=replace(EXACT, every_samples=1000, steps=60))
    trainer = Trainer(model, click_log, config, tmp_path / "run")
    trainer.fit()
    names = [name for name, _ in dense.named_parameters()]
    sizes = [parameter.numel() for parameter in dense.parameters()]
    shapes = [parameter.shape for parameter in dense.parameters()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        pieces = [piece.view(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)]
        weights = dict(zip(names, pieces, strict=True))
        logits = torch.func.functional_call(dense, weights, (batch.dense.double(), pooled[0]))
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.double())

    flat = torch.cat([parameter.detach().flatten() for parameter in dense.parameters()])
    exact = torch.linalg.eigvalsh(torch.func.jacrev(torch.func.jacrev(loss), chunk_size=64)(flat))
    learned = attached(trainer)
    assert learned.largest == pytest.approx(exact[-1].item(), rel=1e-5)


def test_a_run_that_was_cut_goes_on_with_the_same_rates(tmp_path: Path, make_dlrm: Make, click_log: Dataset) -> None:
    config = replace(CONFIG, checkpoint=CheckpointConfig(every_samples=250))
    states = []
    for name, lengths in (("whole", [3000]), ("cut", [1750, 3000])):
        for samples in lengths:
            model = make_dlrm(click_log)
            trainer = Trainer(model, click_log, replace(config, epochs=samples / 12_000), tmp_path / name)
            trainer.fit()
        states.append(model.state_dict())
    assert attached(trainer).measurements == 4
    records = [record for record in read_records(tmp_path / "cut") if record["kind"] == "train"]
    rates = [record["dense_learning_rate"] for record in records]
    assert rates[0] == 0.02  # nothing was measured before the first step
    assert len(set(rates)) == 4
    assert records[0]["dense_momentum"] == 0
    assert all(0 < record["dense_momentum"] <= 0.95 for record in records[1:])
    assert trainer.optimizer.param_groups[0]["momentum"] == records[-1]["dense_momentum"]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_a_compiled_dense_part_is_measured_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled has no second derivative."""
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)  # the real one is loaded for seconds
    dense = nn.Linear(3, 1)
    dense.compile()
    assert dense._compiled_call_impl is not None
    assert DenseLoss(dense).dense._compiled_call_impl is None


def test_other_optimizers_are_refused(tmp_path: Path, make_dlrm: Make, click_log: Dataset) -> None:
    config = replace(CONFIG, dense=DenseOptimizerConfig(name="adam", learning_rate=0.02))
    with pytest.raises(ValueError, match=r"--curvature-rate: expected --dense\.name sgd beside it, got Adam"):
        Trainer(make_dlrm(click_log), click_log, config, tmp_path / "run")


@pytest.mark.parametrize(
    ("setting", "flag"),
    [({"every_samples": 0}, "every-samples"), ({"steps": 1}, "steps"), ({"share": 1.5}, "share")],
)
def test_settings_out_of_range_name_their_flag(setting: dict[str, float], flag: str) -> None:
    with pytest.raises(ValueError, match=f"--curvature-rate.{flag}: expected"):
        CurvatureRateConfig(**setting)
