"""The prepared sequences: a folder of memory-mapped Arrow files, and the description that makes sense of them.

- `sequences.json`: what there is, and the checksum of each file.
- `users.arrow`: a row per user: name, where the actions begin, and which of them are the targets of each split.
- `actions.arrow`: a row per action, user by user, the oldest first: the item's id, and the time where it is known.
- `items.arrow`: a row per id, 0 (PAD) to num_items: name, how often it occurs in training, rows of the side features.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from contrastive.data.ragged import Ragged, spans
from contrastive.data.sequences import ITEM, PAD
from dlrm.data.dataset import Array, Bags, FeatureInfo, IntArray, checksum
from dlrm.data.info_file import read_info
from dlrm.data.splits import SPLITS

FORMAT_VERSION = 1
SEQUENCES = "sequences.json"
AGAIN = "prepare the sequences again: delete the folder, and name their files by --data"
USERS, ACTIONS, ITEMS = "users.arrow", "actions.arrow", "items.arrow"


@dataclass(frozen=True, kw_only=True)
class SequenceInfo:
    """The contents of `sequences.json`.

    Attributes:
        num_users: users, also those without samples.
        num_items: items of the catalogue, without PAD.
        num_actions: actions of all users.
        samples: of each split.
        unseen_targets: of each split, samples whose target does not occur in training.
        users_left_out: users with too few actions for any sample.
        sides: side features of items.
        has_times: whether actions have times.
        files: checksum of each file.
        origin: where the sequences came from and how they were divided.
    """

    num_users: int
    num_items: int
    num_actions: int
    samples: dict[str, int]
    unseen_targets: dict[str, int]
    users_left_out: int = 0
    sides: tuple[FeatureInfo, ...] = ()
    has_times: bool = False
    files: dict[str, str] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def features(self) -> tuple[FeatureInfo, ...]:
        """What tables look up: the item, and its side features."""
        return (FeatureInfo(name=ITEM, num_rows=self.num_items + 1), *self.sides)

    def write(self, folder: Path) -> None:
        """Write `sequences.json`."""
        (folder / SEQUENCES).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


class Samples(NamedTuple):
    """Rows of a split: `histories` of ids (PAD where nothing came before), `targets` [B], and whose they are, [B]."""

    histories: Ragged
    targets: IntArray
    users: IntArray


class SequenceDataset:
    """Prepared sequences, opened for reading.

    Args:
        folder: what `prepare_sequences` wrote.

    Raises:
        ValueError: the folder holds no prepared sequences, or they are of another format version or damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.info = read_info(
            self.folder / SEQUENCES,
            SequenceInfo,
            FORMAT_VERSION,
            expected="prepared sequences",
            remedy=AGAIN,
        )
        users, actions = self._open(USERS, self.info.num_users), self._open(ACTIONS, self.info.num_actions)
        self._items = self._open(ITEMS, self.info.num_items + 1)
        self._names: pa.LargeStringArray = users["user"]
        self.first_actions: IntArray = users["first_action"].to_numpy()
        """[num_users], where a user's actions begin."""
        self.lengths: IntArray = users["actions"].to_numpy()
        """[num_users], actions of each user."""
        self.actions: IntArray = actions["item"].to_numpy()
        """[num_actions], ids of items."""
        self.times: Array | None = actions["time"].to_numpy() if self.info.has_times else None
        """[num_actions], ascending for each user; None where only the order is known."""
        self._targets = {split: users[f"{split}_target"].to_numpy() for split in SPLITS}
        self._ends = {split: np.cumsum(users[f"{split}_samples"].to_numpy()) for split in SPLITS}

    def rows(self, split: str) -> int:
        """Return the number of samples of a split; 0 if there is no such split."""
        return self.info.samples.get(split, 0)

    @property
    def num_items(self) -> int:
        """Items of the catalogue; their ids are 1 ... num_items, and 0 is PAD."""
        return self.info.num_items

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of the description, which holds every file's: sequences that agree in it are the same."""
        return xxhash.xxh3_128((self.folder / SEQUENCES).read_bytes()).hexdigest()

    @cached_property
    def item_counts(self) -> IntArray:
        """[num_items + 1], how often each id occurs in the training part, as input or target; 0 for PAD."""
        counts: IntArray = self._items["train_count"].to_numpy()
        return counts

    @cached_property
    def sides(self) -> dict[str, Bags]:
        """Bags of table rows of each id, 0 ... num_items, for every side feature."""
        columns = {side.name: self._items[side.name] for side in self.info.sides}
        return {name: Bags(offsets=c.offsets.to_numpy(), values=c.values.to_numpy()) for name, c in columns.items()}

    def positions(self, split: str, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Return the user of each sample, and which of all actions is its target."""
        ends = self._ends[split]
        users = np.searchsorted(ends, rows, side="right")
        first = self.first_actions[users] + self._targets[split][users]
        before = np.where(users > 0, ends[users - 1], 0)
        return users, first + (rows - before)

    def targets(self, split: str, rows: IntArray) -> IntArray:
        """Return [B], the ids of the items which came next."""
        return self.actions[self.positions(split, rows)[1]].astype(np.int64)

    def samples(self, split: str, rows: IntArray, max_length: int | None = None) -> Samples:
        """Return samples of a split.

        Args:
            split: train, valid or test.
            rows: [B], which of its samples.
            max_length: of a history, of which the latest actions are kept; None keeps all, as to see what is known.
        """
        users, targets = self.positions(split, rows)
        lengths = targets - self.first_actions[users]
        if max_length is not None:
            lengths = np.minimum(lengths, max_length)
        histories = Ragged(self.actions[spans(targets - lengths, lengths)].astype(np.int64), lengths)
        return Samples(histories.filled(PAD), self.actions[targets].astype(np.int64), users)

    def histories(self, users: IntArray, max_length: int | None = None) -> Ragged:
        """Return all actions of users, or the latest `max_length`: what there is to recommend from."""
        lengths = self.lengths[users]
        if max_length is not None:
            lengths = np.minimum(lengths, max_length)
        ends = self.first_actions[users] + self.lengths[users]
        return Ragged(self.actions[spans(ends - lengths, lengths)].astype(np.int64), lengths)

    def without_unseen(self, histories: Ragged) -> Ragged:
        """Return histories without items that the training part lacks; the latest one stays where there is no other."""
        items, lengths = histories
        is_kept = self.item_counts[items] > 0
        lists = np.repeat(np.arange(len(lengths)), lengths)
        is_lost = np.bincount(lists[is_kept], minlength=len(lengths)) == 0
        is_kept[(np.cumsum(lengths) - 1)[is_lost & (lengths > 0)]] = True
        return Ragged(items[is_kept], np.bincount(lists[is_kept], minlength=len(lengths)))

    def user_name(self, user: int) -> str:
        """Return the name of a user by number."""
        name: str = self._names[user].as_py()
        return name

    def item_name(self, item: int) -> str:
        """Return the name of an item by id."""
        name: str = self._items["item"][item].as_py()
        return name

    def find_user(self, name: str) -> int:
        """Return the number of a user.

        Raises:
            ValueError: there is no such user.
        """
        found = int(pc.index(self._names, pa.scalar(name, pa.large_string())).as_py())
        if found < 0:
            example = self.user_name(0)
            raise ValueError(
                f"--user: expected one of the {self.info.num_users:,} users (like '{example}'), got '{name}'"
            )
        return found

    def find_item(self, name: str) -> int:
        """Return the id of an item.

        Raises:
            ValueError: there is no such item in the catalogue.
        """
        found = int(pc.index(self._items["item"], pa.scalar(name, pa.large_string())).as_py())
        if found < 0:
            example = self.item_name(1)
            raise ValueError(f"--item: expected one of the {self.num_items:,} items (like '{example}'), got '{name}'")
        return found

    def verify(self) -> None:
        """Read every file and compare checksums.

        Raises:
            ValueError: the bytes of a file are not those that were written; it is named.
        """
        for name, expected in self.info.files.items():
            path = self.folder / name
            if not path.is_file() or checksum(path) != expected:
                raise ValueError(f"{path} is not what was written (checksum); {AGAIN}")

    def _open(self, name: str, rows: int) -> pa.RecordBatch:
        path = self.folder / name
        try:
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{path} cannot be read ({error}); {AGAIN}") from error
        if batch.num_rows != rows:
            raise ValueError(f"{path}: expected {rows} rows, got {batch.num_rows}; {AGAIN}")
        return batch
