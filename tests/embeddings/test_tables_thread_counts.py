"""The result of a batch does not depend on how many threads worked on it, bit by bit."""

from __future__ import annotations

import multiprocessing
import threading

import numpy as np
import pytest
import torch

from embeddings import RowSGD, TableConfig
from embeddings.kernels.threads import count_parts, run_all
from embeddings.local.local_tables import LocalTables


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_rows_are_the_same_for_any_number_of_threads(set_threads, draw_bags, keyed_jagged):
    configs = [
        TableConfig(name="hot", num_rows=50, dim=20, features=("x", "y", "z", "w"), pooling="mean"),
        TableConfig(name="b", num_rows=3000, dim=8, optimizer=RowSGD(learning_rate=0.1, weight_decay=0.1)),
    ]
    trained = {}
    for threads in (1, 2, 3):
        set_threads(threads)
        tables = LocalTables(configs)
        random = np.random.default_rng(0)
        for _ in range(3):
            bags = draw_bags(configs, batch_size=200, longest=9, random=random)
            tables(keyed_jagged(bags)).values().sin().sum().backward()
        trained[threads] = tables.state_dict()
    for name, rows in trained[1].items():
        assert torch.equal(rows, trained[2][name]), name
        assert torch.equal(rows, trained[3][name]), name


def test_tasks_run_beside_each_other_and_give_their_results_in_order(set_threads):
    set_threads(3)
    together = threading.Barrier(3, timeout=10)
    assert run_all([lambda i=i: (together.wait(), i)[1] for i in range(3)]) == [0, 1, 2]


def test_an_error_in_another_thread_arrives(set_threads):
    set_threads(2)
    together = threading.Barrier(2, timeout=10)

    def task():
        together.wait()
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("over there")

    with pytest.raises(RuntimeError, match="over there"):
        run_all([task, task])


def test_work_is_cut_so_that_no_part_exceeds_a_threads_share(set_threads):
    set_threads(4)
    assert count_parts([70, 10, 20, 0]) == [3, 1, 1, 1]
    assert count_parts([0, 0]) == [1, 1]
    set_threads(1)
    assert count_parts([70, 10]) == [1, 1]


def _sum_in_child(results):
    torch.set_num_threads(2)
    results.put(run_all([lambda i=i: i for i in range(4)]))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_gets_threads_of_its_own(set_threads):
    set_threads(2)
    run_all([lambda: 0, lambda: 1])
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_sum_in_child, args=(results,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert results.get() == [0, 1, 2, 3]
