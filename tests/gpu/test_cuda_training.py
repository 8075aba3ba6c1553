"""Training on a GPU follows training on the CPU: the same rows, weights and losses, up to rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlrm.config import EvaluationConfig, ModelConfig, StepConfig, TablesConfig, TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.data.synthetic import SyntheticConfig, generate
from dlrm.model import build_dlrm
from dlrm.training.run_log import read_records
from dlrm.training.trainer import Trainer

pytestmark = pytest.mark.gpu
CONFIG = TrainingConfig(
    step=StepConfig(global_batch_size=500), log_every_samples=500, evaluation=EvaluationConfig(every_samples=10_000)
)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    config = SyntheticConfig(num_train=10_000, num_valid=4_000, num_test=4_000, max_ids=500)
    return generate(config, tmp_path_factory.mktemp("log") / "data")


def train(dataset: Dataset, folder: Path, device: str, config: TrainingConfig = CONFIG) -> tuple[list[float], float]:
    torch.manual_seed(0)
    model = build_dlrm(dataset.info, ModelConfig(), TablesConfig(), seed=0, device=device)
    summary = Trainer(model, dataset, config, folder).fit()
    return [record["loss"] for record in read_records(folder) if record["kind"] == "train"], summary["auc"]


def test_losses_on_the_gpu_are_those_on_the_cpu(tmp_path: Path, log: Dataset) -> None:
    on_cpu, auc_cpu = train(log, tmp_path / "cpu", "cpu")
    on_gpu, auc_gpu = train(log, tmp_path / "gpu", "cuda")
    assert len(on_gpu) == 20
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
    assert auc_gpu == pytest.approx(auc_cpu, abs=2e-3)


def test_bf16_on_the_gpu_comes_close(tmp_path: Path, log: Dataset) -> None:
    half = replace(CONFIG, step=replace(CONFIG.step, precision="bf16"))
    assert train(log, tmp_path / "half", "cuda", half)[1] == pytest.approx(
        train(log, tmp_path / "full", "cuda")[1], abs=2e-2
    )


def test_a_run_on_the_gpu_resumes(tmp_path: Path, log: Dataset) -> None:
    whole = train(log, tmp_path / "whole", "cuda", replace(CONFIG, epochs=2))
    train(log, tmp_path / "parts", "cuda")
    assert train(log, tmp_path / "parts", "cuda", replace(CONFIG, epochs=2))[0] == pytest.approx(whole[0], rel=1e-3)
