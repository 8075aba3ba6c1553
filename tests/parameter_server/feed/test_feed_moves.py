"""A reader's rows stay those of the shards, bit for bit, when buckets move, and shards come, go and start again."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from embeddings.kernels.hash_kernels import NUM_BUCKETS


@pytest.mark.parametrize("seed", range(4))
def test_moved_rows_are_not_lost_and_old_ones_do_not_come_back(cluster: Any, seed: int) -> None:
    draw = np.random.default_rng(seed)
    cluster.push(3)
    reader, served = cluster.read()
    with reader:
        for _ in range(12):
            giver = int(draw.integers(2))
            cluster.move(giver, 1 - giver, draw.integers(0, NUM_BUCKETS, 1500))
            if draw.random() < 0.5:  # there and back before a pass sees it
                back = draw.integers(0, NUM_BUCKETS, 3000)
                cluster.push()
                cluster.shards[1 - giver].evict(0, draw.integers(0, 500, 100))
                cluster.move(1 - giver, giver, back)
            cluster.push()
            time.sleep(draw.random() * 0.04)
        cluster.assert_equal(reader, served)


def test_a_shard_that_does_not_know_what_it_gave_away_is_not_believed(cluster: Any) -> None:
    cluster.push(3)
    reader, served = cluster.read()
    with reader:
        cluster.assert_equal(reader, served)
        giver = cluster.shards[0]
        old_routes, old_rows = cluster.routes, [table.take() for table in giver.tables]
        cluster.move(0, 1, np.arange(NUM_BUCKETS))
        cluster.push(3)
        cluster.assert_equal(reader, served)
        for table, rows in zip(giver.tables, old_rows, strict=True):
            table.put(rows)
        giver.history += 1
        giver.set_routes(old_routes)
        seen = len(cluster.connections)
        for connection in list(cluster.connections):
            connection.close()
        cluster.wait_for(lambda: len(cluster.connections) > seen + 1)
        cluster.push()
        cluster.wait_for(lambda: reader.versions(0) == tuple(table.version for table in giver.tables))
        giver.set_routes(cluster.routes)
        for table in giver.tables:
            table.drop(np.ones(NUM_BUCKETS, np.bool_))
        cluster.assert_equal(reader, served)


def test_a_new_shard_is_followed_and_a_drained_one_left(cluster: Any) -> None:
    cluster.push(3)
    reader, served = cluster.read()
    with reader:
        cluster.assert_equal(reader, served)
        cluster.shards[2] = cluster.begin_shard(2)
        cluster.set_owners(cluster.routes.owners)
        cluster.move(0, 2, np.arange(NUM_BUCKETS))
        del cluster.shards[0]
        cluster.set_owners(cluster.routes.owners)
        cluster.push()
        cluster.assert_equal(reader, served)


def test_a_shard_that_starts_again_with_less_is_read_whole(cluster: Any) -> None:
    cluster.push(3)
    reader, served = cluster.read()
    with reader:
        cluster.assert_equal(reader, served)
        again = cluster.begin_shard(0)
        again.history = 2
        again.set_routes(cluster.routes)
        cluster.shards[0] = again
        for connection in list(cluster.connections):
            connection.close()
        for _ in range(6):  # beyond the version that the reader knows
            again.push(cluster.draw, rows=5)
        cluster.assert_equal(reader, served)
