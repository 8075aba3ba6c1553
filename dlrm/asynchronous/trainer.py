"""The training loop beside parameter servers: batches are leased, tables are elsewhere, the last to leave sums up."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from typing_extensions import override

from dlrm.asynchronous.branching import TRAINERS
from dlrm.asynchronous.leased_batches import LeasedBatches
from dlrm.asynchronous.membership import LeaseLostError, Membership
from dlrm.asynchronous.stages import Stage
from dlrm.batch import Batch
from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.config import TrainingConfig
from dlrm.training.attachments import Attachment
from dlrm.training.interrupt import only_run_in
from dlrm.training.problem import Problem, SampleReader, Values
from dlrm.training.restore import CHECKPOINTS
from dlrm.training.run_config import describe_run
from dlrm.training.run_log import METRICS, RunLog, read_records, write_json
from dlrm.training.run_parts import RunParts
from dlrm.training.summary import SUMMARY
from dlrm.training.trainer import Trainer
from parameter_server.errors import LaneLostError

LOOK_SECONDS = 0.2  # between looks at who lives


class Servers(Protocol):
    """What is done with all shards at once."""

    def save(self) -> None:
        """Have all shards save what they hold, in the background."""

    def wait(self) -> None:
        """Wait until all pushes are acknowledged."""


class AsynchronousTrainer(Trainer):
    """One of several trainers, each at its own pace; see `Trainer`.

    Whose batch crosses the point at which an evaluation is due evaluates, with the master copy of the dense part.
    Each keeps its log in `<output>/trainers/<name>-<member>`. At the end the oldest of them that lives measures the
    test split and writes into `output` what a synchronous run would: `recforge train` and others go on from there.

    Args:
        model: with tables that lie on servers.
        problem: with data that are the same for all.
        config: of the loop.
        output: the run's folder.
        recipe: a name for the run.
        membership: of this trainer.
        leased: its batches.
        servers: all shards.
        others: makes attachments; `leased` comes after them.
        brings_weights: whether this one loads the checkpoint that the run begins with, if it begins with one.
    """

    def __init__(
        self,
        model: nn.Module,
        problem: Problem,
        config: TrainingConfig,
        output: Path,
        *,
        recipe: str,
        membership: Membership,
        leased: LeasedBatches,
        servers: Servers,
        others: Callable[[RunParts], Sequence[Attachment]],
        brings_weights: bool = False,
    ) -> None:
        own = output / TRAINERS / f"{membership.name}-{membership.member}"
        done = replace(config, noise_scale=replace(config.noise_scale, every_steps=0))
        if not brings_weights:
            done = replace(done, branch_from=None, branch_at=None)
        super().__init__(model, problem, done, own, recipe=recipe, others=lambda run: (*others(run), leased))
        self.settings = describe_run(config, model, recipe)  # as asked for, with which a run goes on without servers
        self.output, self.membership, self.leased, self.servers = output, membership, leased, servers
        # The first batch waits for shards and compilers, and nothing is lost without it.
        self.stop_request.at_once = True

    @override
    def fit(self) -> dict[str, Any]:
        """See `Trainer`.

        Raises:
            LeaseLostError: others have this trainer's data, as shards have heard before it did.
        """
        try:
            return super().fit()
        except LaneLostError as error:
            raise LeaseLostError(f"{error}; nothing is lost: start this trainer again") from error

    @override
    def read(self) -> Iterator[Batch | None]:
        if self.config.branch_from is not None:  # before any data are given out, so that no shard loses what was loaded
            self.servers.save()
            self.servers.wait()
        for batch in self.leased.batches(lambda: self.stop_request.requested):
            if self.leased.stage is not Stage.STARTING:
                self.stop_request.at_once = False
            yield batch

    @override
    def _measure(self, reader: SampleReader) -> Values:
        before, self.leased.stage = self.leased.stage, Stage.EVALUATING
        try:
            return super()._measure(reader)
        finally:
            self.leased.stage = before

    @override
    def save(self, *, is_best: bool) -> None:
        self.servers.save()

    @override
    def finish(self, log: RunLog, why: str) -> dict[str, Any]:
        self.leased.give_back(wait=True)
        self.servers.wait()
        self.attachments.before_measuring()  # which brings the last steps to the master
        staleness = self.membership.mean_staleness()
        own = {"trainer": self.membership.name, "seconds": self.progress.seconds, "stopped": why}
        if not self._sums_up():
            return own
        with only_run_in(self.output):
            summary = super().finish(log, why)
            known = {} if staleness is None else {"mean_staleness": staleness}
            return self._publish(summary | known) | own

    def _sums_up(self) -> bool:
        """Say whether this trainer measures and writes what the run leaves: the oldest that lives does, if none has.

        A trainer that was killed counts as living until its lease ends. Others that left within that time would leave
        a run without a summary, and nobody would say so: hence they wait for the length of a lease. An older one that
        is still there then has renewed its lease: it lives, and does this itself.
        """
        self.leased.stage = Stage.SAVING  # which a display tells only if nobody trains or evaluates
        end = time.monotonic() + self.membership.lease_seconds
        while True:
            is_over = time.monotonic() > end  # before looking, so that who is silent has been given up
            is_oldest = self.membership.is_oldest()
            self.progress.samples = self.membership.count_samples()
            if self._is_published():  # by an older one, which may have left since
                return False
            if is_oldest or is_over:
                return is_oldest
            time.sleep(LOOK_SECONDS)

    def _publish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write what a run leaves into the folder of the whole run."""
        self.leased.stage = Stage.SAVING
        checkpoints = CheckpointStore(self.output / CHECKPOINTS, keep_last=self.config.checkpoint.keep_last)
        checkpoints.save(self.snapshot.take(), samples=self.progress.samples, metric=self.progress.best)
        checkpoints.wait()
        records = [record for own in sorted(self.folder.parent.iterdir()) for record in read_records(own)]
        lines = [json.dumps(record) for record in sorted(records, key=lambda record: int(record["samples"]))]
        (self.output / METRICS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        for path in self.folder.glob("*.json"):  # also what a problem has left for the report
            shutil.copyfile(path, self.output / path.name)
        whole = summary | {"folder": str(self.output), "run_id": self.membership.description.run_id}
        write_json(self.output / SUMMARY, whole)
        return whole

    def _is_published(self) -> bool:
        path = self.output / SUMMARY
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        wanted = {"run_id": self.membership.description.run_id, "samples": self.progress.samples}
        return all(told.get(name) == value for name, value in wanted.items())
