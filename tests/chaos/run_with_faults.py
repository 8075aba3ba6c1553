"""`python run_with_faults.py RECORDS FAULT ARGUMENTS...`: the command line, which notes what it trains, and breaks.

RECORDS gets a JSON object per line: of every start, and of every step the rows that this rank has trained. FAULT is
`none`, or KIND:RANK:WHERE:NUMBER[:SECONDS], and befalls a rank in its first start only: KIND is kill, stop (SIGSTOP) or
sleep; WHERE is step, save, evaluation or read, and NUMBER counts these; SECONDS later it happens.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dlrm.training.clicks as clicks
from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.cli import main
from dlrm.data.reader import Reader
from dlrm.training.train_step import TrainStep

RANK = int(os.environ.get("RANK", 0))
START = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


class Faults:
    """What befalls this rank, and when."""

    def __init__(self, fault: str, note: Callable[..., None]) -> None:
        kind, rank, where, number, seconds = (
            [*fault.split(":"), "0"] if fault != "none" else ["", "-1", "", "0", "0"]
        )[:5]
        self.kind, self.where, self.number, self.seconds = kind, where, int(number), float(seconds)
        self.is_mine = START == 0 and int(rank) == RANK
        self.note, self.seen = note, 0
        self.stages: list[str] = []

    def pass_by(self, where: str) -> None:
        if not self.is_mine or where != self.where:
            return
        self.seen += 1
        if self.seen == self.number:
            threading.Timer(self.seconds, self.happen).start() if self.seconds else self.happen()

    def happen(self) -> None:
        self.note(fault=self.kind, stages=list(self.stages))
        if self.kind == "sleep":
            time.sleep(1000)
        os.kill(os.getpid(), signal.SIGKILL if self.kind == "kill" else signal.SIGSTOP)


def install(records: Path, fault: str) -> None:
    file = os.open(records, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(**what: Any) -> None:
        # A clock that all processes of a machine share.
        where = {"rank": RANK, "start": START, "at": time.monotonic()}
        os.write(file, (json.dumps({**where, **what}) + "\n").encode())

    faults = Faults(fault, note)
    step, save, evaluate, read = TrainStep.__call__, CheckpointStore.save, clicks.evaluate, Reader.batches

    def noted_step(self: TrainStep, batch: Any, samples: int, *rest: Any, **settings: Any) -> float:
        faults.stages = self.stopwatch.open
        faults.pass_by("step")
        loss = step(self, batch, samples, *rest, **settings)
        note(samples=samples, size=batch.global_size or len(batch), rows=batch.rows.tolist())
        return loss

    def noted_save(self: CheckpointStore, *arguments: Any, **settings: Any) -> None:
        faults.pass_by("save")
        save(self, *arguments, **settings)

    def noted_evaluate(*arguments: Any, **settings: Any) -> Any:
        with settings["stopwatch"].stage("evaluation"):
            faults.pass_by("evaluation")
        return evaluate(*arguments, **settings)

    def noted_read(self: Reader, *arguments: Any, **settings: Any) -> Iterator[Any]:
        for batch in read(self, *arguments, **settings):
            faults.pass_by("read")
            yield batch

    TrainStep.__call__, CheckpointStore.save = noted_step, noted_save  # type: ignore[method-assign]
    clicks.evaluate, Reader.batches = noted_evaluate, noted_read  # type: ignore[assignment, method-assign]
    note(process=os.getpid())


if __name__ == "__main__":
    install(Path(sys.argv[1]), sys.argv[2])
    sys.exit(main(sys.argv[3:]))
