"""Batches grow to the size that a test asks for, never shrink, and go on as they were after a kill."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dlrm.batch import Batch
from dlrm.config import CheckpointConfig, GuardConfig, StepConfig, TrainingConfig
from dlrm.model import DLRM
from dlrm.noise.config import NoiseScaleConfig
from dlrm.noise.gradient_meter import Measured, ProductSums
from dlrm.noise.noise_scale import GradientSums
from dlrm.optim.lr_schedules import Schedule
from dlrm.training.attachments import Moment
from dlrm.training.batch_growth import StagedGrowth, TestedGrowth
from dlrm.training.batch_growth_config import BatchGrowthConfig, parse_stages
from dlrm.training.batch_sizes import BatchSizes
from dlrm.training.batch_tests import Moments, propose_size, split_variance
from dlrm.training.run_log import read_records
from dlrm.training.trainer import Trainer
from embeddings.interface import Tables

DIM = 10
MEAN = np.linspace(0.1, 0.3, DIM)
SPREAD = np.linspace(1.0, 2.0, DIM)  # of each component of a sample's gradient


class Draws:
    """Stands in for the watch of a model whose samples' gradients are MEAN + SPREAD * normal."""

    def __init__(self, decay: float = 0.995) -> None:
        self.config = NoiseScaleConfig(decay=decay)
        self.random = np.random.default_rng(0)
        self.latest: Measured | None = None

    def draw(self, size: int) -> None:
        gradients = MEAN + SPREAD * self.random.normal(size=(size, DIM))
        mean = gradients.mean(axis=0)
        products = gradients @ mean
        squares = (gradients**2).sum()
        dense = GradientSums(size, size * (size - 1.0), squares, size**2 * (mean**2).sum())
        sums = ProductSums(size, products.sum(), (products**2).sum(), squares, (mean**2).sum())
        self.latest = Measured({"dense": dense}, sums)


def run_growth(config: BatchGrowthConfig, steps: int, first: int = 8) -> list[int]:
    sizes, watch, samples, taken = BatchSizes(first), Draws(), 0, []
    growth = TestedGrowth(sizes, config, watch, largest=config.max_batch_size or 100_000, round_to=4)
    batch = Batch(torch.zeros(0, 0), None, torch.zeros(0), torch.zeros(0))
    for _ in range(steps):
        size = sizes.at(samples)
        moment = Moment(batch, samples, size, size)
        growth.before_step(moment)
        watch.draw(size)
        growth.after_step(moment, 0.0)
        taken.append(size)
        samples += size
    return taken


def expected_size(config: BatchGrowthConfig) -> float:
    norm, along = MEAN @ MEAN, MEAN @ (SPREAD**2 * MEAN)
    if config.test == "norm":
        return (SPREAD**2).sum() / (config.norm_tolerance**2 * norm)
    inner = along / (config.inner_product_tolerance**2 * norm**2)
    across = ((SPREAD**2).sum() - along / norm) / (config.orthogonality_tolerance**2 * norm)
    return inner if config.test == "inner_product" else max(inner, across)


@pytest.mark.parametrize(
    "config",
    [
        BatchGrowthConfig(test="norm", norm_tolerance=0.5),
        BatchGrowthConfig(test="norm", norm_tolerance=1.0),
        BatchGrowthConfig(test="augmented", orthogonality_tolerance=0.6),
    ],
)
def test_converges_to_the_size_that_passes(config: BatchGrowthConfig) -> None:
    taken = run_growth(config, 1500)
    assert taken == sorted(taken)
    assert taken[-1] == pytest.approx(expected_size(config), rel=0.1)
    assert taken[-1] % 4 == 0


def test_inner_product_counts_the_noise_of_the_batch_itself() -> None:
    # The batch's own noise adds tr(Sigma^2) / B to the variance along g, so that the size B solves a square equation.
    config = BatchGrowthConfig(test="inner_product", inner_product_tolerance=0.2, step_ratio=1.2)
    taken = run_growth(config, 1500)
    pure = expected_size(config)
    own_noise = (SPREAD**4).sum() / (0.2**2 * (MEAN @ MEAN) ** 2)
    assert taken[-1] == pytest.approx(pure / 2 + np.sqrt(pure**2 / 4 + own_noise), rel=0.1)
    assert taken == sorted(taken)


def test_grows_by_no_more_than_allowed_and_not_before_it_knows() -> None:
    config = BatchGrowthConfig(
        test="norm", norm_tolerance=0.2, max_batch_size=100, step_ratio=1.5, first_measurements=7
    )
    taken = run_growth(config, 200)
    assert set(taken[:7]) == {8}
    assert taken[-1] == 100
    assert all(after <= 1.5 * before + 4 for before, after in itertools.pairwise(taken))


def test_variance_is_split_along_and_across_the_mean() -> None:
    gradients = np.random.default_rng(2).normal(size=(50, DIM)) + MEAN
    mean = gradients.mean(axis=0)
    products = gradients @ mean
    sums = ProductSums(50, products.sum(), (products**2).sum(), (gradients**2).sum(), mean @ mean)
    along, across = split_variance(sums)
    assert along == pytest.approx(products.var(ddof=1))
    residues = gradients - np.outer(products, mean) / (mean @ mean)
    assert across == pytest.approx((residues**2).sum() / 49)


def test_adagrad_norm_with_the_norm_test_needs_one_over_k_steps() -> None:
    """The mean squared gradient norm over K steps falls as 1/K on a smooth function that is not convex (AdAdaGrad)."""
    random, config = np.random.default_rng(3), BatchGrowthConfig(test="norm", norm_tolerance=0.5)
    w, accumulated, size, noise = np.linspace(-3.0, 3.0, DIM) + 0.1, 0.01**2, 4, 0.5
    moments, norms, sizes = Moments(), [], []
    for _ in range(2000):
        gradient = 2 * w / (1 + w**2) ** 2  # of the sum of w^2 / (1 + w^2)
        mean = gradient + noise * random.normal(size=DIM) / np.sqrt(size)
        around = noise**2 * random.chisquare((size - 1) * DIM)  # sum of |g_i - g|^2
        squares = around + size * (mean @ mean)
        moments.add(Measured({"dense": GradientSums(size, size * (size - 1.0), squares, size**2 * (mean @ mean))}), 0.8)
        accumulated += mean @ mean
        w = w - mean / np.sqrt(accumulated)
        norms.append(gradient @ gradient)
        sizes.append(size)
        size = max(size, min(2 * size, int(propose_size(moments, config) or 0), 1 << 40))
    assert sizes == sorted(sizes)
    means = np.cumsum(norms) / np.arange(1, len(norms) + 1)
    steps = np.geomspace(50, len(norms) - 1, 20).astype(int)
    slope = np.polyfit(np.log(steps + 1), np.log(means[steps]), 1)[0]
    assert slope <= -0.8
    assert sizes[-1] > 100 * sizes[0]


def train(dataset, model, config: TrainingConfig, output: Path) -> list[dict[str, Any]]:
    Trainer(model, dataset, config, output).fit()
    return [record for record in read_records(output) if record["kind"] == "train"]


def test_stages_are_taken_where_they_were_said_and_warmed_up(click_log, make_dlrm, tmp_path: Path, config_of) -> None:
    growth = BatchGrowthConfig(stages=("2000=200", "6_000=400"), rewarm_samples=800)
    records = train(click_log, make_dlrm(click_log), config_of(growth), tmp_path / "run")
    assert {record["batch_size"] for record in records} == {100, 200, 400}
    for before, record in zip([{"samples": 0}, *records], records, strict=False):
        begin = before["samples"]
        assert record["batch_size"] == (100 if begin < 2000 else 200 if begin < 6000 else 400)
        middle = (begin + record["samples"]) / 2
        since = middle - (0 if begin < 2000 else 2000 if begin < 6000 else 6000)
        factor = min(1.0, since / 800) if begin >= 2000 else 1.0
        assert record["dense_learning_rate"] == pytest.approx(0.1 * factor)


def test_states_of_tables_follow_the_batch_size_also_right_after_a_kill() -> None:
    sizes, seen = BatchSizes(100), []
    config = BatchGrowthConfig(stages=("100=300", "400=600"))
    growth = StagedGrowth(sizes, config, parse_stages(config.stages), lambda *change: seen.append(change))
    growth.before_step(Moment(None, 0, 100, 100))
    assert seen == [(100, 100)]  # which sets the tables' eps
    seen.clear()
    again = StagedGrowth(BatchSizes(100), config, [], lambda *change: seen.append(change))
    again.load_state(growth.state())
    for samples, size in ((100, 300), (400, 600), (1000, 600)):
        again.before_step(Moment(None, samples, size, sizes.at(samples)))
    assert seen == [(100, 300), (300, 600)]


def test_rows_keep_their_pace_where_eps_matters(click_log, make_dlrm, tmp_path: Path, config_of) -> None:
    """Both the state and eps are compared with gradients, which are k times smaller in a batch k times as large."""

    def movement(name: str, growth: BatchGrowthConfig) -> float:
        model, begin = make_dlrm(click_log, learning_rate=1.0, eps=0.01), {}
        tables = next(module for module in model.modules() if isinstance(module, Tables))
        trainer = Trainer(model, click_log, config_of(growth, **short), tmp_path / name)
        before_step = trainer.step.attachments.before_step

        def note_rows(moment: Moment) -> None:
            before_step(moment)
            if moment.samples >= 960 and not begin:
                begin.update({rows.config.name: rows.weight.clone() for rows in tables.rows()})

        trainer.step.attachments.before_step = note_rows
        trainer.fit()
        moved = torch.cat([(rows.weight - begin[rows.config.name]).norm(dim=1) for rows in tables.rows()])
        return float(moved[moved > 0].median())

    step, guards = StepConfig(global_batch_size=32, device="cpu", threads=1), GuardConfig(chance_evaluations=0)
    short = {"epochs": 0.15, "step": step, "guards": guards}
    small, grown = movement("small", BatchGrowthConfig()), movement("grown", BatchGrowthConfig(stages=("960=256",)))
    left = movement("left", BatchGrowthConfig(stages=("960=256",), rescale_states=False))
    assert small / 1.5 < grown < small * 1.5
    assert left < small / 1.5


def test_growth_instead_of_decay_keeps_the_rate_up(click_log, make_dlrm, tmp_path: Path, config_of) -> None:
    schedule = Schedule(decay_samples=12_000)
    growth = BatchGrowthConfig(instead_of_decay=True, max_batch_size=400)
    records = train(click_log, make_dlrm(click_log), config_of(growth, dense_schedule=schedule), tmp_path / "run")
    sizes = [record["batch_size"] for record in records]
    assert sizes == sorted(sizes)
    assert set(sizes) == {100, 200, 400}
    for before, record in zip([{"samples": 0}, *records], records, strict=False):
        middle = (before["samples"] + record["samples"]) / 2
        noise = record["dense_learning_rate"] / record["batch_size"]
        assert noise == pytest.approx(0.1 * schedule.factor(middle) / 100)


def fail_after(samples: int) -> Any:
    """A step that ends the run as a full disk would, in the middle of its growth."""
    after_step = TestedGrowth.after_step

    def fail(self: TestedGrowth, moment: Moment, loss: float) -> None:
        if moment.samples > samples:
            raise OSError("the lights went out")
        after_step(self, moment, loss)

    return fail


def test_a_run_that_was_stopped_while_growing_goes_on_alike(
    click_log, make_dlrm, tmp_path: Path, monkeypatch, config_of
) -> None:
    growth = BatchGrowthConfig(test="norm", norm_tolerance=0.3, first_measurements=3, max_batch_size=1200)
    config = config_of(growth, checkpoint=CheckpointConfig(every_samples=700))

    def model() -> DLRM:  # whose rows feel that eps is not in the checkpoint
        return make_dlrm(click_log, learning_rate=1.0, eps=0.01)

    expected = train(click_log, model(), config, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(TestedGrowth, "after_step", fail_after(4_000))
        with pytest.raises(OSError, match="the lights went out"):
            train(click_log, model(), config, tmp_path / "halves")
    resumed = train(click_log, model(), config, tmp_path / "halves")
    sizes = [record["batch_size"] for record in expected]
    assert len(set(sizes)) > 2
    assert sizes == sorted(sizes)

    def lasting(records: list[dict[str, Any]]) -> str:
        timed = ("seconds", "samples_per_second", "stages")
        return json.dumps([{k: v for k, v in record.items() if k not in timed} for record in records])

    assert lasting(resumed) == lasting(expected)


def test_says_once_that_the_gradient_cannot_be_told_from_noise(monkeypatch, capsys) -> None:
    monkeypatch.setattr(Draws, "draw", lambda self, size: draw_opposed(self, size))
    assert set(run_growth(BatchGrowthConfig(test="norm"), 20)) == {8}
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("recforge: --growth.test norm: after 5 measurements the gradient cannot be told from noise")


def draw_opposed(draws: Draws, size: int) -> None:
    """Half of the samples' gradients are the others' times -1."""
    draws.latest = Measured({"dense": GradientSums(size, size * (size - 1.0), float(size), 0.0)})
