"""The report says which batch is too large, by how much, and what it could not measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dlrm.analysis.noise import describe_noise
from dlrm.analysis.report import write_report
from dlrm.analysis.run_folder import read_run
from dlrm.noise.critical_batch import fewer_steps, more_samples, relative_samples


def write_noise(folder: Path, *, batch_size: int = 4096, **noise: Any) -> None:
    """Add to each train record the values of a run whose noise scales rise to the given ones."""
    lines = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "train":
            share = record["samples"] / 1_000_000
            scaled = {f"noise_scale/{name}": value and value * share for name, value in noise.items()}
            record |= {"batch_size": batch_size, **scaled}
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_what_a_batch_costs() -> None:
    assert relative_samples(4096, 4096) == 2
    assert more_samples(300, 100) == pytest.approx(7 / 4 - 1)
    # Twice the batch with 7/4 of the samples: 7/8 of the steps.
    assert fewer_steps(300, 100) == pytest.approx(1 / 8)
    assert more_samples(1, 1e9) == pytest.approx(0, abs=1e-8)
    assert fewer_steps(1, 1e9) == pytest.approx(0.5)


def test_a_small_batch(write_run) -> None:
    folder = write_run()
    write_noise(folder, dense=12_288.0, tables=40_000.0, top=9_000.0)
    section = describe_noise(read_run(folder))
    assert section is not None
    assert section.warning is None
    first, second = section.words
    assert "critical batch size is about 12,000 samples" in first
    assert "The batch of 4,096 is 33 % of it" in first
    assert "about 1.3 times the samples" in first
    assert "Doubling it would cost about 25 % more samples and save about 38 % of the steps" in second
    assert [chart.name for chart in section.charts] == ["noise-scale", "noise-parts"]
    assert ("#7d8590", "batch size") in section.charts[0].legend


def test_a_batch_much_too_large(write_run) -> None:
    folder = write_run()
    write_noise(folder, batch_size=65_536, dense=1000.0, **{"table/site": 70_000.0, "table/app": 900.0})
    section = describe_noise(read_run(folder))
    assert section is not None
    assert section.warning is not None
    assert section.warning.startswith("The batch is 66 times the critical one")
    assert "--step.global-batch-size 1_024 to 2_048" in section.warning
    assert [table[0] for table in section.tables] == ["app", "site"]
    page = write_report(folder).read_text()
    assert "Is the batch too large?" in page
    assert "<code>--growth.test</code>" in page


def test_an_unknown_noise_and_what_was_left_out(write_run) -> None:
    folder = write_run()
    write_noise(folder, dense=None, tables=5000.0, **{"left_out/top.1.gamma": 64.0})
    section = describe_noise(read_run(folder))
    assert section is not None
    assert section.warning is None
    assert section.words[0].startswith("The critical batch size is not known")
    assert section.words[1].endswith("there: top.1.gamma.")


def test_a_run_that_did_not_measure(write_run) -> None:
    folder = write_run()
    assert describe_noise(read_run(folder)) is None
    assert "Is the batch too large?" not in write_report(folder).read_text()
