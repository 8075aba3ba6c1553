"""What the members of a run are at, so that a display says why no sample is done yet."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parameter_server.coordinator.answers import Status

STAGE = "stage"  # among the facts that trainers tell with their heartbeats


class Stage(IntEnum):
    """What a trainer is at; a number, as all facts are."""

    STARTING = 0
    TRAINING = 1
    EVALUATING = 2
    SAVING = 3


def describe_stage(status: Status, shards: int) -> str:
    """Say in a few words what a run is at: training as long as anybody trains, else what the furthest trainer does.

    Args:
        status: of the run.
        shards: how many were started.
    """
    if not status.samples:  # the first trainer that is ready describes the run, and shards prepare for it then
        return "starting trainers"
    told = {int(m.facts.get(STAGE, Stage.STARTING)) for m in status.members if m.role == "trainer" and m.alive}
    for stage, words in ((Stage.TRAINING, "training"), (Stage.EVALUATING, "evaluating"), (Stage.SAVING, "saving")):
        if stage in told:
            return words
    if status.samples_completed >= status.samples and not told:  # all have left, or are not heard of while they measure
        return "ending"
    ready = sum(m.role == "shard" and m.alive and bool(m.facts) for m in status.members)
    if ready < shards:
        return f"starting shards, {ready} of {shards} ready"
    return "starting trainers, first batch" if told else "starting trainers"
