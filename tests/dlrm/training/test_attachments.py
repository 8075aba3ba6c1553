"""What attaches to a run is called where it is said, steers its rates and batch sizes, and goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dlrm.config import CheckpointConfig, EvaluationConfig, GuardConfig, StepConfig, TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.metrics.metrics import MetricValues
from dlrm.model import DLRM
from dlrm.training.attachments import Attachment, Attachments, Moment
from dlrm.training.batch_sizes import CUT_AHEAD, BatchSizes
from dlrm.training.run_log import read_records
from dlrm.training.run_parts import RunParts
from dlrm.training.trainer import Trainer

Make = Callable[..., DLRM]
CONFIG = TrainingConfig(
    epochs=0.5,
    step=StepConfig(global_batch_size=500),
    log_every_samples=500,
    evaluation=EvaluationConfig(every_samples=3000),
    guards=GuardConfig(chance_evaluations=0),
)


class Witness(Attachment):
    """Notes every call, and counts steps over all resumes."""

    name = "witness"

    def __init__(self, run: RunParts) -> None:
        self.run, self.calls, self.steps, self.moments = run, [], 0, []
        self.weight = next(run.model.parameters())

    def before_step(self, moment: Moment) -> None:
        self.calls.append("before_step")
        self.moments.append(moment)
        self.before = self.weight.detach().clone()

    def after_backward(self, moment: Moment) -> None:
        self.calls.append("after_backward")
        assert self.weight.grad is not None
        assert torch.equal(self.weight, self.before)

    def after_step(self, moment: Moment, loss: float) -> None:
        self.calls.append("after_step")
        self.steps += 1
        assert loss > 0
        assert not torch.equal(self.weight, self.before)

    def before_measuring(self) -> None:
        self.calls.append("before_measuring")

    def after_evaluation(self, values: MetricValues, samples: int) -> None:
        self.calls.append(f"after_evaluation at {samples}")
        assert 0 < values.auc < 1

    def values(self) -> Mapping[str, float]:
        return {"witnessed_steps": self.steps}

    def state(self) -> Mapping[str, Any]:
        return {"steps": self.steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]


class Grower(Attachment):
    """Doubles the batch when so many samples have been trained."""

    name = "grower"

    def __init__(self, run: RunParts, at: int) -> None:
        self.sizes, self.at = run.sizes, at

    def after_step(self, moment: Moment, loss: float) -> None:
        after = moment.samples + moment.global_size
        if moment.samples < self.at <= after:
            self.sizes.change_after(2 * moment.batch_size, after)


class Halver(Attachment):
    """Halves the rate of one group."""

    name = "halver"

    def __init__(self, group: str) -> None:
        self.group = group

    def factor(self, group: str) -> float:
        return 0.5 if group == self.group else 1.0


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[RunParts], Attachment]], None]:
    """Attach what a function makes to every run of a test."""

    def use(make: Callable[[RunParts], Attachment]) -> None:
        monkeypatch.setattr("dlrm.training.build_step.attach", lambda run: Attachments([make(run)]))

    return use


def test_all_points_come_by_in_their_order(tmp_path: Path, make_dlrm: Make, click_log: Dataset, attached) -> None:
    attached(Witness)
    trainer = Trainer(make_dlrm(click_log), click_log, CONFIG, tmp_path / "run")
    trainer.fit()
    (witness,) = trainer.attachments.members
    step = ["before_step", "after_backward", "after_step"]
    ends = [["before_measuring", f"after_evaluation at {samples}", "before_measuring"] for samples in (3000, 6000)]
    assert witness.calls == [*step * 6, *ends[0], *step * 6, *ends[1]]
    assert [moment.samples for moment in witness.moments] == list(range(0, 6000, 500))
    assert {(moment.global_size, moment.batch_size, len(moment.batch)) for moment in witness.moments} == {(500,) * 3}
    records = [record for record in read_records(tmp_path / "run") if record["kind"] == "train"]
    assert [record["witnessed_steps"] for record in records] == list(range(1, 13))


def test_its_state_goes_on_with_the_run(tmp_path: Path, make_dlrm: Make, click_log: Dataset, attached) -> None:
    attached(Witness)
    for epochs, steps in ((0.25, 6), (0.75, 18)):
        trainer = Trainer(make_dlrm(click_log), click_log, replace(CONFIG, epochs=epochs), tmp_path / "run")
        trainer.fit()
        assert trainer.attachments.members[0].steps == steps


@pytest.mark.parametrize(("group", "scaled"), [("dense", "dense"), ("tables", "tables"), ("head", "none")])
def test_factors_reach_the_rates_of_their_group(
    tmp_path: Path, make_dlrm: Make, click_log: Dataset, attached, group: str, scaled: str
) -> None:
    attached(lambda run: Halver(group))
    trainer = Trainer(make_dlrm(click_log), click_log, replace(CONFIG, epochs=0.25), tmp_path / "run")
    trainer.fit()
    record = next(record for record in read_records(tmp_path / "run") if record["kind"] == "train")
    rate = CONFIG.dense.learning_rate
    assert record["dense_learning_rate"] == (rate / 2 if scaled == "dense" else rate)
    assert record["tables_learning_rate_factor"] == (0.5 if scaled == "tables" else 1.0)


@pytest.mark.parametrize("cut", [1000, 1500, 3000, 5000])
def test_a_run_that_stops_while_its_batch_grows_goes_on_as_if_it_had_not(
    tmp_path: Path, make_dlrm: Make, click_log: Dataset, attached, cut: int
) -> None:
    attached(lambda run: Grower(run, at=1000))
    config = replace(CONFIG, epochs=8500 / 12_000, checkpoint=CheckpointConfig(every_samples=500))
    states = []
    for name, lengths in (("whole", [8500]), ("cut", [cut, 8500])):
        for samples in lengths:
            model = make_dlrm(click_log)
            trainer = Trainer(model, click_log, replace(config, epochs=samples / 12_000), tmp_path / name)
            trainer.fit()
        states.append(model.state_dict())
    sizes = [r["batch_size"] for r in read_records(tmp_path / "whole") if r["kind"] == "train"]
    assert sizes == [500] * 6 + [1000] * 6
    assert trainer.sizes.state() == [(0, 500), (3000, 1000)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="expected different names, got halver, halver"):
        Attachments([Halver("dense"), Halver("tables")])


def test_sizes_are_a_function_of_the_samples_before() -> None:
    sizes = BatchSizes(100)
    assert sizes.change_after(300, 200) == 200 + CUT_AHEAD * 100
    assert [sizes.at(samples) for samples in (0, 599, 600, 10_000)] == [100, 100, 300, 300]
    sizes.change(700, from_samples=500)  # takes the place of what was to follow
    assert [sizes.at(samples) for samples in (499, 500, 600)] == [100, 700, 700]
    sizes.change(700, from_samples=900)
    other = BatchSizes(1)
    other.load_state(sizes.state())
    assert other.state() == [(0, 100), (500, 700)]
