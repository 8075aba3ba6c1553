"""A pass in short numbers: the encoder's may be, losses are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contrastive.build import build_model
from contrastive.config import SequenceRunConfig
from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, generate_sequences
from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.losses import full_softmax
from contrastive.mclrec_config import MclrecConfig
from contrastive.next_item import NextItem
from contrastive.next_item_task import NextItemTask
from dlrm.training.train_step import autocast

SMALL = SequenceRunConfig(
    dim=16, encoder=EncoderConfig(inner=32, dropout=0.0, attention_dropout=0.0), mclrec=MclrecConfig(views_weight=0.1)
)
CASES = {
    "three-step": SMALL.mclrec,
    "paper": replace(SMALL.mclrec, form="two_step", regulariser="paper"),
    "second-order": replace(SMALL.mclrec, second_order=True),
    "memory": MclrecConfig(contrast="memory", views_weight=0.1, memory_size=256),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_are_of_full_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Also where products are a GPU's, which autocast shortens; on the CPU ours are not among those that it knows."""
    monkeypatch.setattr(full_softmax, "_multiply", lambda hidden, rows: hidden @ rows.T)
    world = generate_sequences(
        SyntheticSequencesConfig(num_users=60, num_items=40, num_tastes=4, most_actions=20), tmp_path / "data"
    )
    config = replace(SMALL, mclrec=CASES[case])
    batch = NextItem(world, config).reader("train", config).read(0, 64)
    found: dict[str, list[Tensor]] = {}
    for precision in ("fp32", "bf16"):
        task = NextItemTask(build_model(config, world), config.mclrec)
        found[precision] = []
        for stage in task.passes:
            task.enter(stage)
            with autocast(precision, "cpu"):
                loss, _ = task(batch)
            assert loss.dtype == torch.float32
            found[precision].append(loss.detach())
            loss.backward()
    assert torch.allclose(torch.stack(found["bf16"]), torch.stack(found["fp32"]), rtol=5e-3)
    assert not torch.equal(torch.stack(found["bf16"]), torch.stack(found["fp32"]))
