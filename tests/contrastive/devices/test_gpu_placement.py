"""Sequences train on a GPU as on the CPU: on a pretended one, where no tensor is by mistake, and on a real one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from device_cases import CASES, train

from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, generate_sequences

HERE = Path(__file__).resolve().parent
ALIKE = sorted(CASES.keys() - {"dropout"})
ON_PRETENDED = sorted(CASES.keys() - {"dropout", "gru4rec"})  # torch asks a device for a recurrent cell of its own


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    config = SyntheticSequencesConfig(num_users=60, num_items=60, num_tastes=4, mean_actions=8.0, most_actions=20)
    return generate_sequences(config, tmp_path_factory.mktemp("sequences") / "data")


@pytest.fixture(scope="module")
def pretended(world: SequenceDataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each case comes to on the pretended GPU, which has a process of its own."""
    script = [HERE / "device_cases.py", world.folder, tmp_path_factory.mktemp("pretended")]
    done = subprocess.run([sys.executable, *map(str, script)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(found["losses"]) >= 6
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["ranked"] == pytest.approx(expected["ranked"], abs=2e-2)


@pytest.mark.parametrize("case", ON_PRETENDED)
def test_a_device_that_is_not_the_cpu_trains_the_same(
    world: SequenceDataset, pretended: dict[str, dict[str, Any]], tmp_path: Path, case: str
) -> None:
    assert_same(pretended[case], train(torch.device("cpu"), world.folder, tmp_path, CASES[case]))


def test_dropout_elsewhere_is_torchs(pretended: dict[str, dict[str, Any]]) -> None:
    losses = pretended["dropout"]["losses"]
    assert losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command_trains_on_a_gpu(world: SequenceDataset, tmp_path: Path, ranks: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, found {torch.cuda.device_count()}")
    places = ["--data", str(world.folder), "--output", str(tmp_path / "run"), "--epochs", "2", "--ranks", str(ranks)]
    flags = ["--step.device", "cuda", "--step.precision", "bf16", "--step.global-batch-size", "128"]
    command = [sys.executable, "-m", "deploy.cli", "train", "mclrec", *places, *flags]
    run = subprocess.run(command, cwd=HERE.parents[2], capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    on_cpu = [*command[: -len(flags)], "--epochs", "3", "--ranks", "1"]  # where the same run goes on
    done = subprocess.run(on_cpu, cwd=HERE.parents[2], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["samples"] == 3 * world.rows("train")


@pytest.mark.gpu
@pytest.mark.parametrize("case", ALIKE)
def test_a_gpu_trains_the_same(world: SequenceDataset, tmp_path: Path, case: str) -> None:
    expected = train(torch.device("cpu"), world.folder, tmp_path / "cpu", CASES[case])
    assert_same(train(torch.device("cuda"), world.folder, tmp_path / "gpu", CASES[case]), expected)
