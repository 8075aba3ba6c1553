"""The report's words and numbers, for finished, unfinished, continued and broken runs; a browser tests its looks."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dlrm import cli
from dlrm.analysis.bottleneck import describe_bottleneck, share_out_time, spread_over_ranks
from dlrm.analysis.curves import thin
from dlrm.analysis.diagrams import draw_stages, wilson_margins
from dlrm.analysis.quantities import format_bytes, format_duration, format_setting
from dlrm.analysis.report import split_at_flags, write_report
from dlrm.analysis.run_folder import read_run
from dlrm.analysis.verdict import (
    describe_course,
    describe_quality,
    list_complaints,
)

WriteRun = Callable[..., Path]


def test_command_writes_one_page_that_asks_for_nothing_else(
    write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run()
    page = folder.parent / "elsewhere.html"
    assert cli.main(["report", str(folder), "--output", str(page)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert not (folder / "report.html").exists()
    assert cli.main(["report", str(folder)]) == 0
    html = page.read_text(encoding="utf-8")
    assert (folder / "report.html").read_text(encoding="utf-8") == html
    own = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert re.findall(r'(?:src|href)="(.*?)"', own) == ["data:,"]  # no icon
    assert not re.search(r"https?:|url\(|@import|\b(?:src|href)=[^\"]", own)
    assert len(list(folder.iterdir())) == 5  # nothing but the page was added


def test_names_from_the_data_stay_text(write_run: WriteRun) -> None:
    html = write_report(write_run()).read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4  # the table twice, the segments' feature twice


def test_verdict_of_a_finished_run(write_run: WriteRun) -> None:
    run = read_run(write_run())
    assert describe_quality(run) == (
        "AUC 0.7765 on 40,000 rows of the test split. "
        "The best possible is 0.8012: the model has learned 91.8 % of what can be learned beyond chance."
    )
    assert describe_course(run) == (
        "1,000,000 training samples in 2 min 5 s, 7,974 per second, with 1.4 GB of memory at most. "
        "Why it ended: all epochs done. The best weights were those after 900,000 samples."
    )
    assert list_complaints(run) == []


def test_verdict_of_an_unfinished_run_is_about_the_last_evaluation(write_run: WriteRun) -> None:
    folder = write_run(finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "samples": 1000')  # cut short by a kill
    run = read_run(folder)
    assert describe_quality(run).startswith("AUC 0.7770 on 20,000 rows of the valid split, measured after 1,000,000")
    assert "so far" in describe_course(run)
    html = write_report(folder).read_text(encoding="utf-8")
    assert "This run is not finished" in html
    assert "Their statistics are taken when a run has finished." in html


def test_summary_of_a_run_that_went_on_does_not_count(write_run: WriteRun) -> None:
    folder = write_run()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "samples": 1_020_000, "loss": 0.4, "seconds": 127.0}) + "\n")
    run = read_run(folder)
    assert run.summary is None
    assert run.tables == []
    assert run.samples == 1_020_000


def test_a_run_that_logged_nothing_is_reported_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Nothing has been measured on held-out rows yet." in html
    assert 'class="plot"' not in html
    assert tmp_path.name in html


def test_the_measurement_at_the_end_is_no_point_of_a_curve(write_run: WriteRun) -> None:
    folder = write_run(split="train")
    summary = json.loads((folder / "summary.json").read_text())
    for kind in ("train", "valid"):
        with (folder / "metrics.jsonl").open("a") as file:
            final = {name: summary[name] for name in ("auc", "logloss", "calibration", "calibration_curve")}
            file.write(json.dumps({"kind": kind, "samples": 1_000_000, **final}) + "\n")
    run = read_run(folder)
    assert (len(run.training), len(run.validation)) == (50, 10)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"calibration": 1.3}, "too high on average: 1.30 times"),
        ({"calibration": 0.85}, "too low on average: 0.85 times"),
        ({"auc": 0.508, "bayes_auc": None}, "AUC of 0.5080 on so few rows cannot be told from chance"),
        ({"prediction_std": 0.0}, "Every prediction is the same"),
        (
            {"auc": None, "segments": [], "undefined": "all 9 labels are 0, AUC needs both"},
            "not defined: all 9 labels are 0",
        ),
    ],
)
def test_complaints(write_run: WriteRun, changes: dict[str, object], expected: str) -> None:
    folder = write_run(**changes)
    (complaint,) = list_complaints(read_run(folder))
    assert expected in complaint
    assert "Worth a look" in write_report(folder).read_text(encoding="utf-8")


def test_auc_beyond_three_standard_errors_is_not_chance(write_run: WriteRun) -> None:
    # 40,000 rows, a quarter positive: one standard error is .00333
    assert list_complaints(read_run(write_run("a", auc=0.511))) == []
    assert list_complaints(read_run(write_run("b", auc=0.509))) != []


def test_time_adds_up_and_names_the_bottleneck(write_run: WriteRun) -> None:
    run = read_run(write_run())
    stages = share_out_time(run)
    assert stages[0] == ("dense backward", 57.0)
    assert [seconds for _, seconds in stages] == sorted((seconds for _, seconds in stages), reverse=True)
    # 125.4 s of training, of which the stopwatch saw 122.2; 14.8 s of evaluation and checkpoints beside it
    assert dict(stages)["rest of the loop"] == pytest.approx(125.4 - 122.2)
    assert sum(seconds for _, seconds in stages) == pytest.approx(125.4 + 14.8)
    assert describe_bottleneck(stages).startswith("The largest part, 41 % of 2 min 20 s, went into: dense backward")


@pytest.mark.parametrize(
    ("name", "seconds", "expected"),
    [
        ("waiting for data", 10.0, "The largest part"),  # 9 % of the steps' time
        ("waiting for data", 40.0, "The loop waits 29 % of a step for data: the step is faster than the reader"),
        ("ids all-to-all", 20.0, "The ids' all-to-all takes 17 % of a step: .*--step.global-batch-size"),
        ("rows all-to-all", 20.0, "The all-to-all of looked-up rows takes 17 % of a step: --parallel.exchange bf16"),
        ("gradients all-to-all", 20.0, "The all-to-all of the rows' gradients takes 17 % of a step"),
    ],
)
def test_waiting_is_named_before_work(write_run: WriteRun, name: str, seconds: float, expected: str) -> None:
    work = {"dense forward": 60.0, "lookup": 40.0, "evaluation": 50.0}
    folder = write_run(stage_seconds=work | {name: seconds}, seconds=100.0 + seconds)
    assert re.match(expected, describe_bottleneck(share_out_time(read_run(folder))))
    page = write_report(folder).read_text(encoding="utf-8")
    assert expected.split(":")[0].replace("'", "&#39;") in page


def test_a_rank_that_holds_up_the_others_is_named(write_run: WriteRun) -> None:
    stages = {"lookup": 30.0, "rows all-to-all": 40.0, "dense forward": 30.0}
    spread = {
        "lookup": {"seconds": 30.0, "least": 10.0, "most": 70.0, "most_rank": 3},
        "rows all-to-all": {"seconds": 40.0, "least": 1.0, "most": 60.0, "most_rank": 0},
    }
    run = read_run(write_run(stage_seconds=stages, stages_of_ranks=spread, seconds=100.0))
    words = describe_bottleneck(share_out_time(run), spread_over_ranks(run))
    assert words.startswith("Rank 3 spends 70 % of a step on its lookup, the mean of all ranks is 30 %")
    spread["lookup"] |= {"most": 35.0}
    words = describe_bottleneck(share_out_time(run), spread)
    assert words.startswith("The all-to-all of looked-up rows takes 40 % of a step")
    assert words.endswith("All exchanges and waits take 40 % of a step.")
    bars = draw_stages(run).figure["data"][0]
    assert bars["error_x"]["array"] == pytest.approx([0.2, 0.4, 0.0])
    assert bars["error_x"]["arrayminus"] == pytest.approx([0.39, 0.2, 0.0])
    assert bars["error_x"]["visible"]


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda folder: folder.joinpath("x.txt").write_text(""), r"expected the folder of a run, found neither"),
        (lambda folder: folder.joinpath("summary.json").write_text("{"), r"summary\.json: expected a JSON object"),
        (lambda folder: folder.joinpath("summary.json").write_text("[]"), r"summary\.json: expected a JSON object"),
        (
            lambda folder: folder.joinpath("metrics.jsonl").write_text("{\n"),
            r"metrics\.jsonl: expected a JSON object per",
        ),
    ],
)
def test_what_is_no_run_gets_one_line(
    tmp_path: Path, prepare: Callable[[Path], object], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path)
    assert cli.main(["report", str(tmp_path)]) == cli.ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(expected, line)
    assert str(tmp_path) in line
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("flags", [[], ["--absent"], ["a", "b"]])
def test_wrong_flags_get_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", *flags]) == cli.ERROR
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_folders_that_do_not_exist_are_named(write_run: WriteRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent, which is no folder"):
        write_report(tmp_path / "absent")
    folder = write_run()
    for output in (folder, folder / "absent" / "page.html"):
        with pytest.raises(ValueError, match="--output: expected a file in a folder that exists"):
            write_report(folder, output)


def test_needs_no_torch() -> None:
    code = "import sys, dlrm.analysis.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_thinning_keeps_means_and_the_end() -> None:
    points = [(float(10 * i), float(i % 2)) for i in range(1, 2001)]
    assert thin(points, 2000) == points
    thinned = thin(points, 1000)
    assert len(thinned) == 1000
    assert thinned[0] == (20.0, 0.5)
    assert thinned[-1] == (20_000.0, 0.5)
    assert thin([], 10) == []


@pytest.mark.parametrize(("share", "count"), [(0.03, 400), (0.5, 10), (0.0, 50), (1.0, 50)])
def test_wilson_interval_ends_where_the_normal_test_just_rejects(share: float, count: int) -> None:
    below, above = wilson_margins(share, count)
    for bound in (share - below, share + above):
        if bound != pytest.approx(share, abs=1e-12):
            assert abs(bound - share) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / count))
    assert 0 <= share - below <= share + above <= 1
    assert below + above > 0


def test_quantities_are_written_for_people() -> None:
    assert [format_duration(s) for s in (0.1234, 7.5, 59.7, 3725, 200_000)] == [
        "0.12 s",
        "7.5 s",
        "1 min 0 s",
        "1 h 2 min",
        "2 d 7 h",
    ]
    assert [format_bytes(b) for b in (None, 12, 2048, 3e9)] == ["-", "12 bytes", "2.05 kB", "3 GB"]
    assert [format_setting(v) for v in (None, True, 65536, 0.05, [64, 32], [])] == [
        "none",
        "yes",
        "65536",
        "0.05",
        "64, 32",
        "none",
    ]


def test_flags_are_found_in_a_sentence() -> None:
    assert split_at_flags("a (--model.top-2), b --x.") == ["a (", "--model.top-2", "), b ", "--x", "."]
