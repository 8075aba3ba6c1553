"""A short run whose batch may grow, for every test that lets it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dlrm.config import EvaluationConfig, StepConfig, TrainingConfig
from dlrm.noise.config import NoiseScaleConfig
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.training.batch_growth_config import BatchGrowthConfig


@pytest.fixture
def config_of() -> Callable[..., TrainingConfig]:
    """Make a run's configuration, given its growth and what else differs."""

    def make(growth: BatchGrowthConfig, **changes: Any) -> TrainingConfig:
        return TrainingConfig(
            log_every_samples=1,
            dense=DenseOptimizerConfig(name="sgd", learning_rate=0.1),
            evaluation=EvaluationConfig(test_best=False),
            growth=growth,
            **(
                {
                    "step": StepConfig(global_batch_size=100, device="cpu", threads=1),
                    "noise_scale": NoiseScaleConfig(every_steps=2),
                }
                | changes
            ),
        )

    return make
