"""The configuration that `recforge init` writes trains a small log to an AUC that the defaults do not come near."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from dlrm.checkpoints.run_state import seed_generators
from dlrm.data.commands import run_init
from dlrm.data.config_file import load_config
from dlrm.data.first_settings import choose_settings
from dlrm.data.infer import infer_schema
from dlrm.data.prepare import prepare
from dlrm.model import build_dlrm
from dlrm.training.trainer import Trainer


@pytest.mark.parametrize(
    ("rows", "batch_size", "epochs"),
    [
        (1, 64, 5),
        (2_400, 64, 5),
        (16_000, 64, 2),
        (160_000, 512, 2),
        (1_000_000, 4096, 3),
        (4_000_000, 4096, 1),
        (4_000_000_000, 4096, 1),
    ],
)
def test_settings_by_rows(rows: int, batch_size: int, epochs: int) -> None:
    settings = choose_settings(rows)
    assert (settings.batch_size, settings.epochs) == (batch_size, epochs)
    if rows >= 8_000:
        assert rows // batch_size * epochs >= 400


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 rows whose users and items differ in how often they are clicked."""
    draw = random.Random(0)
    likes = {kind: [draw.gauss(0, 1) for _ in range(1000)] for kind in ("user", "item")}
    path = tmp_path_factory.mktemp("log") / "clicks.csv"
    with path.open("w") as file:
        file.write("time,user,item,price,clicked\n")
        for i in range(20_000):
            user, item = (min(int(draw.paretovariate(0.5)), 1000) - 1 for _ in range(2))
            user = draw.randrange(1000) if draw.random() < 0.5 else user
            logit = likes["user"][user] + likes["item"][item] - 1
            clicked = int(draw.random() < 1 / (1 + math.exp(-logit)))
            file.write(f"{1_700_000_000 + i},u{user},i{item},{draw.lognormvariate(2, 1):.2f},{clicked}\n")
    return path


def test_the_written_configuration_learns(log: Path, tmp_path: Path) -> None:
    run_init([str(log), "--output", str(tmp_path / "my.toml")])
    written = load_config(tmp_path / "my.toml").run_config()
    (tmp_path / "default.toml").write_text((tmp_path / "my.toml").read_text().partition("[train]")[0])
    plain = load_config(tmp_path / "default.toml").run_config()
    assert (written.step.global_batch_size, written.epochs) == (64, 2)
    dataset = prepare(infer_schema([log]).schema, [log], tmp_path / "data", processes=1)
    auc = []
    for name, config in (("written", written), ("default", plain)):
        seed_generators(config.seed)
        model = build_dlrm(dataset.info, config.model, config.tables, seed=config.seed, device="cpu")
        auc.append(Trainer(model, dataset, config, tmp_path / name).fit()["auc"])
    assert auc[0] > 0.68
    assert auc[0] > auc[1] + 0.05


def test_rows_are_estimated_from_the_first_ones(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlrm.data.column_sample.SAMPLE_BYTES", 100_000)
    found = infer_schema([log])
    assert found.rows < 5_000
    assert found.training_rows == pytest.approx(16_000, rel=0.05)
