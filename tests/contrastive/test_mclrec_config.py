"""What a user says about contrast is either sensible or told with its flag."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import tyro

from contrastive.mclrec_config import MclrecConfig


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({}, ("encoder", "augmenters", "encoder")),
        ({"form": "two_step"}, ("encoder", "augmenters")),
        ({"form": "joint"}, ("joint",)),
        ({"contrast": "views", "views_weight": 0.1}, ("encoder",)),
        ({"contrast": "memory", "views_weight": 0.1}, ("encoder",)),
        ({"contrast": "none"}, ("encoder",)),
    ],
)
def test_stages_follow_from_form_and_contrast(settings: dict[str, Any], stages: tuple[str, ...]) -> None:
    config = MclrecConfig(**settings)
    assert config.stages == stages
    assert config.needs_views == (settings.get("contrast") != "none")
    assert config.needs_own_contrast == (settings.get("contrast") in ("views", "memory"))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"views_weight": -1.0}, "--mclrec.views-weight: expected a number >= 0, got -1.0"),
        ({"beta": float("nan")}, "--mclrec.beta: expected a number >= 0, got nan"),
        ({"temperature": 0.0}, "--mclrec.temperature: expected a number above 0, got 0.0"),
        ({"augmenter_widths": (3, 0)}, "--mclrec.augmenter-widths: expected at least 1, got 0"),
        (
            {"contrast": "views"},
            "--mclrec.views-weight: expected a number above 0 beside --mclrec.contrast views, got 0.0",
        ),
        (
            {"contrast": "memory", "views_weight": 0.1, "memory_size": 2},
            "--mclrec.memory-size: expected at least 4, got 2",
        ),
        (
            {"second_order": True, "form": "joint"},
            "--mclrec.second-order: expected --mclrec.form three_step or two_step",
        ),
        ({"second_order": True, "contrast": "none"}, "--mclrec.second-order: expected --mclrec.contrast augmenters"),
    ],
)
def test_what_makes_no_sense_is_told_with_its_flag(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=r"^--mclrec") as caught:
        MclrecConfig(**settings)
    assert complaint in str(caught.value)


def test_complaints_name_flags_that_there_are() -> None:
    parsed = tyro.cli(MclrecConfig, args=["--views_weight", "0.5", "--augmenter-widths", "4", "--no-shared"])
    assert parsed == MclrecConfig(views_weight=0.5, augmenter_widths=(4,))


def test_help_waits_for_no_torch() -> None:
    code = "import contrastive.mclrec_config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
