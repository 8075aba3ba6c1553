"""Batches that are copied ahead come in order, each once; what fails on the way is raised, and no thread stays."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.batch import Batch
from dlrm.training.device_input import _Arrival, copy_ahead, copy_in_background


def make(number: int) -> Batch:
    ids = KeyedJaggedTensor(["a"], torch.tensor([number]), lengths=torch.tensor([1]))
    return Batch(dense=torch.zeros(1, 2), sparse=ids, labels=torch.tensor([float(number)]), rows=torch.tensor([number]))


def arrive(batch: Batch) -> _Arrival:
    return _Arrival(batch, None)


class Watched(Batch):
    """Writes down what is done to it on its way to a GPU."""

    deeds: list[str]

    def pin_memory(self) -> Watched:
        self.deeds.append(f"pin, knowing {self.sparse.length_per_key_or_none()}")
        return self

    def to(self, device: torch.device, non_blocking: bool = False) -> Watched:
        self.deeds.append(f"copy to {device}" + (" and go on" if non_blocking else ""))
        return self

    def record_stream(self, stream: object) -> None:
        self.deeds.append(f"keep for {stream}")


class Stream(str):
    """A stream of a GPU that is not there."""

    def wait_event(self, event: Event) -> None:
        event.deeds.append(f"{self} waits for {event.told}")


class Event:
    """Something on a stream that others may wait for."""

    deeds: list[str]
    told = "nothing"

    def record(self, stream: Stream) -> None:
        self.told = f"what {stream} does"
        self.deeds.append(f"{stream} tells when")


def test_a_copy_is_made_beside_the_computation_and_waited_for_there(monkeypatch: pytest.MonkeyPatch) -> None:
    deeds: list[str] = []
    monkeypatch.setattr(Watched, "deeds", deeds, raising=False)
    monkeypatch.setattr(Event, "deeds", deeds, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copying"))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("computing"))
    plain = make(3)
    batch = Watched(dense=plain.dense, sparse=plain.sparse, labels=plain.labels, rows=plain.rows)
    (given,) = copy_ahead(iter([batch]), torch.device("cuda", 1))
    assert given is batch
    assert deeds == [
        "pin, knowing [1]",
        "copy to cuda:1 and go on",
        "copying tells when",
        "computing waits for what copying does",
        "keep for computing",
    ]


def names_of_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_on_the_cpu_batches_are_left_alone():
    batches = iter([make(0)])
    assert copy_ahead(batches, torch.device("cpu")) is batches


def test_batches_come_in_order_and_the_thread_goes():
    numbers = [int(arrival.batch.rows) for arrival in copy_in_background(map(make, range(20)), arrive, 2)]
    assert numbers == list(range(20))
    assert "batches to the GPU" not in names_of_threads()


def test_no_more_batches_are_taken_than_may_wait():
    taken: list[int] = []

    def source() -> Iterator[Batch]:
        for number in range(100):
            taken.append(number)
            yield make(number)

    arrivals = copy_in_background(source(), arrive, 2)
    next(arrivals)
    # given, waiting twice, and one that waits for a place
    threading.Event().wait(0.5)
    assert 2 <= len(taken) <= 4
    arrivals.close()
    assert "batches to the GPU" not in names_of_threads()
    assert len(taken) <= 5


def test_what_fails_is_raised_after_the_batches_before_it():
    def source() -> Iterator[Batch]:
        yield make(0)
        raise ValueError("row 7: expected a number")

    arrivals = copy_in_background(source(), arrive, 2)
    assert int(next(arrivals).batch.rows) == 0
    with pytest.raises(ValueError, match="row 7"):
        next(arrivals)
    assert "batches to the GPU" not in names_of_threads()
