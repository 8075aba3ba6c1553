"""A rank that is killed, wherever: the run starts again from its last checkpoint and ends as one left alone.

"As one left alone" means by id: the steps that count have trained the same rows in the same order, none of them lost
or trained twice; and all rows of tables, their optimizer's state and the dense weights are equal.
"""

from __future__ import annotations

import os
import signal
import time
from itertools import product
from pathlib import Path

import pytest
import torch

from dlrm.checkpoints.checkpoint import CheckpointStore


def take_weights(run) -> dict[str, torch.Tensor]:
    """Return whole tables with their optimizers' state, and dense weights, of the end."""
    end = CheckpointStore(run.folder / "checkpoints").restore_latest()
    assert end.info.samples == 3_060
    tables = {name: tensor.read() for name, tensor in end.state["tables"].items()}
    return tables | {f"dense {name}": tensor for name, tensor in end.state["dense"].items()}


def assert_same_end(run, other):
    assert run.history() == other.history()
    ours, theirs = take_weights(run), take_weights(other)
    assert ours.keys() == theirs.keys()
    assert len(ours) >= 60
    for name, tensor in ours.items():
        # Other ranks sum in another order, over 32 steps.
        torch.testing.assert_close(
            tensor, theirs[name], rtol=0, atol=5e-6, msg=lambda told, name=name: f"{name}: {told}"
        )


def test_a_rank_killed_in_training_is_replaced(faulty_run, left_alone):
    run = faulty_run()
    assert run.run(ranks=2, fault="kill:1:step:14") == 0, run.errors.read_text()
    assert {record["rank"] for record in run.noted()[0]} == {0, 1}
    assert len(run.noted()) == 2
    assert [line for line in run.said() if "SIGKILL" in line] == [
        "recforge: rank 1 was killed by SIGKILL (as the system does when memory runs out); all ranks start again from "
        "the last checkpoint (restart 1 of 3)"
    ]
    assert "Traceback" not in run.errors.read_text()
    assert_same_end(run, left_alone)


FAULTS = ["save:2:0.001", "save:2:0.004", "save:4:0.01", "evaluation:1", "evaluation:1:0.02", "evaluation:2:0.01"]
ALWAYS = [(1, "save:2:0.004"), (0, "evaluation:1:0.02")]


@pytest.mark.parametrize(
    ("victim", "fault"),
    [*ALWAYS, *(pytest.param(*of, marks=pytest.mark.long) for of in product([0, 1], FAULTS) if of not in ALWAYS)],
)
def test_a_rank_killed_in_a_checkpoint_or_an_evaluation_is_replaced(victim, fault, faulty_run, left_alone):
    run = faulty_run()
    where, *when = fault.split(":")
    assert run.run(ranks=2, fault=":".join(["kill", str(victim), where, *when])) == 0, run.errors.read_text()
    assert len(run.noted()) == 2
    assert any(f"rank {victim} was killed by SIGKILL" in line for line in run.said())
    assert_same_end(run, left_alone)


@pytest.mark.long
def test_a_run_goes_on_with_fewer_ranks_and_with_more(faulty_run, left_alone):
    run = faulty_run()
    assert run.run(ranks=3, fault="kill:2:step:8", max_restarts=0) == 1
    assert run.said()[-1].startswith("recforge: error: rank 2 was killed by SIGKILL")
    assert run.run(ranks=2, fault="kill:0:step:9", max_restarts=0) == 1
    assert run.run(ranks=1, fault="kill:0:step:7") == -9
    assert run.run(ranks=2) == 0, run.errors.read_text()
    assert len(run.noted()) == 4
    assert_same_end(run, left_alone)


@pytest.mark.long
def test_ranks_are_lost_again_and_again(faulty_run, left_alone):
    run = faulty_run()
    for launch, step in enumerate((6, 9, 5)):
        assert run.run(ranks=2, fault=f"kill:{launch % 2}:step:{step}:0.003", max_restarts=0) == 1
    assert run.run(ranks=2) == 0, run.errors.read_text()
    assert_same_end(run, left_alone)


@pytest.mark.long
def test_a_machine_is_lost_and_torchrun_goes_on_with_the_one_that_is_left(faulty_run, left_alone):
    run = faulty_run()
    run.start_on_two_machines()
    end = time.monotonic() + 200
    while not (lost := find_rank_of(run, run.process, steps=12)):
        assert run.process.poll() is None, run.errors.read_text()
        assert time.monotonic() < end, run.errors.read_text()
        time.sleep(0.01)
    for process in (lost, run.other.pid):
        os.kill(process, signal.SIGKILL)
    assert run.wait() == 0, run.errors.read_text()
    first, *_, last = run.noted()
    assert {record["rank"] for record in first} == {0, 1}
    assert {record["rank"] for record in last} == {0}
    assert any("rows" in record for record in last)
    assert_same_end(run, left_alone)


def find_rank_of(run, keeper, *, steps):
    """Return the process of a rank that another torchrun than `keeper` has started, once each of two has trained."""
    records = [record for records in run.noted() for record in records]
    trained = [sum(record["rank"] == rank and "rows" in record for record in records) for rank in range(2)]
    processes = [record["process"] for record in records if "process" in record]
    others = [process for process in processes if parent_of(process) not in (keeper.pid, None)]
    return others[0] if min(trained) >= steps and others else None


def parent_of(process):
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
