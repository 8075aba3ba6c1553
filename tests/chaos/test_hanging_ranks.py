"""A rank that hangs is named in time, with the stage it hangs in, by one rank in one line; then all start again."""

from __future__ import annotations

import re
import time

import pytest

SECONDS = 5.0
# Later than that it is not the watch that tells, but a call that has waited for the others for 30 s more.
AT_LATEST = SECONDS + 20


def hangs(run):
    return [line for line in run.said() if "hang" in line or "no answer" in line]


def wait_for_hang(run):
    """Wait until a rank hangs and that is told; return the line, and how long after the last step it came."""
    end = time.monotonic() + 120
    while not (told := hangs(run)):
        assert run.process.poll() is None, run.errors.read_text()
        assert time.monotonic() < end, run.errors.read_text()
        time.sleep(0.02)
    now = time.monotonic()
    records = run.noted()[0]
    (fault,) = (record for record in records if "fault" in record)
    assert fault["rank"] == 1
    # A reader is ahead of its rank, which has a few more steps before it misses a batch.
    return told[0], now - max(record["at"] for record in records if "rows" in record or record is fault)


def hang(run, fault):
    """Run until a hang is told, with no new start; return the line, and how long after the last step it came."""
    run.start(ranks=2, fault=fault, max_restarts=0, parallel__hang_timeout_seconds=SECONDS)
    line, took = wait_for_hang(run)
    assert run.wait() == 1
    assert "Traceback" not in run.errors.read_text()
    assert hangs(run) == [line]
    return line, took


def test_a_rank_that_reads_for_ever_is_named(faulty_run):
    line, took = hang(faulty_run(), "sleep:1:read:8")
    assert re.match(r"recforge: error: rank 1 hangs in 'waiting for data' for \d+ s, after [1-9]\d* samples; ", line)
    assert line.endswith("(--parallel.hang-timeout-seconds 5)")
    assert "; rank 0 waiting in '" in line
    assert SECONDS - 1 < took < AT_LATEST


@pytest.mark.long
def test_a_stopped_rank_is_named_and_replaced(faulty_run, left_alone):
    run = faulty_run()
    run.start(ranks=2, fault="stop:1:step:8:0.002", parallel__hang_timeout_seconds=SECONDS)
    line, took = wait_for_hang(run)
    assert re.match(r"recforge: error: rank 1: no answer for \d+ s \(process \d+\), last seen ", line)
    assert SECONDS - 1 < took < AT_LATEST
    assert run.wait() == 0, run.errors.read_text()
    assert hangs(run) == [line]
    assert run.history() == left_alone.history()


@pytest.mark.long
@pytest.mark.parametrize(("fault", "stage"), [("sleep:1:evaluation:1", "evaluation"), ("sleep:1:save:2", "checkpoint")])
def test_a_rank_that_hangs_between_steps_is_named(fault, stage, faulty_run):
    line, took = hang(faulty_run(), fault)
    assert line.startswith(f"recforge: error: rank 1 hangs in '{stage}' for ")
    assert SECONDS - 1 < took < AT_LATEST


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            "pass",
            ["recforge: error: interrupted; the same command continues from the last checkpoint, if there is one"],
        ),
        # As a rank that has said so itself.
        pytest.param("signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))", [], marks=pytest.mark.long),
    ],
)
def test_a_launcher_that_is_asked_to_stop_speaks_for_ranks_that_could_not(asked, said, launch, tmp_path):
    begin = f"open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'x')"
    code = f"import os, signal, sys, time; {asked}; {begin}; time.sleep(99)"
    launcher = launch(code, ranks=2)
    end = time.monotonic() + 100
    while len(list(tmp_path.iterdir())) < 2:
        assert launcher.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    launcher.terminate()
    _, errors = launcher.communicate(timeout=100)
    assert launcher.returncode == 130
    assert [line for line in errors.splitlines() if line] == said


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
