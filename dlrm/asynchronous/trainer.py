"""The training loop beside parameter servers: batches are leased, tables are elsewhere, the last to leave sums up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from typing_extensions import override

from dlrm.asynchronous.leased_batches import LeasedBatches
from dlrm.asynchronous.membership import Membership
from dlrm.asynchronous.stages import Stage
from dlrm.batch import Batch
from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.config import TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.data.reader import Reader
from dlrm.metrics.metrics import MetricValues
from dlrm.training.attach import RunParts
from dlrm.training.attachments import Attachment
from dlrm.training.interrupt import only_run_in
from dlrm.training.restore import CHECKPOINTS
from dlrm.training.run_config import CONFIG
from dlrm.training.run_log import METRICS, RunLog, read_records, write_json
from dlrm.training.summary import SUMMARY, TABLES
from dlrm.training.trainer import Trainer

TRAINERS = "trainers"


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
        dataset: the same for all.
        config: of the loop.
        output: the run's folder.
        recipe: a name for the run.
        membership: of this trainer.
        leased: its batches.
        servers: all shards.
        others: makes attachments; `leased` comes after them.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        config: TrainingConfig,
        output: Path,
        *,
        recipe: str,
        membership: Membership,
        leased: LeasedBatches,
        servers: Servers,
        others: Callable[[RunParts], Sequence[Attachment]],
    ) -> None:
        own = output / TRAINERS / f"{membership.name}-{membership.member}"
        super().__init__(model, dataset, config, own, recipe=recipe, others=lambda run: (*others(run), leased))
        self.output, self.membership, self.leased, self.servers = output, membership, leased, servers
        # The first batch waits for shards and compilers, and nothing is lost without it.
        self.stop_request.at_once = True

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
    def _measure(self, reader: Reader) -> MetricValues:
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
        if not self.membership.is_oldest():
            return own
        self.progress.samples = self.membership.count_samples()
        with only_run_in(self.output):
            summary = super().finish(log, why)
            known = {} if staleness is None else {"mean_staleness": staleness}
            return self._publish(summary | known) | own

    def _publish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write what a run leaves into the folder of the whole run."""
        self.leased.stage = Stage.SAVING
        checkpoints = CheckpointStore(self.output / CHECKPOINTS, keep_last=self.config.checkpoint.keep_last)
        checkpoints.save(self.snapshot.take(), samples=self.progress.samples, metric=self.progress.best)
        checkpoints.wait()
        records = [record for own in sorted(self.folder.parent.iterdir()) for record in read_records(own)]
        lines = [json.dumps(record) for record in sorted(records, key=lambda record: int(record["samples"]))]
        (self.output / METRICS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        for name in (CONFIG, TABLES):
            shutil.copyfile(self.folder / name, self.output / name)
        whole = summary | {"folder": str(self.output)}
        write_json(self.output / SUMMARY, whole)
        return whole
