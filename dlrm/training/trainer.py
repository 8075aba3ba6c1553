"""The training loop: read, step, measure, save; it reads from top to bottom, and on every rank alike."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlrm.batch import Batch
from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.checkpoints.run_state import load_model, seed_generators
from dlrm.config import TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.distributed.hang_watch import LAST_CHECKPOINT, RESTORING
from dlrm.distributed.ranks import ALONE, Ranks
from dlrm.optim.dense import build_dense_optimizer
from dlrm.training.attachments import Attachment
from dlrm.training.batch_sizes import BatchSizes
from dlrm.training.build_step import build_step
from dlrm.training.clicks import Clicks
from dlrm.training.course import Course, Progress
from dlrm.training.guards import NonFiniteLossError, check_shares
from dlrm.training.interrupt import StopRequest, only_run_in
from dlrm.training.look_ahead import look_ahead
from dlrm.training.problem import Place, Problem, SampleReader, Values
from dlrm.training.restore import CHECKPOINTS, restore_run
from dlrm.training.run_config import CONFIG, check_same_run, describe_run
from dlrm.training.run_log import RunLog, SilentLog, write_json
from dlrm.training.run_parts import RunParts
from dlrm.training.snapshot import Snapshot
from dlrm.training.stage_times import StageTimes
from dlrm.training.summary import write_summary
from dlrm.training.task import Task
from dlrm.training.train_step import Wishes
from embeddings.allocation import FreeMemory, keep_freed_memory
from embeddings.stopwatch import Stopwatch

# Ranks draw dropout apart from each other.
SEED_STRIDE = 1_000_003


class Trainer:
    """Trains a model on a prepared dataset; what it writes lies in `output`.

    Running it again on the folder of an unfinished run continues that run, from its last checkpoint, as if it had
    never stopped. On several ranks each makes its own; they do the same things at the same moments, each on its share
    of every batch, and rank 0 alone speaks and writes what exists once.

    Args:
        model: for clicks, `model(batch)` gives logits [B]; `dlrm.model.DLRM` or any module. On several ranks, its
            tables are of a plan for as many, and batches of no samples come by.
        data: its train split is learned, its valid split steers, its test split is measured at the end: a dataset of
            clicks, or another problem.
        config: of the loop.
        output: the run's folder.
        recipe: a name for the run.
        ranks: who else trains.
        others: makes attachments besides those that the configuration asks for.

    Raises:
        ValueError: the model's tables do not suit the data or the ranks, the training split is empty, or `output` holds
            another run.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset | Problem,
        config: TrainingConfig,
        output: Path | str,
        *,
        recipe: str = "",
        ranks: Ranks = ALONE,
        others: Callable[[RunParts], Sequence[Attachment]] | None = None,
    ) -> None:
        problem = data if isinstance(data, Problem) else Clicks(data)
        problem.check(model, config)
        check_shares(model, ranks)
        self.settings = describe_run(config, model, recipe)
        check_same_run(Path(output), self.settings, type(config))
        self.model, self.problem, self.config, self.folder, self.ranks = model, problem, config, Path(output), ranks
        self.dataset = problem.dataset
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.reader = problem.reader("train", config)
        self.valid_reader = problem.reader("valid", config) if self.dataset.rows("valid") else None
        self.course = Course(config, self.reader.num_rows)
        self.stopwatch = Stopwatch()
        self.place = Place(device=self.device, folder=self.folder, ranks=ranks, stopwatch=self.stopwatch)
        self.stages = StageTimes(self.stopwatch, ranks)
        self.optimizer = build_dense_optimizer(config.dense, model, config.head)
        self.sizes = BatchSizes(config.step.global_batch_size)
        self.step = build_step(
            RunParts(
                config=config,
                model=model,
                problem=problem,
                optimizer=self.optimizer,
                sizes=self.sizes,
                ranks=ranks,
                others=others,
            ),
            self.stopwatch,
        )
        self.attachments = self.step.attachments
        self.snapshot = Snapshot(
            model=model,
            optimizer=self.optimizer,
            course=self.course,
            sizes=self.sizes,
            attachments=self.attachments,
            task=self.step.task,
            stopwatch=self.stopwatch,
            device=self.device,
            dataset=self.dataset,
        )
        if self.device.type == "cpu":
            keep_freed_memory()
        self.free_memory = FreeMemory()
        self.stop_request = StopRequest()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = CheckpointStore(
            self.folder / CHECKPOINTS, keep_last=config.checkpoint.keep_last, ranks=ranks
        )

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        return self.course.progress

    def fit(self) -> dict[str, Any]:
        """Train to the end, or until a limit or a target is reached, and return what `summary.json` holds.

        Raises:
            ValueError: a guard stopped the run, and what was saved before is kept; or another process trains here.
            KeyboardInterrupt: the run was asked to stop; its state is saved, and the same command continues it.
        """
        with only_run_in(self.folder, self.ranks):
            return self._fit()

    def _fit(self) -> dict[str, Any]:
        # Of dropout; a checkpoint brings its own state.
        seed_generators(self.config.seed + SEED_STRIDE * self.ranks.rank)
        with self.stopwatch.stage(RESTORING):
            notes = restore_run(self.checkpoints, self.snapshot, self.config, self.settings, self.folder)
        log = self._open_log()
        for note in notes:
            log.say(note)
        try:
            with self.stop_request:
                why = self._loop(log)
                self._wait_for_checkpoints()
                if why == "interrupted":
                    raise KeyboardInterrupt(
                        f"and saved after {self.progress.samples} samples; the same command continues"
                    )
            return self.finish(log, why)
        except NonFiniteLossError as error:
            told = error.with_what_is_kept(self._what_is_kept())
            log.record("stopped", self.progress.samples, {"why": str(told)})
            raise told from error
        except (ValueError, OSError, KeyboardInterrupt) as error:
            with contextlib.suppress(OSError):  # a full disk may be what stopped it
                log.record("stopped", self.progress.samples, {"why": str(error) or "interrupted"})
            raise
        finally:
            log.close()

    def _open_log(self) -> RunLog:
        if not self.ranks.is_first:
            return SilentLog()
        folder = str(self.dataset.folder.resolve())  # as it may be asked for from elsewhere
        versions = {"dataset": folder, "torch": torch.__version__, "ranks": self.ranks.count}
        write_json(self.folder / CONFIG, self.settings | versions)
        return RunLog(self.folder, samples=self.progress.samples, total=self.course.total_samples)

    def _loop(self, log: RunLog) -> str:
        course, progress = self.course, self.progress
        if (why := course.reason_to_stop(time_is_up=course.time_is_up())) is not None:  # a run that had ended goes on
            return why
        self.model.train()
        self.stages.begin(progress.seconds)
        for batch, following in self._batches():
            size = batch.global_size or len(batch)
            before = progress.samples if batch.first is None else batch.first
            in_force = self.sizes.at(before)
            with self._timed():
                loss = self.step(batch, before + size, self._wishes(), following, batch_size=in_force)
            course.advance(before + size, size, loss)
            log.advance(size, loss, self.stages.remark)
            self.free_memory.tend()
            if course.is_due(before, self.config.log_every_samples):
                self._log_training(log, in_force)
            # Once, so that no request falls between saving and leaving.
            wishes = self.step.agreed or self._wishes()
            complaint, is_best, evaluated = None, False, course.evaluation_is_due(before)
            if evaluated:
                complaint, is_best = self._evaluate(log)
            if any(wishes) or course.checkpoint_is_due(before, evaluated=evaluated) or is_best:
                self.save(is_best=is_best)
            if complaint:
                self._wait_for_checkpoints()
                raise ValueError(complaint)
            if wishes.asked_to_stop:
                return "interrupted"
            if (why := course.reason_to_stop(time_is_up=wishes.time_is_up)) is not None:
                return why
        return "all epochs done"

    def read(self) -> Iterator[Batch | None]:
        """Give the batches to train, of which the next one is asked for before one is trained; see `look_ahead`."""
        return self.reader.batches(
            self.sizes.at,
            start=self.progress.samples,
            stop=self.course.total_samples,
            share=self.ranks.share_of if self.ranks.count > 1 else None,
        )

    def _batches(self) -> Iterator[tuple[Batch, Batch | None]]:
        batches = look_ahead(self.read(), self.device, self.stopwatch)
        while True:
            with self._timed():
                pair = next(batches, None)
            if pair is None:
                return
            yield pair

    def _wishes(self) -> Wishes:
        return Wishes(asked_to_stop=self.stop_request.requested, time_is_up=self.course.time_is_up())

    def _log_training(self, log: RunLog, batch_size: int) -> None:
        progress = self.progress
        values = {
            **(self.step.task.values() if isinstance(self.step.task, Task) else {}),
            "loss": self.course.take_mean_loss(),
            "seconds": progress.seconds,
            "samples_per_second": progress.samples / max(progress.seconds, 1e-9),
            "batch_size": batch_size,
            **self.step.steering.values(),
            **self.attachments.values(),
        }
        log.record("train", progress.samples, values, self.stages.end_interval(progress.seconds))

    def _evaluate(self, log: RunLog) -> tuple[str | None, bool]:
        """Measure the valid split; return what the guard complains of, and whether this is the best so far."""
        if self.valid_reader is None:
            return None, False
        self.attachments.before_measuring()
        values = self._measure(self.valid_reader)
        is_best = self.course.note_evaluation(values, at_chance=self.problem.is_at_chance(values))
        progress = self.progress
        self.attachments.after_evaluation(values, progress.samples)
        measured = {"seconds": progress.seconds, **self._describe_stages()}
        log.record("valid", progress.samples, self.problem.describe(values, self.config) | measured)
        told = f"after {progress.samples:,} samples: {self.problem.tell(values)} on {values.samples:,} valid rows"
        log.say(told + (" (best)" if is_best else ""))
        if values.undefined is not None:
            log.say(f"not every metric of the valid split is defined: {values.undefined}")
        return self.problem.complaint(values, progress.evaluations_at_chance, self.config.guards), is_best

    def _measure(self, reader: SampleReader) -> Values:
        return self.problem.measure(self.model, reader, self.config, self.place)

    def _describe_stages(self) -> dict[str, Any]:
        totals = self.stages.totals()
        seconds = {name: stage["seconds"] for name, stage in totals.items()}
        return {"stage_seconds": seconds} | ({"stages_of_ranks": totals} if self.ranks.count > 1 else {})

    def save(self, *, is_best: bool) -> None:
        """Save the run's state."""
        self.attachments.before_measuring()
        with self.stopwatch.stage("checkpoint"):
            self.checkpoints.save(
                self.snapshot.take(), samples=self.progress.samples, metric=self.progress.best, is_best=is_best
            )

    def _wait_for_checkpoints(self) -> None:
        with self.stopwatch.stage(LAST_CHECKPOINT):
            self.checkpoints.wait()

    def _what_is_kept(self) -> str:
        with contextlib.suppress(ValueError):  # one that could not be written is not kept
            self._wait_for_checkpoints()
        saved = self.checkpoints.list()
        return f"the checkpoint after {saved[0].samples:,} samples is kept" if saved else "nothing was saved before"

    def finish(self, log: RunLog, why: str) -> dict[str, Any]:
        """Measure the test split with the best weights, and write `summary.json` and `tables.json`."""
        progress = self.progress
        if self.config.evaluation.test_best and progress.best is not None:
            with self.stopwatch.stage(RESTORING):
                if (best := self.checkpoints.restore_best()) is not None:
                    load_model(self.model, best.state)
        split = next((name for name in ("test", "valid", "train") if self.dataset.rows(name)), "train")
        reader = self.problem.reader(split, replace(self.config, shuffle=False))
        values = self._measure(reader)
        further = self.problem.finish(self.model, reader, values, self.place)
        described = self.problem.describe(values, self.config)
        log.record(split, progress.samples, described)
        course = {
            "split": split,
            "samples": progress.samples,
            "seconds": progress.seconds,
            "stopped": why,
            "best_samples": progress.best_samples,
            "ranks": self.ranks.count,
            **self._describe_stages(),
        }
        summary = write_summary(self.folder, self.model, described, further, course, ranks=self.ranks)
        chances = progress.evaluations_at_chance + 1 if self.problem.is_at_chance(values) else 0
        if (complaint := self.problem.complaint(values, chances, self.config.guards, last=True)) is not None:
            raise ValueError(complaint)
        return summary

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.progress.seconds += time.perf_counter() - start
