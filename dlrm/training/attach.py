"""Chooses from a run's configuration who takes part in its steps: the one place where an attachment is plugged in."""

from __future__ import annotations

from dlrm.training.attachments import Attachment, Attachments
from dlrm.training.run_parts import RunParts


def attach(run: RunParts) -> Attachments:
    """Make the attachments that a configuration asks for, in the order in which they are called.

    Modules are imported where they are asked for.
    """
    members: list[Attachment] = []
    config, watch = run.config, None
    is_growing = config.growth.is_on or bool(config.staged_batches)
    if config.noise_scale.every_steps or is_growing:
        from dlrm.training.build_growth import grow_batches, watch_noise

        watch = watch_noise(run) if config.noise_scale.every_steps else None
        members += [watch] if watch is not None else []
        members += [grow_batches(run, watch)] if is_growing else []
    if config.rule == "adascale":
        from dlrm.training.adascale import AdaScale

        if watch is None or config.scale_from is None:
            raise ValueError("--rule adascale: expected --noise-scale.every-steps of at least 1, got 0")
        members.append(AdaScale(watch, config.scale_from, is_adaptive=config.dense.name != "sgd"))
    if config.plateau.policy != "off":
        from dlrm.training.plateau import follow_plateau

        if not run.dataset.rows("valid"):
            raise ValueError(
                f"--plateau.policy {config.plateau.policy}: expected rows in the valid split to follow, got none"
            )
        total = max(1, round(config.epochs * run.dataset.rows("train")))
        members.append(follow_plateau(config.plateau, config.evaluation.metric, total))
    if config.curvature_rate.every_samples is not None:
        from dlrm.analysis.curvature.rate import SlqLrLearner

        members.append(SlqLrLearner(config.curvature_rate, run.model, run.optimizer, run.ranks))
    if run.ranks.count > 1:
        from dlrm.training.rank_agreement import RatioCheck, RunningStatistics

        members += [RatioCheck(run.optimizer, run.ranks), RunningStatistics(run.model, run.ranks)]
    return Attachments([*members, *(run.others(run) if run.others else ())])
