"""`recforge plan` as a user meets it: what it prints, which flags it takes, and one line for whatever is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dlrm.cli import LOST, main
from dlrm.config import ParallelConfig
from dlrm.data.dataset import Dataset
from dlrm.planning.plan_run import limit_memory, plan_run
from embeddings import TableConfig
from embeddings.planning.machine import MACHINES, Machine
from embeddings.planning.table_cost import Setting
from embeddings.usage import Usage

RunPlan = Callable[..., tuple[int, str, str]]


def read_table(text: str, heading: str) -> dict[str, list[str]]:
    """Return the rows under a heading by their first cell; cells are two spaces apart."""
    lines = text.split("\n\n")[next(i for i, part in enumerate(text.split("\n\n")) if part.startswith(heading))]
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines.splitlines()]
    return {cells[0]: cells[1:] for cells in rows}


def test_tables_ranks_and_stages_are_printed(run_plan: RunPlan, click_log: Dataset) -> None:
    status, text, notes = run_plan("--ranks", "4", "--memory", "80GB")
    assert status == 0
    tables = read_table(text, "table ")
    assert list(tables)[1:] == [feature.name for feature in click_log.info.features]
    for feature in click_log.info.features:
        rows, dim, size, sharding, ranks, *why = tables[feature.name]
        assert (rows, dim) == (f"{feature.num_rows:,}", "16")
        assert size.split()[1] in ("bytes", "kB", "MB")
        assert (sharding == "replicated") == (feature.num_rows < 100)
        assert (ranks == "all 4") == (len(why) > 0 and sharding in ("replicated", "row_wise"))
    assert re.search(r"bytes per rank: .* on average, .* on rank \d, .* on rank \d; there are 80 GB", text)
    stages = read_table(text, "stage ")
    times = {name: cells[0] for name, cells in stages.items() if len(cells) == 3 and cells[0].endswith(" ms")}
    parts = [float(time.split()[0]) for name, time in times.items() if name != "step"]
    assert len(parts) == 10
    assert float(stages["step"][0].split()[0]) == pytest.approx(sum(parts), rel=0.01)
    assert "samples/s at 2,048 per step, as foreseen for machine 'cpu'" in text
    assert notes.startswith("recforge: machine 'cpu' by typical figures; --calibrate measures this one")


def test_the_same_again_says_the_same(run_plan: RunPlan) -> None:
    flags = ("--ranks", "16", "--ranks-per-node", "4", "--memory", "1MB", "--simulate", "8,64")
    assert run_plan(*flags) == run_plan(*flags)


def test_kinds_are_those_that_were_asked_for(run_plan: RunPlan) -> None:
    fixed = {
        "user": "row_wise",
        "item": "column_wise",
        "city": "table_row_wise",
        "creative": "grid",
        "hour": "replicated",
    }
    entries = [f"{name}={kind}" for name, kind in fixed.items()]
    flags = (
        "--ranks",
        "8",
        "--ranks-per-node",
        "2",
        "--parallel.sharding",
        "table_wise",
        "--parallel.tables",
        *entries,
    )
    status, text, _ = run_plan(*flags)
    tables = read_table(text, "table ")
    assert status == 0
    assert {name: cells[3] for name, cells in tables.items() if name not in ("table",)} == {
        name: fixed.get(name, "table_wise") for name in tables if name != "table"
    }
    assert "row_wise was asked for: rows cut over 8 ranks" in text
    assert "table_row_wise was asked for: rows cut over the 2 ranks of node" in text
    assert re.search(r"grid was asked for: columns cut over \d nodes, rows over the 2 ranks of each", text)


def test_scaling_is_foreseen_for_each_number_of_ranks(run_plan: RunPlan) -> None:
    status, text, _ = run_plan("--simulate", "8,64,512,1024", "--ranks", "8", "--memory", "80GB", "--machine", "h100")
    rows = read_table(text, "ranks ")
    assert status == 0
    assert [name for name in rows if name.replace(",", "").isdigit()] == ["8", "64", "512", "1,024"]
    weak = [float(rows[name][2].rstrip("%")) for name in ("8", "64", "512", "1,024")]
    assert weak == sorted(weak, reverse=True)
    assert all(0 < share <= 100 for share in weak)


def test_ranks_that_have_no_plan_are_noted(run_plan: RunPlan) -> None:
    status, text, _ = run_plan("--ranks", "8", "--ranks-per-node", "1", "--memory", "100kB", "--simulate", "2,8")
    assert status == 0
    assert re.search(r"\n +2 +- +- +- +- +- +-\n", text)
    assert "\n2 ranks: tables do not fit: expected at most 100 kB on each rank, got" in text


def test_ranks_that_share_cores_are_said_to(run_plan: RunPlan) -> None:
    _, text, _ = run_plan("--ranks", "256", "--ranks-per-node", "256", "--memory", "80GB")
    assert re.search(
        r"where 256 ranks per machine share \d+ cores?: each computes \S+ times as long as one alone", text
    )
    assert "share" not in run_plan("--ranks", "1")[1].splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ranks", "0"], "--ranks: expected at least 1, got 0"),
        (["--ranks", "12"], "--ranks-per-node: expected a divisor of --ranks 12, got 8 (the default)"),
        (["--ranks", "8", "--ranks-per-node", "3"], "--ranks-per-node: expected a divisor of --ranks 8, got 3"),
        (["--global-batch-size", "0"], "--global-batch-size: expected at least 1, got 0"),
        *(
            (["--memory", text], f"--memory: expected a size with its unit, such as 80GB or 80GiB, got '{text}'")
            for text in ("80", "80XB", "-3GB", "0.5B", "nan", "inf GB", "", "1e9B", "80 G B", "99999999999TB", "0GB")
        ),
        (["--parallel.memory", "eighty"], "--parallel.memory: expected a size with its unit"),
        (["--simulate", "8,x"], "--simulate: expected numbers of ranks such as 8,64,512, got '8,x'"),
        (["--simulate", ""], "--simulate: expected numbers of ranks"),
        (["--simulate", "0,8"], "--simulate: expected numbers of ranks"),
        (["--simulate", "12"], "--simulate: expected multiples of --ranks-per-node 8 beyond one node, got 12"),
        (["--parallel.tables", "user"], "--parallel.tables: expected NAME=KIND with one of table_wise, column_wise"),
        (["--parallel.tables", "user=rowise"], "got 'user=rowise'"),
        (["--parallel.tables", "=row_wise"], "got '=row_wise'"),
        (["--parallel.tables", "itm=grid"], "--parallel.tables: expected one of the tables item"),
        (["--parallel.tables", "user=grid", "user=row_wise"], "expected one kind for table 'user', got grid and row"),
        (["--parallel.sharding", "rows"], "--parallel.sharding"),
        (["--output", "/nowhere/page.html"], "--output: expected a file in a folder that exists, got /nowhere/page"),
        (["--calibration", "/nowhere.json"], "--calibration: expected a measurement in /nowhere.json, found none"),
        (["--calibrate", "--machine", "h100"], "--calibrate: expected --machine cpu beside it, got h100"),
        (["--calibration", "m.json", "--machine", "a100"], "--calibration: expected --machine cpu beside it, got a100"),
        (["--frobnicate", "3"], "--frobnicate"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_names_the_flag(run_plan: RunPlan, flags: list[str], words: str) -> None:
    status, text, complaint = run_plan(*flags)
    assert status == 2
    assert text == ""
    assert words in complaint
    errors = [line for line in complaint.splitlines() if line.startswith("recforge: error: ")]
    assert len(errors) == 1
    assert complaint.rstrip().endswith(errors[0])


@pytest.mark.parametrize("name", ["no-such-recipe", "missing.toml"])
def test_a_recipe_that_does_not_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", name]) == 2
    assert f"{name}" in capsys.readouterr().err


def test_without_a_recipe_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert main(["plan", "--help"]) == 0
    assert capsys.readouterr().out.count("criteo-terabyte") == 2


def test_what_does_not_fit_is_cured_by_the_flags_that_are_named(run_plan: RunPlan) -> None:
    status, text, complaint = run_plan("--ranks", "2", "--memory", "150kB")
    assert status == 2
    assert text == ""
    found = re.search(r"tables do not fit: expected at most 150 kB on each rank, .*; would fit with (.*)", complaint)
    assert found is not None
    cures = found[1].split("; or ")
    assert [cure.split()[0] for cure in cures][:2] == ["--ranks", "--memory"]
    for cure in cures:
        flags = {"--ranks": "2", "--memory": "150kB"}
        name, value, *_ = cure.split()
        flags[name] = value
        if name == "--ranks":
            flags["--ranks-per-node"] = "2"
        assert run_plan(*(word for pair in flags.items() for word in pair))[0] == 0, cure


@pytest.mark.parametrize("flags", [["--help"], ["--ranks", "8", "--output", "PAGE"]], ids=["help", "plan"])
def test_a_reader_who_leaves_early_is_no_error(click_log: Dataset, tmp_path: Path, flags: list[str]) -> None:
    page = tmp_path / "page.html"
    flags = [str(page) if flag == "PAGE" else flag for flag in flags]
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "dlrm", "plan", "synthetic", "--data", str(click_log.folder), *flags]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert ended.returncode == 0
    assert "error" not in ended.stderr.lower()
    assert page.exists() == ("--output" in flags)


def test_a_broken_pipe_to_something_else_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def lose(argv: list[str]) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("dlrm.planning.command.run_plan", lose)
    assert main(["plan"]) == LOST
    assert capfd.readouterr().err == "recforge: error: [Errno 32] Broken pipe\n"


def test_a_gpus_plan_has_no_copies_and_may_use_the_hosts_memory(run_plan: RunPlan) -> None:
    status, text, _ = run_plan("--ranks", "4", "--machine", "h100")
    kinds = [cells[3] for name, cells in read_table(text, "table ").items() if name != "table"]
    assert status == 0
    assert "replicated" not in kinds
    assert "there are 64 GB" in text
    assert "there are 125 GB" in run_plan("--ranks", "4", "--machine", "h100", "--tables.memory", "uvm")[1]
    status, _, complaint = run_plan("--ranks", "4", "--tables.memory", "uvm")
    assert status == 2
    assert "--tables.memory: expected device on --machine cpu, got uvm; plan for --machine" in complaint


def test_what_does_not_fit_into_a_gpu_may_fit_into_its_host() -> None:
    tables = [TableConfig(name="t", num_rows=20_000_000, dim=16)]  # 1.36 GB
    gpu = limit_memory(MACHINES["h100"], ParallelConfig(), 5 * 10**8, 10**9)
    cures = cures_of(tables, ParallelConfig(), gpu)
    assert "--tables.memory uvm" in cures
    hosted = [replace(table, memory="uvm") for table in tables]
    plan_run(hosted, ParallelConfig(), Setting(machine=gpu, usage=Usage(), ranks=2, ranks_per_node=2))
    # A limit that is given holds wherever tables lie.
    given = ParallelConfig(memory="0.5GB")
    assert "--tables.memory uvm" not in cures_of(tables, given, limit_memory(gpu, given, 5 * 10**8, 10**9))


def cures_of(tables: list[TableConfig], parallel: ParallelConfig, machine: Machine) -> list[str]:
    """Return the flags that an error names."""
    with pytest.raises(ValueError, match="tables do not fit") as caught:
        plan_run(tables, parallel, Setting(machine=machine, usage=Usage(), ranks=2, ranks_per_node=2))
    return str(caught.value).split("would fit with ")[1].split("; or ")


def test_flags_without_a_say_are_said_to_have_none(run_plan: RunPlan, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_plan("--help")
    assert "what has no say in a plan, as --parallel.hang-timeout-seconds," in " ".join(capsys.readouterr().out.split())
    plain = run_plan("--ranks", "4")
    assert run_plan("--ranks", "4", "--parallel.hang-timeout-seconds", "5") == plain


def test_no_torch_is_imported_and_it_is_fast(click_log: Dataset, tmp_path: Path) -> None:
    program = """
import sys, time
from dlrm.cli import main
main(sys.argv[1:])
print(sorted({"torch", "torchrec", "numba", "fbgemm_gpu"} & set(sys.modules)), time.process_time())
"""
    page = tmp_path / "page.html"
    flags = ["--ranks", "64", "--memory", "80GB", "--output", str(page)]
    command = [sys.executable, "-c", program, "plan", "synthetic", "--data", str(click_log.folder), *flags]
    last = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert last.startswith("[] ")
    assert float(last[3:]) < 15  # of one core; about 2 on a quiet machine
    assert page.stat().st_size > 1_000_000
