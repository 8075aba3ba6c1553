"""Settings are chosen on validation alone, tables hold the test split's means, and every method's flags are flags."""

from __future__ import annotations

import itertools
import json

import pytest

from benchmarks import sequence_quality
from benchmarks.sequence_methods import METHODS, schedule
from benchmarks.sequence_runs import Run, SequenceRuns
from contrastive.command import SEQUENCES_RUNS
from dlrm.cli import parse

NAMES = [f"{metric}@{k}" for metric in ("recall", "ndcg") for k in (5, 10, 20)]


def save(folder, valid, test, epochs=16) -> None:
    """Leave what a finished run leaves, with all metrics of the test split equal."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"epochs": float(epochs)}))
    lines = [{"kind": "train", "samples": 1}, *({"kind": "valid", "samples": n, "mrr_10": v} for n, v in valid)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ranked = {f"{kind}/{name}": test for kind in ("filtered", "unfiltered") for name in NAMES}
    (folder / "summary.json").write_text(json.dumps({"ranked": ranked, "seconds": 1.0, "samples": 100 * epochs}))


def test_a_trial_is_no_longer_than_the_run(tmp_path, data, capsys, monkeypatch) -> None:
    flags = ["--data", str(data), "--folder", str(tmp_path), "--epochs", "3", "--trial-epochs"]
    for epochs in ("0", "4"):
        monkeypatch.setattr("sys.argv", ["sequence_quality", *flags, epochs])
        with pytest.raises(SystemExit):
            sequence_quality.main()
        assert f"--trial-epochs: expected 1 to 3 (--epochs), got {epochs}" in capsys.readouterr().err


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "actions.txt"
    file.write_text("\n".join(f"{user} {user} {user + 1} {user + 2} {user + 3}" for user in range(1, 9)) + "\n")
    return file


def test_validation_chooses_the_setting(run_benchmark, tmp_path, data) -> None:
    # The second setting ranks best on validation, at its first evaluation, and worst on the test split.
    save(tmp_path / "sasrec-0-0", [(100, 0.2), (200, 0.3)], 0.9)
    save(tmp_path / "sasrec-1-0", [(100, 0.4), (200, 0.1)], 0.5)
    save(tmp_path / "sasrec-1-1", [(100, 0.0), (200, 0.6)], 0.7)
    flags = ["--folder", str(tmp_path), "--methods", "sasrec", "--settings", "2", "--seeds", "2"]
    found = run_benchmark("sequence_quality", "--data", str(data), *flags)["sasrec"]
    assert found["setting"] == " ".join(METHODS["sasrec"].settings[1])
    assert found["valid_mrr@10"] == pytest.approx(0.5)
    assert found["best_at_samples"] == 150
    assert found["filtered/recall@10"] == pytest.approx(0.6)
    assert found["unfiltered/ndcg@20_std"] == pytest.approx(0.1 * 2**0.5, abs=1e-5)


def test_settings_are_compared_after_the_trial_alone(run_benchmark, tmp_path, data) -> None:
    # The second setting is ahead after two epochs; the first one, which went on for another reason, passes it later.
    save(tmp_path / "sasrec-0-0", [(100, 0.1), (150, 0.1), (200, 0.2), (300, 0.9)], 0.9)
    save(tmp_path / "sasrec-1-0", [(100, 0.1), (150, 0.2), (200, 0.3), (300, 0.4)], 0.5)
    flags = ["--folder", str(tmp_path), "--methods", "sasrec", "--settings", "2", "--seeds", "1", "--trial-epochs", "2"]
    found = run_benchmark("sequence_quality", "--data", str(data), *flags)["sasrec"]
    assert found["setting"] == " ".join(METHODS["sasrec"].settings[1])
    assert found["valid_mrr@10"] == 0.4


def test_the_best_of_the_trials_is_trained_to_the_end(run_benchmark, tmp_path, data) -> None:
    flags = ["--folder", str(tmp_path), "--methods", "sasrec", "--settings", "2", "--seeds", "1", "--epochs", "3"]
    few_users = ["--flags", "--guards.chance-evaluations", "0"]
    found = run_benchmark("sequence_quality", "--data", str(data), *flags, "--trial-epochs", "1", *few_users)
    lengths = []
    for number, setting in enumerate(METHODS["sasrec"].settings[:2]):
        lines = (tmp_path / f"sasrec-{number}-0" / "metrics.jsonl").read_text().splitlines()
        lengths.append(sum(json.loads(line)["kind"] == "valid" for line in lines))
        if found["sasrec"]["setting"] == " ".join(setting):
            assert lengths[-1] == 3
    assert sorted(lengths) == [1, 3]


def test_quality_is_drawn_over_batch_sizes(run_benchmark, tmp_path, data) -> None:
    for name, (place, size) in itertools.product(("mclrec", "sasrec"), enumerate((32, 64))):
        save(tmp_path / f"{name}-{size}-0", [(100, 0.2)], 0.1 + 0.1 * place, epochs=8)
    page = tmp_path / "figure.html"
    flags = ["--folder", str(tmp_path), "--methods", "mclrec", "sasrec", "--batches", "32", "64", "--figure", str(page)]
    figures = run_benchmark("sequence_batches", "--data", str(data), *flags)
    assert [figures["mclrec"][size]["filtered/ndcg@20"] for size in ("32", "64")] == [0.1, 0.2]
    assert "samples in a batch" in page.read_text(encoding="utf-8")


def test_what_another_command_has_trained_is_not_taken(tmp_path, data) -> None:
    save(tmp_path / "run", [(100, 0.2)], 0.9)
    runs = SequenceRuns(tmp_path, data)
    for _ in range(2):
        assert runs.all([Run("run", "sasrec", ("--seed", "1"), epochs=16)])[0].ranked["filtered/recall@10"] == 0.9
    with pytest.raises(ValueError, match=r"run\.command: expected `train sasrec .*choose another --folder"):
        runs.all([Run("run", "sasrec", ("--seed", "2"), epochs=16)])


@pytest.mark.parametrize("name", METHODS)
def test_flags_are_those_of_the_command_line(name) -> None:
    method = METHODS[name]
    config = SEQUENCES_RUNS.find(method.recipe).config
    flags = [*method.flags, *itertools.chain(*method.settings), *schedule(1000, end=0.1)]
    parsed = parse(SEQUENCES_RUNS.config, flags, program="recforge", default=config)
    assert parsed.dense_schedule.shape == "cosine(200, start=800, end=0.1)"
    assert (parsed.mclrec.contrast == "augmenters") == name.startswith("mclrec")
    assert (parsed.encoder.kind == "bsarec") == name.endswith("bsarec")
