"""Measures the machine at hand with 1, 2 and 4 ranks, and fits the numbers that foresight works with to it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dlrm.planning.findings import (
    BAGS,
    COPY_NUMBERS,
    DIMS,
    ROWS,
    SAMPLES,
    TABLES,
    WIDTH,
    Findings,
    ProbeTask,
    Rates,
)
from dlrm.this_machine import count_cores
from embeddings.planning.machine import CPU, Link, Machine, RowRate

COUNTS = (1, 2, 4)
SECONDS = 300.0
LEAST_LATENCY = 1e-6


def run_probe(task: ProbeTask) -> Findings:
    """Start the ranks of a measurement and return what they found.

    Raises:
        ValueError: a rank failed.
    """
    file = task.folder / "task.pickle"
    file.write_bytes(pickle.dumps(task))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "KINETO_LOG_LEVEL": "99"}
    command = [sys.executable, "-m", "dlrm.planning.probe", str(file)]
    with tempfile.TemporaryFile() as complaints:
        ranks = [
            subprocess.Popen([*command, str(rank)], env=environment, stderr=complaints) for rank in range(task.ranks)
        ]
        try:
            codes = [rank.wait(SECONDS) for rank in ranks]
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"--calibrate: expected {task.ranks} ranks to end within {SECONDS:.0f} s; measure again when this "
                "machine is idle"
            ) from error
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if any(codes):
            complaints.seek(0)
            last = complaints.read().decode(errors="replace").strip().splitlines()[-1:]
            raise ValueError(f"--calibrate: {task.ranks} ranks failed: {' '.join(last) or codes}")
    found: Findings = pickle.loads((task.folder / "findings.pickle").read_bytes())
    return found


def fit_machine(found: dict[int, Findings]) -> Machine:
    """Fit a machine to what 1 rank and more have measured; where rates were left out, nothing is."""
    cores = count_cores()
    rates = {ranks: findings.rates for ranks, findings in sorted(found.items()) if findings.rates is not None}
    alone = rates[1]
    # Ranks that share cores wait for one another: what they find says less than that they share.
    slowdowns = [(ranks, _slowdown(alone, its)) for ranks, its in rates.items() if ranks <= cores]
    machine = replace(
        fit_rates(alone),
        slowdowns=tuple((ranks, max(1.0, factor)) for ranks, factor in slowdowns),
        cores_per_node=cores,
    )
    several = {ranks: findings for ranks, findings in found.items() if findings.all_to_all}
    factors = {ranks: machine.link_slowdown(ranks) for ranks in several}
    exchanges = [(n, size, t / factors[n]) for n, f in several.items() for size, t in f.all_to_all]
    sums = [(n, size, t / factors[n]) for n, f in several.items() for size, t in f.all_reduce]
    # An all-to-all sends ranks - 1 messages of a rank's bytes / ranks; a ring sends twice as many for an all-reduce.
    near = fit_link([(n - 1, size / n, t) for n, size, t in exchanges])
    return replace(machine, near=near, near_sums=fit_link([(2 * (n - 1), size / n, t) for n, size, t in sums]))


def fit_link(measured: Sequence[tuple[float, float, float]]) -> Link:
    """Fit latency and bandwidth to (messages in a row, bytes of each, seconds), by least relative squares."""
    messages, sizes, seconds = np.array(measured, dtype=np.float64).T
    system = np.stack([messages, messages * sizes], axis=1) / seconds[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(system, np.ones(len(seconds)), rcond=None)
    if per_byte <= 0:
        raise ValueError("--calibrate: expected larger messages to take longer, got the opposite; measure again")
    return Link(latency_seconds=max(float(latency), LEAST_LATENCY), bytes_per_second=1 / float(per_byte))


def fit_rates(rates: Rates) -> Machine:
    """Return what one rank alone does."""
    ids = TABLES * BAGS
    distinct = -ROWS * np.expm1(BAGS * np.log1p(-1 / ROWS)) / BAGS
    looked_up = [4.0 * dim for dim in DIMS]
    updated = [4.0 * dim + 2 * float(distinct) * (4 * dim + 4) for dim in DIMS]
    return replace(
        CPU,
        name="cpu, measured",
        copy_bytes_per_second=2 * 4 * COPY_NUMBERS / rates.copy,
        flops=2.0 * SAMPLES * WIDTH * WIDTH / rates.product,
        lookup=_fit_rows([seconds / ids for seconds in rates.lookups], looked_up),
        update=_fit_rows([seconds / ids for seconds in rates.updates], updated),
        seconds_per_shard=rates.shard,
    )


def _fit_rows(seconds_per_id: Sequence[float], bytes_per_id: Sequence[float]) -> RowRate:
    (low, high), (small, large) = seconds_per_id, bytes_per_id
    per_byte = max(high - low, 0.05 * high) / (large - small)
    return RowRate(seconds_per_id=max(low - small * per_byte, 0.0), bytes_per_second=1 / per_byte)


def _slowdown(alone: Rates, shared: Rates) -> float:
    def times(rates: Rates) -> list[float]:
        return [rates.copy, rates.product, *rates.lookups, *rates.updates]

    ratios = [b / a for a, b in zip(times(alone), times(shared), strict=True)]
    return float(np.exp(np.mean(np.log(ratios))))
