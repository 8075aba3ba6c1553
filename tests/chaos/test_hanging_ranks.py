"""A rank that hangs is named in time, with the stage it hangs in, by one rank in one line; then all start again."""

from __future__ import annotations

import time

import pytest

SECONDS = 4.0


def hangs(run):
    return [line for line in run.said() if "hang" in line or "no answer" in line]


def hang(run, fault, **settings):
    """Run until the hang, with no new start; return how long its naming took at most, and what is said."""
    run.start(ranks=2, fault=fault, max_restarts=0, parallel__hang_timeout_seconds=SECONDS, **settings)
    while not (hung := [record for records in run.noted() for record in records if "fault" in record]):
        assert run.process.poll() is None, run.errors.read_text()
        time.sleep(0.05)
    start = time.monotonic()
    while not hangs(run):
        assert time.monotonic() < start + 40, run.errors.read_text()
        time.sleep(0.05)
    took = time.monotonic() - start
    assert run.wait() == 1
    assert "Traceback" not in run.errors.read_text()
    assert hung[0]["rank"] == 1
    (line,) = hangs(run)
    return took, line


def test_a_rank_that_reads_for_ever_is_named(faulty_run, left_alone):
    took, line = hang(faulty_run(), "sleep:1:read:8")
    assert line.startswith("recforge: error: rank 1 hangs in 'waiting for data' for 4 s, after ")
    assert line.endswith("(--parallel.hang-timeout-seconds 4)")
    assert "; rank 0 waiting in '" in line
    assert SECONDS - 1.5 < took < SECONDS + 6


@pytest.mark.long
def test_a_stopped_rank_is_named_and_replaced(faulty_run, left_alone):
    run = faulty_run()
    start = time.monotonic()
    assert run.run(ranks=2, fault="stop:1:step:8:0.002", parallel__hang_timeout_seconds=SECONDS) == 0
    assert time.monotonic() - start < 60
    (line,) = hangs(run)
    assert line.startswith("recforge: error: rank 1: no answer for 4 s (process ")
    assert run.history() == left_alone.history()


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "stage"), [("sleep:1:evaluation:1", "dense update"), ("sleep:1:save:2", "checkpoint")]
)
def test_a_rank_that_hangs_between_steps_is_named(fault, stage, faulty_run, left_alone):
    _, line = hang(faulty_run(), fault)
    assert "rank 1 hangs" in line


@pytest.mark.long
def test_a_launcher_that_is_killed_takes_its_ranks_along(faulty_run):
    run = faulty_run()
    run.start(ranks=2, epochs=2000)
    while len(run.noted()) == 0 or len(run.noted()[0]) < 20:
        assert run.process.poll() is None, run.errors.read_text()
        time.sleep(0.1)
    processes = [record["process"] for record in run.noted()[0] if "process" in record]
    assert len(processes) == 2
    run.process.kill()
    end = time.monotonic() + 20
    while any(is_alive(process) for process in processes):
        assert time.monotonic() < end
        time.sleep(0.1)


def is_alive(process):
    try:
        with open(f"/proc/{process}/stat") as status:
            return status.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
