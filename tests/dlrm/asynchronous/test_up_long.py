"""A whole run with real members: killed ones cost time and nothing else, and no process stays."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, generate_sequences
from dlrm.data.synthetic import SyntheticConfig, generate
from parameter_server.coordinator.coordinator import Coordinator

pytestmark = pytest.mark.long
ROWS = 60_000


def until(is_so: Callable[[], bool], seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.1)


def children_of(launcher: int) -> dict[str, int]:
    """Gives the members of a crew by name: processes that name their launcher as parent."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            words = (entry / "cmdline").read_text().split("\0")
        except (OSError, ValueError):
            continue
        if parent == launcher and "ps" in words:
            part = words[words.index("ps") + 1]
            name = next((after for flag, after in pairwise(words) if flag.endswith("name")), part)
            found[name] = int(entry.name)
    return found


def generate_clicks(data: Path) -> int:
    generate(SyntheticConfig(num_train=ROWS, num_valid=1_000, num_test=1_000), data, threads=1)
    return ROWS


def generate_histories(data: Path) -> int:
    return generate_sequences(SyntheticSequencesConfig(num_users=1_000, num_items=300), data).rows("train")


@pytest.mark.parametrize(
    ("module", "recipe", "generate"),
    [("dlrm", "synthetic", generate_clicks), ("contrastive", "mclrec-synthetic", generate_histories)],
)
def test_killed_members_are_replaced_and_nothing_is_lost(
    tmp_path: Path, module: str, recipe: str, generate: Callable[[Path], int]
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    rows = generate(data)
    flags = ["--data", str(data), "--output", str(run), "--epochs", "2", "--step.global-batch-size", "64"]
    flags += ["--servers.durability", "journal", "--servers.chunk-batches", "8", "--step.threads", "1"]
    program = [sys.executable, "-m", module, "ps", "up", recipe, "--shards", "2", "--trainers", "2", *flags]
    errors = tmp_path / "errors"
    with errors.open("wb") as file, subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=file) as process:
        members: dict[str, int] = {}

        def is_training() -> bool:
            assert process.poll() is None, errors.read_text()
            return re.search(r"training: +[1-9]\d*%", errors.read_text()) is not None

        until(is_training)
        members = children_of(process.pid)
        assert members.keys() == {"coordinator", "shard-0", "shard-1", "trainer-0", "trainer-1"}
        for name in ("shard-1", "trainer-0"):
            os.kill(members[name], signal.SIGKILL)
        until(lambda: children_of(process.pid).get("trainer-0", members["trainer-0"]) != members["trainer-0"])
        members |= children_of(process.pid)
        assert process.wait(240) == 0, errors.read_text()
    told = errors.read_text()
    assert "shard-1 was killed by SIGKILL" in told
    assert "trainer-0 was killed by SIGKILL" in told
    assert "pushes lost" not in told
    assert json.loads((run / "summary.json").read_text())["samples"] == 2 * rows
    assert not any(Path(f"/proc/{number}").exists() for number in members.values())


def count_samples(run: Path) -> int:
    """Says how much of the data a run that has ended had done."""
    with closing(Coordinator(path=run / "coordinator" / "coordinator.sqlite")) as coordinator:
        return coordinator.status().samples_completed


@pytest.mark.timeout(900)
@pytest.mark.parametrize("durability", ["journal", "snapshot"])
def test_an_interrupted_run_goes_on_with_other_shards(tmp_path: Path, durability: str) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    generate(SyntheticConfig(num_train=ROWS, num_valid=1_000, num_test=1_000), data, threads=1)
    flags = ["--data", str(data), "--output", str(run), "--epochs", "2", "--step.global-batch-size", "64"]
    flags += ["--servers.durability", durability, "--servers.chunk-batches", "8", "--step.threads", "1"]
    errors = tmp_path / "errors"

    def start(shards: int) -> subprocess.Popen[bytes]:
        program = [sys.executable, "-m", "dlrm", "ps", "up", "synthetic", "--trainers", "1", "--shards", str(shards)]
        with errors.open("wb") as file:
            return subprocess.Popen([*program, *flags], stdout=subprocess.DEVNULL, stderr=file)

    done = 0
    for shards, share in ((2, 1), (3, 12)):  # per cent
        with start(shards) as process:

            def has_come(process: subprocess.Popen[bytes] = process, share: int = share) -> bool:
                assert process.poll() is None, errors.read_text()
                shown = re.findall(r"training: +(\d+)%", errors.read_text())
                return bool(shown) and int(shown[-1]) >= share

            until(has_come)
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 130, errors.read_text()
        assert "continues" in errors.read_text()
        assert done < count_samples(run) < 2 * ROWS
        done = count_samples(run)
    with start(1) as process:
        assert process.wait(500) == 0, errors.read_text()
    told = errors.read_text()
    assert "the rows of shard-2 move to the other shards" in told
    assert "goes on from snapshot" not in told  # all was in order
    assert "pushes lost" not in told
    assert count_samples(run) == 2 * ROWS
    assert json.loads((run / "summary.json").read_text())["samples"] == 2 * ROWS
