"""Says in words where a run's time went, what held it up, and which setting acts on that."""

from __future__ import annotations

from dlrm.analysis.quantities import format_duration, format_share
from dlrm.analysis.run_folder import Record, Run
from dlrm.training.stage_times import AVOIDABLE, OTHER_STAGE, OUTSIDE_TRAINING, WAITING_FOR_DATA, Spread

WORTH_A_WORD = 0.1  # share of the steps' time
# What a rank does by itself, and the others then wait for.
UNEVEN = ("lookup", "row update")
_WAITS = {
    WAITING_FOR_DATA: "{who} {share} of a step for data",
    "ids all-to-all": "The ids' all-to-all takes {share} of a step",
    "rows all-to-all": "The all-to-all of looked-up rows takes {share} of a step",
    "gradients all-to-all": "The all-to-all of the rows' gradients takes {share} of a step",
    "exposed all-reduce": "Ranks wait {share} of a step for the sum of the dense gradients",
}
_SMALLER_MESSAGES = (
    "--parallel.exchange bf16 halves what goes over a network, shorter rows ({dim}) make it cheaper, and tables "
    "that every rank holds (--parallel.replicate-below-rows) have no part in it."
)
_FEWER_ITEMS = "a softmax over drawn items (--sequence.negatives)"
# Which settings act on a stage, for the reader whose run spends most of its time there.
_ADVICE = {
    WAITING_FOR_DATA: "the step is faster than the reader; a faster disk, or fewer columns, would help.",
    "ids all-to-all": (
        "it travels while the batch before is trained, so that a larger --step.global-batch-size hides more of it; "
        "tables that every rank holds (--parallel.replicate-below-rows) have no part in it."
    ),
    "rows all-to-all": _SMALLER_MESSAGES.format(dim="--model.dim"),
    "gradients all-to-all": _SMALLER_MESSAGES.format(dim="--model.dim"),
    "exposed all-reduce": (
        "larger batches (--step.global-batch-size) need fewer of them, and narrower layers (--model.bottom, "
        "--model.top) send less."
    ),
    "lookup": "Shorter rows (--model.dim) or fewer ids per bag make it cheaper.",
    "dense forward": "Narrower layers (--model.bottom, --model.top), --step.precision bf16, --step.compile act on it.",
    "dense backward": "Narrower layers (--model.bottom, --model.top), --step.precision bf16, --step.compile act on it.",
    "row update": (
        "Shorter rows (--model.dim) and larger batches (--step.global-batch-size), whose rows coincide more, act on it."
    ),
    "dense update": "Larger batches (--step.global-batch-size) need fewer of them.",
    "evaluation": "Fewer evaluations (--evaluation.every-samples) leave more time to train.",
    "checkpoint": "Fewer checkpoints (--checkpoint.every-samples) leave more time to train.",
}
_ADVICE_ON_SEQUENCES = _ADVICE | {
    WAITING_FOR_DATA: "the step is faster than the reader; a faster disk would help.",
    "rows all-to-all": _SMALLER_MESSAGES.format(dim="--dim"),
    "gradients all-to-all": _SMALLER_MESSAGES.format(dim="--dim"),
    "exposed all-reduce": (
        "larger batches (--step.global-batch-size) need fewer of them, and a narrower encoder (--dim, --encoder.inner) "
        "sends less."
    ),
    "lookup": f"Shorter rows (--dim) or {_FEWER_ITEMS} make it cheaper.",
    "dense forward": f"A narrower encoder (--dim, --encoder.inner) and {_FEWER_ITEMS} act on it.",
    "dense backward": f"A narrower encoder (--dim, --encoder.inner) and {_FEWER_ITEMS} act on it.",
    "row update": f"Shorter rows (--dim) and {_FEWER_ITEMS} act on it.",
}


def share_out_time(run: Run) -> list[tuple[str, float]]:
    """Return stages and their seconds, largest first, with what the stopwatch did not see as a stage of its own.

    Of several ranks these are means.
    """
    record = run.last_measured or {}
    stages: dict[str, float] = dict(record.get("stage_seconds") or {})
    if not stages:
        return []
    outside = sum(stages.get(name, 0.0) for name in OUTSIDE_TRAINING)
    if (other := (record.get("seconds") or 0.0) + outside - sum(stages.values())) > 0:
        stages[OTHER_STAGE] = other
    return sorted(stages.items(), key=lambda stage: stage[1], reverse=True)


def spread_over_ranks(run: Run) -> dict[str, Spread]:
    """Return what is known of each stage's seconds by rank; nothing of a process of its own."""
    record: Record = run.last_measured or {}
    return dict(record.get("stages_of_ranks") or {})


def describe_bottleneck(
    stages: list[tuple[str, float]], of_ranks: dict[str, Spread] | None = None, *, of_sequences: bool = False
) -> str:
    """Say what held the steps up and what acts on it; where nothing did, which stage took most of the time.

    Args:
        stages: as `share_out_time` gives them.
        of_ranks: as `spread_over_ranks` gives them.
        of_sequences: whether the model reads sequences, which has other flags.
    """
    of_ranks = of_ranks or {}
    advice_on = _ADVICE_ON_SEQUENCES if of_sequences else _ADVICE
    total = sum(seconds for _, seconds in stages)
    if not total:
        return "No time was measured: the run ended before its first step."
    steps = sum(seconds for name, seconds in stages if name not in OUTSIDE_TRAINING)
    if (uneven := _describe_uneven(of_ranks, steps)) is not None:
        return uneven
    waits = [stage for stage in stages if stage[0] in AVOIDABLE]
    name, seconds = max(waits, key=lambda stage: stage[1], default=("", 0.0))
    if steps and seconds >= WORTH_A_WORD * steps:
        who = "Ranks wait" if of_ranks else "The loop waits"
        words = f"{_WAITS[name].format(who=who, share=format_share(seconds / steps, 0))}: {advice_on[name]}"
        together = sum(seconds for _, seconds in waits) / steps
        return words + (f" All exchanges and waits take {format_share(together, 0)} of a step." if of_ranks else "")
    name, seconds = stages[0]
    share = f"{format_share(seconds / total, 0)} of {format_duration(total)}"
    advice = advice_on.get(name, "")
    return f"The largest part, {share}, went into: {name}. {advice[:1].upper()}{advice[1:]}".strip()


def _describe_uneven(of_ranks: dict[str, Spread], steps: float) -> str | None:
    """Name the rank whose tables take longer than the others', if that is what these wait for."""
    known = [(of_ranks[name]["most"] - of_ranks[name]["seconds"], name) for name in UNEVEN if name in of_ranks]
    excess, name = max(known, default=(0.0, ""))
    if not steps or excess < WORTH_A_WORD * steps:
        return None
    stage = of_ranks[name]
    return (
        f"Rank {stage['most_rank']:.0f} spends {format_share(stage['most'] / steps, 0)} of a step on its {name}, the "
        f"mean of all ranks is {format_share(stage['seconds'] / steps, 0)}, and the others wait for it: let "
        "--parallel.sharding auto even that out, or cut the tables on that rank (--parallel.tables NAME=row_wise)."
    )
