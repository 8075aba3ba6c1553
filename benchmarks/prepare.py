"""How many rows per second does `prepare` turn into a dataset, and does its memory stay the same for longer files?

Memory is what all processes of a preparation hold at one moment: the sum of their resident set sizes (which counts
shared pages once per process), sampled every 20 ms, and beside it of their proportional set sizes, every half second.
`rows_per_cpu_second` is what one core does: on a machine with other work, it says more than the rows per second.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.criteo_rows import write_rows

SAMPLE_SECONDS = 0.02
PSS_EVERY = 25  # samples: the kernel goes through all pages for it, which takes the time of those who work


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 5_000_000])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for the files (6 GB); a temporary folder by default")
    parser.add_argument("--child", type=Path, nargs=2, metavar=("SOURCE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        source, out = arguments.child
        print(json.dumps(_prepare(source, out, arguments.processes)))
        return
    result: dict[str, Any] = {"processes": arguments.processes, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for rows in arguments.rows:
            source = Path(folder) / f"train_{rows}.txt"
            write_rows(source, rows)
            measured = _measure(source, Path(folder) / f"out_{rows}", arguments.processes)
            name = f"{rows // 1_000_000}m"
            print(f"{rows:,} rows: {measured}", file=sys.stderr)
            result |= {f"peak_rss_bytes_{name}": measured["rss"], f"peak_pss_bytes_{name}": measured["pss"]}
            result |= {"rows_per_second": round(rows / measured["seconds"]), "seconds": measured["stages"]}
            result["rows_per_cpu_second"] = round(rows / measured["cpu_seconds"])
            source.unlink()
    first, last = (result[f"peak_rss_bytes_{rows // 1_000_000}m"] for rows in (arguments.rows[0], arguments.rows[-1]))
    result["peak_growth"] = round(last / first - 1, 4)
    print(json.dumps(result | result.pop("seconds")))


def _prepare(source: Path, out: Path, processes: int) -> dict[str, Any]:
    from dlrm.data.known import known_schema
    from dlrm.data.prepare import prepare

    begun: dict[str, float] = {}

    def note(stage: str, share: float, rows: int) -> None:
        begun.setdefault(stage, time.perf_counter())

    start = time.perf_counter()
    prepare(known_schema("criteo-kaggle"), [source], out, processes=processes, progress=note)
    end = time.perf_counter()
    ends = [*list(begun.values())[1:], end]
    stages = {f"{stage}_seconds": round(stop - begun[stage], 2) for stage, stop in zip(begun, ends, strict=True)}
    return {"seconds": end - start, "stages": stages}


def _measure(source: Path, out: Path, processes: int) -> dict[str, Any]:
    """Prepare in a fresh process, and watch its memory and its children's."""
    command = [sys.executable, "-m", "benchmarks.prepare", "--processes", str(processes)]
    child = subprocess.Popen([*command, "--child", str(source), str(out)], stdout=subprocess.PIPE, text=True)
    watched = psutil.Process(child.pid)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    peaks, sample = {"rss": 0, "pss": 0}, 0
    while child.poll() is None:
        peaks["rss"] = max(peaks["rss"], _sum_memory(watched, "rss"))
        if not sample % PSS_EVERY:
            peaks["pss"] = max(peaks["pss"], _sum_memory(watched, "pss"))
        sample += 1
        time.sleep(SAMPLE_SECONDS)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert child.stdout is not None
    if child.returncode:
        raise SystemExit(f"prepare failed with status {child.returncode}")
    measured: dict[str, Any] = json.loads(child.stdout.read().splitlines()[-1])
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return measured | peaks | {"cpu_seconds": round(cpu_seconds, 1)}


def _sum_memory(process: psutil.Process, kind: str) -> int:
    try:
        family = [process, *process.children(recursive=True)]
        return sum(one.memory_info().rss if kind == "rss" else one.memory_full_info().pss for one in family)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0  # a process ended while it was looked at: the next sample sees the others


if __name__ == "__main__":
    main()
