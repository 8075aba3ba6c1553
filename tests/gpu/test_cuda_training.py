"""Training on a GPU follows training on the CPU, and its short cuts change nothing but rounding."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlrm.batch import Batch
from dlrm.config import EvaluationConfig, ModelConfig, StepConfig, TablesConfig, TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.data.reader import Reader
from dlrm.data.synthetic import SyntheticConfig, generate
from dlrm.model import build_dlrm
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.training.device_input import copy_ahead
from dlrm.training.run_log import read_records
from dlrm.training.train_step import compile_dense, set_matmul_precision
from dlrm.training.trainer import Trainer

REPOSITORY = Path(__file__).resolve().parents[2]
STEP = StepConfig(global_batch_size=480)  # the last batch has 400
CONFIG = TrainingConfig(
    step=STEP,
    log_every_samples=480,
    dense=DenseOptimizerConfig(name="sgd", learning_rate=0.1),
    evaluation=EvaluationConfig(every_samples=4_800, batch_size=1_500),  # 1,000 are left over
)
DEVICES = [pytest.param("cpu", marks=pytest.mark.long), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    config = SyntheticConfig(num_train=10_000, num_valid=4_000, num_test=4_000, max_ids=500)
    return generate(config, tmp_path_factory.mktemp("log") / "data")


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    yield
    set_matmul_precision("fp32")
    torch._dynamo.reset()


def train(
    dataset: Dataset,
    folder: Path,
    device: str,
    config: TrainingConfig = CONFIG,
    tables: TablesConfig | None = None,
) -> tuple[list[float], float]:
    """Train as `recforge train` does; give the loss of every step and the AUC."""
    torch.manual_seed(0)
    model = build_dlrm(
        dataset.info, ModelConfig(), tables or TablesConfig(kernel="fbgemm", eps=1e-3), seed=0, device=device
    )
    set_matmul_precision(config.step.precision)
    if config.step.compile:
        compile_dense(model, torch.device(device), cuda_graphs=config.step.cuda_graphs)
    summary = Trainer(model, dataset, config, folder).fit()
    return [record["loss"] for record in read_records(folder) if record["kind"] == "train"], summary["auc"]


@pytest.mark.gpu
def test_losses_on_the_gpu_are_those_on_the_cpu(tmp_path: Path, log: Dataset) -> None:
    on_cpu, auc_cpu = train(log, tmp_path / "cpu", "cpu")
    on_gpu, auc_gpu = train(log, tmp_path / "gpu", "cuda")
    assert len(on_gpu) == 21
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
    assert auc_gpu == pytest.approx(auc_cpu, abs=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adam", "lamb", "partial_lamb", "adagrad", "sgd"])
def test_row_optimizers_on_the_gpu_are_ours_on_the_cpu(tmp_path: Path, log: Dataset, optimizer: str) -> None:
    tables = TablesConfig(optimizer=optimizer, eps=None if optimizer == "sgd" else 1e-3, learning_rate=0.02)  # type: ignore[arg-type]
    on_cpu, _ = train(log, tmp_path / "cpu", "cpu", tables=tables)
    on_gpu, _ = train(log, tmp_path / "gpu", "cuda", tables=tables)
    assert on_gpu == pytest.approx(on_cpu, rel=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_compiled_steps_and_replayed_graphs_train_as_plain_ones(tmp_path: Path, log: Dataset, graphs: bool) -> None:
    """With a last batch of another size, and with evaluations of two sizes in between."""
    plain, auc_plain = train(log, tmp_path / "plain", "cuda")
    step = replace(STEP, compile=True, cuda_graphs=graphs)
    compiled, auc_compiled = train(log, tmp_path / "compiled", "cuda", replace(CONFIG, step=step))
    assert compiled == pytest.approx(plain, rel=1e-3)
    assert auc_compiled == pytest.approx(auc_plain, abs=2e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_short_numbers_come_close(tmp_path: Path, log: Dataset, device: str, precision: str) -> None:
    step = replace(STEP, precision=precision)  # type: ignore[arg-type]
    short, auc_short = train(log, tmp_path / "short", device, replace(CONFIG, step=step))
    full, auc_full = train(log, tmp_path / "full", device)
    assert short == pytest.approx(full, rel=2e-2)
    assert auc_short == pytest.approx(auc_full, abs=2e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_that_stopped_goes_on(tmp_path: Path, log: Dataset, device: str) -> None:
    config = replace(
        CONFIG,
        step=StepConfig(global_batch_size=500),
        log_every_samples=500,
        dense=DenseOptimizerConfig(name="lamb", learning_rate=0.01),
    )
    whole, auc_whole = train(log, tmp_path / "whole", device, replace(config, epochs=2))
    train(log, tmp_path / "parts", device, config)
    parts, auc_parts = train(log, tmp_path / "parts", device, replace(config, epochs=2))
    assert len(parts) == len(whole)
    assert parts[:20] == pytest.approx(whole[:20], rel=1e-3)
    assert parts[-20:] == pytest.approx(whole[-20:], rel=5e-3)
    assert auc_parts == pytest.approx(auc_whole, abs=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["uvm", "uvm_caching"])
def test_rows_in_the_hosts_memory_train_as_those_in_the_gpus(tmp_path: Path, log: Dataset, memory: str) -> None:
    fast = TablesConfig(kernel="fbgemm", eps=1e-3)
    whole, _ = train(log, tmp_path / "whole", "cuda", tables=fast)
    slow, _ = train(log, tmp_path / "slow", "cuda", tables=replace(fast, memory=memory))  # type: ignore[arg-type]
    assert slow == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_batches_that_were_copied_ahead_are_those_that_were_read(log: Dataset, device: str) -> None:
    """While something else computes, in memory that is used again and again."""
    work = torch.ones(1_000, 1_000, device=device)
    reader = Reader(log, "train", shuffle=True, seed=0)
    plain = list(reader.batches(300, stop=reader.num_rows))
    seen = 0
    for given, expected in itertools.zip_longest(copy_ahead(iter(plain), torch.device(device)), plain):
        for _ in range(3):
            work = work @ work / 1_000
        with nobody_waits(device):
            assert given.sparse.length_per_key() == expected.sparse.length_per_key()
            copies = [part.clone() for part in parts_of(given)]
        for copy, part in zip(copies, parts_of(expected), strict=True):
            assert copy.device.type == device
            assert torch.equal(copy.cpu(), part)
        seen += len(given)
    assert seen == reader.num_rows


@contextmanager
def nobody_waits(device: str) -> Iterator[None]:
    """Makes it an error of torch's to wait for the GPU."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def parts_of(batch: Batch) -> list[torch.Tensor]:
    return [batch.dense, batch.sparse.values(), batch.sparse.lengths(), batch.labels, batch.rows]


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command_trains_there(tmp_path: Path, log: Dataset, ranks: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, found {torch.cuda.device_count()}")
    few = ["--step.global-batch-size", "250"]
    run = train_by_command(
        log, tmp_path, "--step.device", "cuda", "--step.precision", "bf16", *few, "--ranks", str(ranks)
    )
    assert run.returncode == 0, run.stderr
    assert "recforge: device cuda (--step.device)" in run.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["auc"] > 0.52


@pytest.mark.gpu
def test_more_ranks_than_gpus_are_one_line(tmp_path: Path, log: Dataset) -> None:
    count = torch.cuda.device_count()
    run = train_by_command(log, tmp_path, "--step.device", "cuda", "--ranks", str(count + 1))
    assert run.returncode != 0
    assert f"expected a GPU for each of the {count + 1} ranks of this machine, found {count}" in run.stderr


def train_by_command(dataset: Dataset, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    places = ["--data", str(dataset.folder), "--output", str(folder / "run")]
    return subprocess.run(
        [sys.executable, "-m", "dlrm", "train", "synthetic", *places, *flags],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
