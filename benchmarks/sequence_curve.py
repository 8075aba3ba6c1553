"""How good is a recommender of sequences on the test split after each epoch, seen items ranked too?

It is for comparing curves with those of other implementations, which are of the test split. A run of `recforge train`
measures the valid split after each epoch, and the test split once: what chooses a checkpoint must not judge it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from typing_extensions import override

from contrastive.build import build_model
from contrastive.data.provide_sequences import provide_sequences
from contrastive.data.sequence_reader import SequenceReader
from contrastive.next_item import NextItem
from contrastive.recipes import RECIPES
from dlrm.config import TrainingConfig
from dlrm.training.run_log import read_records
from dlrm.training.trainer import Trainer

METRICS = ("recall_10", "ndcg_10", "recall_20", "ndcg_20")


class NextItemOfTest(NextItem):
    """The next item, measured on the test split where the valid one is asked for."""

    @override
    def reader(self, split: str, config: TrainingConfig) -> SequenceReader:
        return super().reader("test" if split == "valid" else split, config)


def main() -> None:
    """Train, and print one JSON object: a list of values for each metric, one for each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="sequences, as `recforge train` takes them; none are generated ones")
    parser.add_argument("--recipe", choices=RECIPES, default="sasrec")
    parser.add_argument("--epochs", type=int, default=11)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = RECIPES[arguments.recipe].config
    config = replace(recipe, epochs=arguments.epochs, seed=arguments.seed)
    dataset = provide_sequences(config.schema, arguments.data, is_synthetic=True)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        Trainer(build_model(config, dataset), NextItemOfTest(dataset, config), config, output).fit()
        measured = [record for record in read_records(output) if record["kind"] == "valid"]
    print(json.dumps({name: [round(record[name], 4) for record in measured] for name in METRICS}))


if __name__ == "__main__":
    main()
