"""Rows that were in a folder which nobody named do not begin anew in silence when other shards take over."""

from __future__ import annotations

import numpy as np
import pytest

EVERYTHING = np.ones(4096, bool)


@pytest.mark.parametrize("durability", ["journal", "snapshot"])
def test_a_folder_that_is_not_named_is_missed_before_anything_is_taken_over(run, durability):
    shards = [run.start(number, (0, 1), durability=durability) for number in (0, 1)]
    for shard in shards:
        if durability == "snapshot":
            shard.snapshot()
        shard.close()
    folders = [run.folder / f"shard-{number}" for number in (0, 1)]
    new = run.start(name="new")
    with pytest.raises(ValueError, match=r"--restore-from: expected the folders of all shards .* held 2048 of 4096"):
        new.restore_from(folders[1:], EVERYTHING)
    first_half = EVERYTHING.copy()
    first_half[2048:] = False
    assert run.start(1, name="half").restore_from(folders[:1], first_half).lines == ()
    assert new.restore_from(folders, EVERYTHING).lines == ()


def test_a_shard_that_never_saved_is_told_of_and_stops_nobody(run):
    shards = [run.start(number, (0, 1), durability="snapshot") for number in (0, 1)]
    shards[0].snapshot()
    for shard in shards:
        shard.close()
    info = run.start(name="new").restore_from([run.folder / f"shard-{number}" for number in (0, 1)], EVERYTHING)
    assert info.lines == (
        "2048 buckets are in none of the folders, as some shard had not saved any: their rows begin anew",
    )
