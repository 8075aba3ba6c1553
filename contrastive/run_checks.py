"""What a run is refused for when it starts; one of before that was not can be read and asked all the same."""

from __future__ import annotations

from contrastive.config import SequenceRunConfig
from contrastive.unused_settings import Need, refuse_unused
from dlrm.training.batch_growth_config import parse_stages


def check_start(config: SequenceRunConfig, recipe: SequenceRunConfig) -> None:
    """Check that all that was changed of a recipe has an effect, and that a cross-batch memory holds each batch.

    Args:
        config: of the run.
        recipe: what it would be without any flag.

    Raises:
        ValueError: naming the flag, and what it needs.
    """
    refuse_unused(config, recipe, _list_needs(config))
    later = [size for _, size in (*config.staged_batches, *parse_stages(config.growth.stages))]
    vectors = 2 * max([config.step.global_batch_size, *later])
    if config.mclrec.contrast == "memory" and config.mclrec.memory_size < vectors:
        raise ValueError(
            f"--mclrec.memory-size: expected at least {vectors}, the two views of the largest batch "
            "(--step.global-batch-size, --growth.stages, or stages(...) of a schedule), "
            f"got {config.mclrec.memory_size}"
        )


def _list_needs(config: SequenceRunConfig) -> list[Need]:
    mclrec, encoder, sequence = config.mclrec, config.encoder, config.sequence
    is_own = ":" in encoder.kind  # and may make use of all
    views = ("views_weight", "temperature", "similarity")
    learned = ("form", "beta", "regulariser", "regulariser_weight", "augmenter_widths", "shared")
    of_views = ("sequence.operators", "sequence.crop", "sequence.mask", "sequence.reorder", "sequence.second_view")
    attention = ("encoder.heads", "encoder.inner", "encoder.attention_dropout", "encoder.positions")
    return [
        Need(
            "--mclrec.contrast augmenters, views or memory",
            mclrec.needs_views,
            (*(f"mclrec.{name}" for name in views), *of_views),
        ),
        Need(
            "--mclrec.contrast augmenters",
            mclrec.contrast == "augmenters",
            tuple(f"mclrec.{name}" for name in learned),
        ),
        Need("--mclrec.contrast memory", mclrec.contrast == "memory", ("mclrec.memory_size",)),
        Need("--mclrec.views-weight", mclrec.needs_own_contrast, ("mclrec.temperature", "mclrec.similarity")),
        Need("--mclrec.regulariser code or paper", mclrec.regulariser != "none", ("mclrec.regulariser_weight",)),
        Need("--mclrec.second-order", mclrec.second_order, ("mclrec.virtual_rate",)),
        *(
            Need(f"--sequence.operators with {name}", name in sequence.operators, (f"sequence.{name}",))
            for name in ("crop", "mask", "reorder")
        ),
        Need("--sequence.negatives above 0", bool(sequence.negatives), ("sequence.negatives_power",)),
        Need("--encoder.kind bsarec", encoder.kind == "bsarec" or is_own, ("encoder.alpha", "encoder.cutoff")),
        Need("--encoder.kind gru4rec", encoder.kind == "gru4rec" or is_own, ("encoder.gru_width",)),
        Need("--encoder.kind sasrec or bsarec", encoder.kind != "gru4rec", attention),
        Need("a recipe for clicks", False, ("noise_scale.decay", "noise_scale.preconditioned")),
    ]
