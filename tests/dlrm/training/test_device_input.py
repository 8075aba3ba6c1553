"""Batches that are copied ahead come in order, each once; what fails on the way is raised, and no thread stays."""

from __future__ import annotations

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
