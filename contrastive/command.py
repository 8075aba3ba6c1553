"""`recforge train` of sequence recommenders; names that are no recipe of sequences are left to models of clicks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from contrastive.config import SequenceRunConfig
from contrastive.recipes import SequenceRecipe, find_recipe, list_recipes
from contrastive.run_checks import check_start
from dlrm import recipes
from dlrm.training import command as clicks
from dlrm.training import kind
from dlrm.training.kind import Kind

if TYPE_CHECKING:
    from contrastive.data.sequence_dataset import SequenceDataset
    from dlrm.distributed.place import Place
    from dlrm.distributed.process_group import Group
    from dlrm.training.trainer import Trainer


class SequenceRuns(Kind):
    """Recommenders of sequences, with or without contrast."""

    module = "contrastive"
    config = SequenceRunConfig

    @override
    def find(self, name: str) -> SequenceRecipe:
        return find_recipe(name)

    @override
    def usage(self) -> str:
        return "\n".join([clicks.CLICKS.usage(), "", "recipes for sequences:", *list_recipes()])

    @override
    def scale(self, config: SequenceRunConfig, place: Place) -> SequenceRunConfig:
        return clicks.scale_to_batch(config, place)

    @override
    def provide(self, recipe: SequenceRecipe, config: SequenceRunConfig, group: Group) -> SequenceDataset:
        from contrastive.data.provide_sequences import provide_sequences
        from contrastive.data.sequence_dataset import SEQUENCES, SequenceDataset

        check_start(config, recipe.config)
        if group.ranks.is_first:
            dataset = provide_sequences(config.schema, config.data, is_synthetic=recipe.is_synthetic)
            recipe.tell_doubt(config, dataset.rows("train"))
            group.store.set("dataset", str(dataset.folder.resolve()))
        else:
            folder = Path(group.wait_for("dataset"))
            is_prepared = config.data is not None and (config.data / SEQUENCES).is_file()
            dataset = SequenceDataset(config.data if is_prepared and config.data is not None else folder)
        group.check_alike({"data of the fingerprint": dataset.fingerprint}, "give all ranks the same --data")
        return dataset

    @override
    def build(self, name: str, config: SequenceRunConfig, output: Path, data: SequenceDataset, group: Group) -> Trainer:
        from contrastive.build import build_model, place_tables
        from contrastive.next_item import NextItem
        from dlrm.training.train_step import choose_device
        from dlrm.training.trainer import Trainer

        if group.ranks.is_first:
            clicks.tell_doubts(config, data)
            if config.step.device == "cpu":
                tell_idle_gpu("--step.device cuda trains encoders there")
        plan = place_tables(config, data, group.ranks) if group.ranks.count > 1 else None
        model = build_model(config, data, plan=plan, device=choose_device(config.step.device))
        return Trainer(model, NextItem(data, config), config, output, recipe=name, ranks=group.ranks)

    @override
    def describe(self, summary: dict[str, Any]) -> str:
        seen = "seen items left out" if summary["filter_seen"] else "seen items ranked too"
        trained = ", targets that training saw alone" if summary.get("skip_unseen_targets") else ""
        best = f" (best possible {summary['best_recall_10']:.4f})" if "best_recall_10" in summary else ""
        return (
            f"recall@10 {summary['recall_10']:.4f}{best}   ndcg@10 {summary['ndcg_10']:.4f}   "
            f"mrr@10 {summary['mrr_10']:.4f}   on the {summary['split']} split, all items ranked, {seen}{trained}\n"
            f"{summary['samples']:,} samples in {summary['seconds']:.1f} s ({summary['samples_per_second']:,.0f}/s), "
            f"{summary['stopped']}\n{summary['folder']}: `recforge report {summary['folder']}` makes a page of it, "
            f"`recforge recommend {summary['folder']} --user NAME` asks it"
        )


def tell_idle_gpu(why: str) -> None:
    """Print that a GPU has no part in the training, where there is one, and why."""
    import torch

    if torch.cuda.is_available():
        print(f"recforge: the GPU here is not used: {why}", file=sys.stderr)


SEQUENCES_RUNS = SequenceRuns()


def run_train(argv: list[str]) -> int:
    """Train what `argv` names: a recipe of sequences, or what models of clicks know."""
    of_clicks = argv and (argv[0] in recipes.RECIPES or recipes.is_file(argv[0]))
    return clicks.run_train(argv) if of_clicks else kind.run(SEQUENCES_RUNS, argv)
