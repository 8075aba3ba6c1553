"""How the dense part is shared: what is out of range names its flag, and defaults follow from the mode."""

from __future__ import annotations

from typing import Any

import pytest

from dlrm.asynchronous.dense_average_config import DenseAverageConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mode": "easgd", "alpha": 1.0},
            "--dense-average.alpha: expected a number in .0, 1., above which copies move apart, got 1.0",
        ),
        ({"mode": "easgd", "alpha": 1.7}, "--dense-average.alpha"),
        ({"mode": "easgd", "alpha": 0.0}, "--dense-average.alpha"),
        ({"beta": 1.0}, "--dense-average.beta"),
        ({"every_steps": 0}, "--dense-average.every-steps: expected at least 1, got 0"),
        ({"mode": "lamb"}, "--dense-average.mode: .* got 'lamb': servers update number by number; lamb and others run"),
        ({"mode": "average", "momentum": 1.0}, "--dense-average.momentum: expected a number in"),
        ({"mode": "easgd", "momentum": 0.5}, "--dense-average.momentum: expected --dense-average.mode average"),
        ({"mode": "sgd", "alpha": 0.5}, "--dense-average.alpha: expected --dense-average.mode easgd, got sgd"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseAverageConfig(**settings)


def test_the_force_gets_weaker_with_the_number_of_trainers() -> None:
    assert [DenseAverageConfig().alpha_for(n) for n in (1, 2, 3, 9)] == pytest.approx([0.5, 0.45, 0.3, 0.1])
    assert DenseAverageConfig(mode="easgd", alpha=0.2).alpha_for(50) == 0.2
    assert (DenseAverageConfig().steps, DenseAverageConfig(mode="adam").steps) == (8, 1)
