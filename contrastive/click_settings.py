"""Refuses settings of the loop which only models of clicks know, rather than leave them without effect."""

from __future__ import annotations

from dlrm.analysis.curvature.rate_config import CurvatureRateConfig
from dlrm.config import TrainingConfig
from dlrm.optim.config import HeadConfig
from dlrm.optim.lr_schedules import Schedule
from dlrm.training.adversarial_config import AdversarialConfig


def check_no_click_settings(config: TrainingConfig) -> None:
    """Check that a run on sequences is told nothing of what it does not have.

    Raises:
        ValueError: naming the flag, and why.
    """
    noise = "the noise of their gradients is not measured"
    parts = "a model of sequences has no logit, and no pooled rows"
    has = {
        "--noise-scale.every-steps": (config.noise_scale.every_steps > 0, noise),
        f"--growth.test {config.growth.test}": (config.growth.test != "none", noise),
        "--rule adascale": (config.rule == "adascale", noise),
        "--curvature-rate": (config.curvature_rate != CurvatureRateConfig(), parts),
        "--adversarial": (config.adversarial != AdversarialConfig(), parts),
        "--head": (config.head != HeadConfig(), parts),
        "--head-schedule": (config.head_schedule != Schedule(), parts),
        "--small-tables-schedule": (config.small_tables_schedule != Schedule(), "all tables have one rate"),
        "--evaluation.segment-by": (config.evaluation.segment_by is not None, "users are ranked for all together"),
        "--parallel.memory": (config.parallel.memory is not None, "tables are placed by their rows"),
    }
    for flag, (is_given, why) in has.items():
        if is_given:
            raise ValueError(f"{flag}: expected nothing beside a recipe for sequences, as {why}; leave it out")
