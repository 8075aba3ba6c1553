"""Named recipes for sequences; `--data` and every flag override them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from contrastive.config import RankingEvaluationConfig, SequenceRunConfig
from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.mclrec_config import MclrecConfig
from dlrm import recipes as clicks
from dlrm.optim.lr_schedules import Schedule
from dlrm.optim.schedule_text import parse_formula

_SCHEDULES = ("tables_schedule", "dense_schedule")
BEAUTY_SAMPLES = 131_413  # of an epoch: all actions but each user's first one and last two


@dataclass(frozen=True, kw_only=True)
class SequenceRecipe:
    """What `recforge train NAME` runs.

    Attributes:
        help: one line for the list of recipes.
        config: of the run.
        is_synthetic: whether data are generated where none are named.
        epoch_samples: of the data that its schedules are written for; None where they fit any.
    """

    help: str
    config: SequenceRunConfig
    is_synthetic: bool = False
    epoch_samples: int | None = None

    def tell_doubt(self, config: SequenceRunConfig, rows: int) -> None:
        """Print it where a run is of another length than the recipe, and keeps its schedules.

        Args:
            config: of the run.
            rows: of its training split.
        """
        if self.epoch_samples is None:
            return
        own = self.config
        stretch = config.epochs * rows / (own.epochs * self.epoch_samples)
        kept = [name for name in _SCHEDULES if getattr(config, name).shape == getattr(own, name).shape]
        if not kept or abs(stretch - 1) < 0.01:
            return
        shapes = [str(parse_formula(getattr(own, name).shape).stretch(stretch)) for name in kept]
        flags = [f"--{name.replace('_', '-')}.shape '{shape}'" for name, shape in zip(kept, shapes, strict=True)]
        print(
            f"recforge: warning: this recipe's rates are for {own.epochs:g} epochs of {self.epoch_samples:,} samples, "
            f"and this run has {config.epochs:g} of {rows:,}; its own would be {' '.join(flags)}",
            file=sys.stderr,
        )


def _mclrec(views_weight: float, beta: float, dropout: float = 0.5) -> SequenceRunConfig:
    """Return the settings of MCLRec's published code: weights of both contrasts, and dropout."""
    return SequenceRunConfig(
        encoder=EncoderConfig(dropout=dropout, attention_dropout=dropout),
        mclrec=MclrecConfig(views_weight=views_weight, beta=beta),
    )


def _fall(config: SequenceRunConfig, epochs: int, fall_epochs: int, samples: int) -> SequenceRunConfig:
    """Return a run of so many epochs of `samples`, in whose last ones rates fall along half a cosine to a hundredth."""
    start, length = (epochs - fall_epochs) * samples, fall_epochs * samples
    rates = Schedule(shape=f"cosine({length}, start={start}, end=0.01)")
    return replace(
        config,
        epochs=epochs,
        dense_schedule=rates,
        tables_schedule=rates,
        evaluation=RankingEvaluationConfig(patience=None),  # the best epochs are the last ones
    )


# Weights are those of the published scripts; that of Toys passes the name of the data of Beauty, and may be a slip.
RECIPES: dict[str, SequenceRecipe] = {
    "mclrec-synthetic": SequenceRecipe(
        help="MCLRec on sequences of our own making; needs no data",
        config=replace(_mclrec(0.0, 0.05, 0.2), epochs=20, evaluation=RankingEvaluationConfig(patience=5)),
        is_synthetic=True,
    ),
    "mclrec": SequenceRecipe(help="MCLRec on your own sequences (--data, --schema)", config=_mclrec(0.0, 0.05)),
    "mclrec-beauty": SequenceRecipe(
        help="MCLRec, as published for Amazon Beauty, but that rates fall after 28 of 34 epochs",
        config=_fall(_mclrec(0.0, 0.05), epochs=34, fall_epochs=6, samples=BEAUTY_SAMPLES),
        epoch_samples=BEAUTY_SAMPLES,
    ),
    "mclrec-toys": SequenceRecipe(help="MCLRec, as published for Amazon Toys", config=_mclrec(0.01, 0.1)),
    "mclrec-sports": SequenceRecipe(help="MCLRec, as published for Amazon Sports", config=_mclrec(0.04, 0.4)),
    "mclrec-yelp": SequenceRecipe(help="MCLRec, as published for Yelp", config=_mclrec(0.03, 0.1)),
    "sasrec": SequenceRecipe(
        help="SASRec with a softmax over all items: a strong baseline",
        config=SequenceRunConfig(mclrec=MclrecConfig(contrast="none")),
    ),
    "bsarec": SequenceRecipe(
        help="BSARec: frequency filters beside attention",
        config=SequenceRunConfig(encoder=EncoderConfig(kind="bsarec"), mclrec=MclrecConfig(contrast="none")),
    ),
    "cl4srec": SequenceRecipe(
        help="CL4SRec: SASRec, and a contrast between augmented histories",
        config=SequenceRunConfig(mclrec=MclrecConfig(contrast="views", views_weight=0.1)),
    ),
}


def find_recipe(name: str) -> SequenceRecipe:
    """Return the recipe of a name.

    Raises:
        ValueError: there is none, nor one of clicks, as whoever mistyped it may have meant.
    """
    if name not in RECIPES:
        raise ValueError(
            f"expected a recipe ({', '.join(clicks.RECIPES)}, or of sequences {', '.join(RECIPES)}) or a configuration "
            f"file (*.toml), got '{name}'"
        )
    return RECIPES[name]


def list_recipes() -> list[str]:
    """Return a line per recipe: its name and what it is."""
    width = max(map(len, RECIPES))
    return [f"  {name:{width}}  {recipe.help}" for name, recipe in RECIPES.items()]
