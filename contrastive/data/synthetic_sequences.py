"""Sequences of our own making: training needs no download, and the best ranking any model can reach is known.

Each user goes from item to item: often to a successor of the last one, else to something of the user's taste, now and
then to anything; never twice to the same. Who knows the last item and the taste of the user knows all there is to know.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from contrastive.data.item_features import ItemFeature
from contrastive.data.prepare_sequences import is_prepared, write_sequences
from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.data.sequence_schema import LEAST_ACTIONS, SequenceSchema
from contrastive.data.sequences import SequenceData
from dlrm.data.dataset import Array, Bags, IntArray
from dlrm.data.schema import FIRST_ID_ROW

SUCCESSORS = (0.6, 0.3, 0.1)  # shares of an item's three successors
MAIN_TASTE = 0.8  # share of the first of a user's two tastes
DAYS = 100.0
USERS_AT_A_TIME = 500


@dataclass(frozen=True, kw_only=True)
class SyntheticSequencesConfig:
    """How many sequences to make, and of what kind.

    Attributes:
        num_users: users.
        num_items: items of the catalogue.
        num_tastes: groups of items; each user likes two.
        mean_actions: of a user, all of whom have three at least.
        most_actions: of a user.
        follow: how often the next item is a successor of the last one.
        like: how often it is something of the user's taste; what remains is anything.
        seed: of everything; equal configurations give equal bytes, with the same numpy.
    """

    num_users: int = 3_000
    num_items: int = 400
    num_tastes: int = 8
    mean_actions: float = 9.0
    most_actions: int = 40
    follow: float = 0.6
    like: float = 0.35
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_users < 1 or not 2 <= self.num_tastes <= self.num_items:
            raise ValueError(
                f"SyntheticSequencesConfig: expected users, and 2 <= num_tastes <= num_items, got {self.num_users} "
                f"users, {self.num_tastes} tastes, {self.num_items} items"
            )
        if not LEAST_ACTIONS <= self.mean_actions <= self.most_actions <= self.num_items // 2:
            raise ValueError(
                f"SyntheticSequencesConfig: expected {LEAST_ACTIONS} <= mean_actions <= most_actions <= num_items / 2, "
                f"got {self.mean_actions}, {self.most_actions} and {self.num_items} items"
            )
        if min(self.follow, self.like) < 0 or self.follow + self.like >= 1:
            raise ValueError(f"SyntheticSequencesConfig: expected follow + like < 1, got {self.follow} and {self.like}")


def generate_sequences(
    config: SyntheticSequencesConfig, out: Path | str, schema: SequenceSchema | None = None
) -> SequenceDataset:
    """Write synthetic sequences as prepared ones, or open them if they are there already.

    The items' groups are a side feature, `taste`, and actions have times, in days.

    Args:
        config: what to generate.
        out: folder to write.
        schema: whose `split` and `min_actions` count.

    Raises:
        ValueError: `out` holds other sequences, or the schema says what has no effect.
    """
    out, schema = Path(out), schema or SequenceSchema()
    schema.check_used()
    origin = json.loads(json.dumps({"synthetic": asdict(config), "schema": asdict(schema)}))
    if is_prepared(out, origin):
        return SequenceDataset(out)
    world = SyntheticWorld(config)
    return write_sequences(world.draw(), schema, out, origin, (world.describe_items(),))


class SyntheticWorld:
    """What is true of users and items: all of it a pure function of the configuration.

    Args:
        config: sizes, shares and seed.
    """

    def __init__(self, config: SyntheticSequencesConfig) -> None:
        self.config = config
        rng = np.random.default_rng([config.seed, 0])
        items = config.num_items
        self.group_of: IntArray = rng.permutation(items) % config.num_tastes
        """[num_items], the group of item id - 1."""
        self.successors: IntArray = np.stack([rng.permutation(items) for _ in SUCCESSORS], axis=1)
        """[num_items, 3], counted from 0."""
        popularity = rng.permutation(1 / np.arange(3, items + 3))
        self._any = popularity / popularity.sum()
        liked = np.where(self.group_of == np.arange(config.num_tastes)[:, None], popularity, 0)
        self._liked = liked / liked.sum(axis=1, keepdims=True)
        self.tastes: IntArray = np.stack([rng.permuted(np.arange(config.num_tastes)) for _ in range(config.num_users)])[
            :, :2
        ]
        """[num_users, 2], the groups that a user likes, the first one more."""

    @staticmethod
    def of(dataset: SequenceDataset) -> SyntheticWorld | None:
        """Return the world that sequences were drawn from; None for those of people."""
        config = dataset.info.origin.get("synthetic")
        return None if config is None else SyntheticWorld(SyntheticSequencesConfig(**config))

    def probabilities(self, users: IntArray, last: IntArray, seen: Array) -> Array:
        """Return [B, num_items], how likely each item is to be a user's next one.

        Args:
            users: [B], numbers.
            last: [B], the item before, counted from 0; -1 where there is none.
            seen: [B, num_items] bool, which the user has had.
        """
        config = self.config
        first, second = self.tastes[users].T
        liked = MAIN_TASTE * self._liked[first] + (1 - MAIN_TASTE) * self._liked[second]
        odds = config.like * liked + (1 - config.like - config.follow) * self._any
        begun = np.flatnonzero(last >= 0)
        for place, share in enumerate(SUCCESSORS):
            odds[begun, self.successors[last[begun], place]] += config.follow * share
        odds[seen] = 0
        shares: Array = odds / odds.sum(axis=1, keepdims=True)
        return shares

    def draw(self) -> SequenceData:
        """Return the actions of all users."""
        config, rng = self.config, np.random.default_rng([self.config.seed, 1])
        beyond = rng.geometric(1 / (config.mean_actions - LEAST_ACTIONS + 1), config.num_users) - 1
        lengths = np.minimum(LEAST_ACTIONS + beyond, config.most_actions)
        starts = range(0, config.num_users, USERS_AT_A_TIME)
        actions = [
            self._walk(rng, np.arange(start, min(start + USERS_AT_A_TIME, config.num_users)), lengths)
            for start in starts
        ]
        first_day, gaps = rng.random(config.num_users) * DAYS, rng.exponential(1.0, int(lengths.sum()))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        walked = np.cumsum(gaps)
        times = np.repeat(first_day - walked[offsets[:-1]], lengths) + walked
        return SequenceData(
            users=pa.array([f"user-{number}" for number in range(config.num_users)], pa.large_string()),
            items=pa.array([f"item-{number}" for number in range(1, config.num_items + 1)], pa.large_string()),
            offsets=offsets,
            actions=np.concatenate(actions) + 1,
            times=times,
        )

    def _walk(self, rng: np.random.Generator, users: IntArray, all_lengths: IntArray) -> IntArray:
        """Return the items of some users, one user after the other, counted from 0."""
        lengths = all_lengths[users]
        paths = np.full((len(users), int(lengths.max())), -1)
        seen = np.zeros((len(users), self.config.num_items), dtype=bool)
        for step in range(paths.shape[1]):
            going = np.flatnonzero(lengths > step)
            last = paths[going, step - 1] if step else np.full(len(going), -1)
            bounds = np.cumsum(self.probabilities(users[going], last, seen[going]), axis=1)
            # the sum of all may be a hair less than 1
            drawn = (bounds < rng.random((len(going), 1)) * bounds[:, -1:]).sum(axis=1)
            paths[going, step], seen[going, drawn] = drawn, True
        walked: IntArray = paths[paths >= 0]
        return walked

    def describe_items(self) -> ItemFeature:
        """Return the groups of the items, as a feature."""
        tastes = self.config.num_tastes
        offsets = np.concatenate([[0], np.arange(self.config.num_items + 1)])
        return ItemFeature(
            name="taste",
            num_rows=FIRST_ID_ROW + tastes,
            bags=Bags(offsets=offsets, values=self.group_of + FIRST_ID_ROW),
            values=tuple(f"taste-{number}" for number in range(tastes)),
        )

    def best_ranks(self, dataset: SequenceDataset, split: str) -> IntArray:
        """Return [samples], how many unseen items are likelier than the target of each sample: no model does better.

        Args:
            dataset: the sequences of this world.
            split: valid or test.
        """
        ranks = []
        for start in range(0, dataset.rows(split), USERS_AT_A_TIME):
            rows = np.arange(start, min(start + USERS_AT_A_TIME, dataset.rows(split)))
            histories, targets, users = dataset.samples(split, rows)
            seen = np.zeros((len(rows), self.config.num_items), dtype=bool)
            seen[np.repeat(np.arange(len(rows)), histories.lengths), histories.items - 1] = True
            last = histories.items[np.cumsum(histories.lengths) - 1] - 1
            shares = self.probabilities(users, last, seen)
            ranks.append((shares > shares[np.arange(len(rows)), targets - 1][:, None]).sum(axis=1))
        return np.concatenate(ranks)
