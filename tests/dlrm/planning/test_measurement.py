"""Measurements: what is fitted is what was put in, and a kept file is used where it holds, and else named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dlrm.planning import comparison
from dlrm.planning.calibration import COUNTS, fit_link, fit_machine, fit_rates
from dlrm.planning.comparison import Comparison, describe_comparisons
from dlrm.planning.findings import BAGS, COPY_NUMBERS, DIMS, TABLES, Findings, ProbeTask, Rates, quiet_seconds
from dlrm.planning.measurement import default_path, load_measurement, measured_now, save_measurement, this_place
from embeddings.planning.machine import CPU
from embeddings.planning.table_cost import Setting

RunPlan = Callable[..., tuple[int, str, str]]
RATES = Rates(copy=0.01, product=0.02, lookups=(0.002, 0.004), updates=(0.003, 0.009), shard=1e-5)


def findings(ranks: int, *, slower: float = 1.0, latency: float = 1e-4, bandwidth: float = 1e9) -> Findings:
    """What ranks would find on a machine that is exactly as the model has it."""
    rates = Rates(
        copy=RATES.copy * slower,
        product=RATES.product * slower,
        lookups=tuple(seconds * slower for seconds in RATES.lookups),
        updates=tuple(seconds * slower for seconds in RATES.updates),
        shard=RATES.shard,
    )
    sizes = (1 << 12, 1 << 16, 1 << 20)
    exchange = [(n, slower * (ranks - 1) * (latency + n / ranks / bandwidth)) for n in sizes]
    reduce = [(n, slower * 2 * (ranks - 1) * (latency + n / ranks / bandwidth)) for n in sizes]
    return Findings(
        rates=rates,
        all_to_all=tuple(exchange) if ranks > 1 else (),
        all_reduce=tuple(reduce) if ranks > 1 else (),
        step=0.03 / ranks,
        median_step=0.031 / ranks,
        tiny_step=0.002 if ranks == 1 else 0.0,
    )


def test_a_link_is_fitted_exactly() -> None:
    link = fit_link([(m, size, m * (2e-4 + size / 3e8)) for m in (1, 3) for size in (100, 10_000, 10**6)])
    assert link.latency_seconds == pytest.approx(2e-4)
    assert link.bytes_per_second == pytest.approx(3e8)
    with pytest.raises(ValueError, match="--calibrate: expected larger messages to take longer"):
        fit_link([(1, 10, 2.0), (1, 1000, 1.0)])


def test_rates_are_bytes_and_numbers_over_seconds() -> None:
    machine = fit_rates(RATES)
    assert machine.copy_bytes_per_second == pytest.approx(8 * COPY_NUMBERS / 0.01)
    assert machine.seconds_per_shard == 1e-5
    for dim, seconds in zip(DIMS, RATES.lookups, strict=True):
        ids = TABLES * BAGS
        found = ids * (machine.lookup.seconds_per_id + 4 * dim / machine.lookup.bytes_per_second)
        assert found == pytest.approx(seconds)


def test_a_machine_is_found_from_ranks_with_cores_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlrm.planning.calibration.count_cores", lambda: 2)
    sharing = replace(findings(4), rates=None, all_to_all=(), all_reduce=())
    machine = fit_machine({1: findings(1), 2: findings(2, slower=1.25), 4: sharing})
    assert machine.slowdowns == ((1, 1.0), (2, pytest.approx(1.25)))
    assert machine.slowdown(4) == pytest.approx(2.5)
    assert machine.near.latency_seconds == pytest.approx(1e-4)
    assert machine.near.bytes_per_second == pytest.approx(1e9)
    assert machine.near_sums is not None
    assert machine.near_sums.bytes_per_second == pytest.approx(1e9)
    assert fit_machine({1: findings(1), 2: findings(2, slower=0.8)}).slowdown(2) == 1.0


def test_the_fastest_quarter_leaves_out_what_others_took() -> None:
    assert quiet_seconds([1.0, 3.0, 50.0, 1.5, 2.0, 9.0, 9.0, 9.0]) == 1.25
    assert quiet_seconds([7.0]) == 7.0


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    kept = measured_now(replace(CPU, slowdowns=((1, 1.0), (2, 1.3)), near_sums=CPU.near))
    save_measurement(kept, tmp_path / "new" / "m.json")
    assert load_measurement(tmp_path / "new" / "m.json") == kept
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["m.json"]
    assert kept.place == this_place()
    assert load_measurement(tmp_path / "none.json") is None
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--calibration: expected a file that can be written, got"):
        save_measurement(kept, tmp_path / "file" / "m.json")


def change(content: dict[str, Any], where: str, value: Any) -> None:
    *path, last = where.split(".")
    for key in path:
        content = content[key]
    content[last] = value


@pytest.mark.parametrize(
    ("where", "value", "why"),
    [
        ("format", 2, "another format"),
        ("machine.flops", float("nan"), "flops nan"),
        ("machine.flops", 0, "flops 0.0"),
        ("machine.near.bytes_per_second", -1.0, "bytes_per_second -1.0"),
        ("machine.near.bytes_per_second", "fast", "other fields"),
        ("machine.near", None, "other fields"),
        ("place", {}, "other fields"),
        ("machine", {}, "other fields"),
    ],
)
def test_damage_is_named(tmp_path: Path, run_plan: RunPlan, where: str, value: Any, why: str) -> None:
    path = tmp_path / "m.json"
    save_measurement(measured_now(CPU), path)
    content = json.loads(path.read_text())
    change(content, where, value)
    path.write_text(json.dumps(content))
    status, text, complaint = run_plan("--calibration", str(path))
    assert (status, text) == (2, "")
    assert f"--calibration: expected a measurement in {path}, got something else ({why})" in complaint
    assert "--calibrate writes it anew" in complaint


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'"text"'])
def test_other_files_are_named(tmp_path: Path, run_plan: RunPlan, content: bytes) -> None:
    path = default_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    status, _, complaint = run_plan()
    assert status == 2
    assert f"expected a measurement in {path}, got something else" in complaint


def test_a_measurement_of_this_machine_is_used(run_plan: RunPlan) -> None:
    save_measurement(measured_now(replace(CPU, name="cpu, measured")), default_path())
    status, text, notes = run_plan("--ranks", "2")
    assert (status, notes) == (0, "")
    assert "as foreseen for machine 'cpu, measured'" in text


@pytest.mark.parametrize("changed", [{"cpu": "another"}, {"cores": 999}, {"recforge": "0.0.0"}])
def test_one_of_another_machine_or_version_is_not_unless_it_is_named(run_plan: RunPlan, changed: Any) -> None:
    kept = measured_now(replace(CPU, name="elsewhere"))
    save_measurement(replace(kept, place=replace(kept.place, **changed)), default_path())
    status, text, notes = run_plan("--ranks", "2")
    assert status == 0
    assert "machine 'cpu'" in text
    assert f"was measured on {replace(kept.place, **changed)}, and this is {kept.place}; --calibrate" in notes
    status, text, notes = run_plan("--ranks", "2", "--calibration", str(default_path()))
    assert (status, notes) == (0, "")
    assert "machine 'elsewhere'" in text


def test_calibrate_compares_and_keeps(run_plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ProbeTask] = []

    def probe(task: ProbeTask) -> Findings:
        asked.append(task)
        return findings(task.ranks)

    monkeypatch.setattr(comparison, "run_probe", probe)
    monkeypatch.setattr(comparison, "count_cores", lambda: 2)
    status, text, notes = run_plan("--ranks", "2", "--calibrate")
    assert status == 0
    assert [task.ranks for task in asked] == list(COUNTS)
    assert [task.steps_only for task in asked] == [False, False, True]
    assert [task.plan is None for task in asked] == [True, False, False]
    assert {task.run.step.global_batch_size for task in asked} == {2048}
    lines = text[text.index("ranks here") :].splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "4"]
    assert [line.split()[3] for line in lines[1:4]] == ["30.00", "15.00", "7.50"]
    foreseen, measured, error = float(lines[2].split()[1]), 15.0, float(lines[2].split()[5].rstrip("%"))
    assert error == pytest.approx(100 * (foreseen / measured - 1), abs=0.2)
    kept = load_measurement(default_path())
    assert kept is not None
    assert kept.machine.name == "cpu, measured"
    assert f"the measurement is kept in {default_path()}" in notes


@pytest.mark.parametrize(
    ("flags", "exchange_bytes", "padded"),
    [
        ((), 4, False),
        (("--parallel.exchange", "bf16"), 2, False),
        (("--tables.kernel", "fbgemm"), 4, True),
    ],
)
def test_what_is_trained_is_what_is_foreseen(
    run_plan: RunPlan, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], exchange_bytes: int, padded: bool
) -> None:
    foreseen, plain = [], comparison.foresee

    def foresee(configs: Any, plan: Any, dense: Any, setting: Setting) -> Any:
        foreseen.append((setting.exchange_bytes, setting.machine.padded))
        return plain(configs, plan, dense, setting)

    asked: list[ProbeTask] = []
    monkeypatch.setattr(comparison, "foresee", foresee)
    monkeypatch.setattr(comparison, "run_probe", lambda task: asked.append(task) or findings(task.ranks))
    assert run_plan("--ranks", "2", "--calibrate", *flags)[0] == 0
    assert set(foreseen) == {(exchange_bytes, padded)}
    sharded = [task.plan for task in asked if task.plan is not None]
    copies = ["replicated" in {table.sharding for table in plan.tables} for plan in sharded]
    assert copies == [not padded, not padded]
    kept = load_measurement(default_path())
    assert kept is not None
    assert not kept.machine.padded


def test_a_busy_machine_is_said_to_be_one() -> None:
    quiet = Comparison(ranks=1, foreseen=0.011, measured=0.01, median=0.0105)
    assert quiet.error == pytest.approx(0.1)
    assert "others used this machine" not in describe_comparisons([quiet])
    assert "others used this machine" in describe_comparisons([quiet, replace(quiet, median=0.02)])


@pytest.mark.parametrize(("load", "warned"), [(0.1, False), (20.0, True)])
def test_others_are_noticed_before_it_begins(
    run_plan: RunPlan, monkeypatch: pytest.MonkeyPatch, load: float, warned: bool
) -> None:
    monkeypatch.setattr(comparison, "run_probe", lambda task: findings(task.ranks))
    monkeypatch.setattr(comparison, "count_cores", lambda: 2)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    notes = run_plan("--ranks", "2", "--calibrate")[2]
    assert ("warning: other programs keep this machine busy (load 20.0 on 2 cores)" in notes) == warned


@pytest.mark.long
def test_this_machine_is_measured_and_a_step_of_one_rank_is_near_what_is_foreseen(run_plan: RunPlan) -> None:
    status, text, notes = run_plan("--ranks", "2", "--calibrate", "--global-batch-size", "2048")
    assert status == 0, notes
    lines = text[text.index("ranks here") :].splitlines()[1:4]
    errors = [float(line.split()[5].rstrip("%")) for line in lines]
    assert [line.split()[0] for line in lines] == ["1", "2", "4"]
    # On a quiet machine; of several ranks on one CPU, foresight is a lower bound.
    assert -40 < errors[0] < 40, text
    assert all(error > -100 for error in errors), text
    kept = load_measurement(default_path())
    assert kept is not None
    assert 1e8 < kept.machine.near.bytes_per_second < 1e12
    assert 1e8 < kept.machine.copy_bytes_per_second < 1e12
