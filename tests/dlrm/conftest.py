"""A small click log and a small model of it, for every test that trains; a browser for every page."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dlrm.data.dataset import Dataset, DatasetInfo, FeatureInfo, Part, PartInfo, write_part
from dlrm.data.synthetic import SyntheticConfig, generate
from dlrm.model import DLRM
from embeddings import RowWiseAdagrad, TableConfig

CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class ForkedCommands:
    """Command lines in forks of one process that has imported what they need, one at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, argv: list[str], errors: Path) -> int:
        """Start a command line that adds its standard error to a file; return its process id."""
        assert self._process.stdin is not None
        print(json.dumps([argv, str(errors)]), file=self._process.stdin, flush=True)
        return self.wait()

    def wait(self) -> int:
        """Return the exit status of the command line that was started last, once it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that starts the commands has died"
        return int(line)


@pytest.fixture(scope="module")
def commands(request: pytest.FixtureRequest) -> Iterator[ForkedCommands]:
    """Start `recforge` command lines without seconds of imports: those of the test file's `IMPORTED` are made once."""
    command = [sys.executable, str(Path(__file__).with_name("forked_commands.py")), *request.module.IMPORTED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield ForkedCommands(process)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def click_log(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Twelve thousand synthetic rows in parts of three thousand."""
    config = SyntheticConfig(num_train=12_000, num_valid=4_000, num_test=4_000, max_ids=500, rows_per_part=3_000)
    return generate(config, tmp_path_factory.mktemp("click_log") / "data")


@pytest.fixture
def make_dlrm() -> Callable[..., DLRM]:
    """Build a small DLRM for the columns of a dataset."""

    def make(
        dataset: Dataset, *, seed: int = 0, learning_rate: float = 0.05, eps: float = 1e-8, **settings: object
    ) -> DLRM:
        torch.manual_seed(seed)
        optimizer = RowWiseAdagrad(learning_rate=learning_rate, eps=eps)
        tables = [
            TableConfig(name=f.name, num_rows=f.num_rows, dim=4, optimizer=optimizer) for f in dataset.info.features
        ]
        return DLRM(
            num_numeric=len(dataset.info.numeric), tables=tables, dim=4, bottom=(8,), top=(8,), seed=seed, **settings
        )

    return make


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Dataset]:
    """Write a prepared dataset of one number and one feature `a` from arrays, the same for every split."""

    def make(labels: np.ndarray, ids: np.ndarray, numbers: np.ndarray | None = None, *, num_rows: int = 10) -> Dataset:
        numeric = np.zeros((len(labels), 1), np.float32) if numbers is None else numbers.reshape(-1, 1)
        part = Part(label=labels, numeric=numeric.astype(np.float32), features={"a": ids.astype(np.int32)}, extra={})
        splits: dict[str, tuple[PartInfo, ...]] = {
            split: (write_part(tmp_path / "data", split, 0, part),) for split in ("train", "valid", "test")
        }
        info = DatasetInfo(numeric=("x",), features=(FeatureInfo(name="a", num_rows=num_rows),), splits=splits)
        info.write(tmp_path / "data")
        return Dataset(tmp_path / "data")

    return make


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless chromium that keeps a log of its console and of every request."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("needs chromium and chromedriver on the PATH (Debian: apt install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e '.[test]'")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("chromium")
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()
