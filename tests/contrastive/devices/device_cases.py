"""Trains sequences of each kind on a device; as a program, on the pretended GPU (arguments: sequences, output)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from contrastive.build import build_model
from contrastive.config import RankingEvaluationConfig, SequenceConfig, SequenceRunConfig
from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.mclrec_config import MclrecConfig
from contrastive.next_item import NextItem
from dlrm.config import CheckpointConfig, GuardConfig, StepConfig
from dlrm.training.run_log import read_records
from dlrm.training.trainer import Trainer

# Without dropout, whose numbers other devices draw otherwise.
ENCODER = EncoderConfig(inner=32, dropout=0.0, attention_dropout=0.0, kernels="torch")
SMALL = SequenceRunConfig(
    epochs=2,
    dim=16,
    log_every_samples=128,
    encoder=ENCODER,
    mclrec=MclrecConfig(augmenter_widths=(8,), views_weight=0.1),
    step=StepConfig(global_batch_size=128, threads=1),
    evaluation=RankingEvaluationConfig(batch_size=64),
    checkpoint=CheckpointConfig(every_samples=500),
    guards=GuardConfig(chance_evaluations=0),  # so little is not learned
)
CASES: dict[str, SequenceRunConfig] = {
    "mclrec": SMALL,
    "second-order": replace(SMALL, mclrec=replace(SMALL.mclrec, second_order=True)),
    "two-step-paper": replace(SMALL, mclrec=replace(SMALL.mclrec, form="two_step", regulariser="paper")),
    "memory": replace(SMALL, mclrec=MclrecConfig(contrast="memory", memory_size=512, views_weight=0.1)),
    "bsarec": replace(SMALL, encoder=replace(ENCODER, kind="bsarec"), mclrec=MclrecConfig(contrast="none")),
    "gru4rec": replace(SMALL, encoder=replace(ENCODER, kind="gru4rec"), mclrec=MclrecConfig(contrast="none")),
    "negatives": replace(
        SMALL,
        sequence=SequenceConfig(negatives=20, second_view="same_target"),
        mclrec=MclrecConfig(contrast="views", views_weight=0.1),
    ),
    "dropout": replace(SMALL, encoder=replace(ENCODER, kernels="auto", dropout=0.3, attention_dropout=0.3)),
}


def main(data: str, output: str) -> None:
    """Train on the pretended GPU all cases but recurrent ones, and print what each came to."""
    from pretended_gpu import NAME, pretended_gpu  # here, as a real GPU has no need of it

    with (
        pretended_gpu() as device,
        # CUDA's streams and pinned memory are what this device has not.
        mock.patch("dlrm.training.look_ahead.copy_ahead", copy_here),
        mock.patch.dict("contrastive.encoders.jagged._BUCKET_TOKENS", {NAME: 4096}),
    ):
        cases = {case: config for case, config in CASES.items() if config.encoder.kind != "gru4rec"}
        found = {case: train(device, Path(data), Path(output) / case, config) for case, config in cases.items()}
    print(json.dumps(found))


def copy_here(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """Give batches on the device, copied by the thread that trains."""
    return (None if batch is None else batch.to(device) for batch in batches)


def train(device: torch.device, data: Path, output: Path, config: SequenceRunConfig) -> dict[str, Any]:
    """Train half of a run, and the rest as one that goes on; return the losses of all steps, and test metrics."""
    dataset = SequenceDataset(data)
    summary: dict[str, Any] = {}
    for epochs in (1.0, config.epochs):
        own = replace(config, epochs=epochs)
        model = build_model(own, dataset, device=device)
        trainer = Trainer(model, NextItem(dataset, own), own, output)
        assert {parameter.device.type for parameter in trainer.model.parameters()} == {device.type}
        summary = trainer.fit()
    losses = [record["loss"] for record in read_records(output) if record["kind"] == "train"]
    return {"losses": losses, "ranked": summary["ranked"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
