"""Operators by name: ours with a run's shares, and those of a user, which then make the views that a run trains on."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from contrastive.augment.build import build_operators
from contrastive.augment.draws import Draws
from contrastive.augment.operators import Crop, Mask, Reorder
from contrastive.config import SequenceConfig, SequenceRunConfig
from contrastive.data.ragged import Ragged
from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, generate_sequences
from contrastive.mclrec_config import MclrecConfig
from contrastive.next_item import NextItem

MODULE = "operators_of_my_own"


class Repeat:
    """Says the last item twice, for the one before it."""

    def __call__(self, histories: Ragged, draws: Draws) -> Ragged:
        items, last = histories.items.copy(), histories.firsts + histories.lengths - 1
        items[last - 1] = items[last]
        return Ragged(items, histories.lengths)


def reverse(histories: Ragged, draws: Draws) -> Ragged:
    parts = np.split(histories.items, histories.firsts[1:])
    return Ragged(np.concatenate([part[::-1] for part in parts]), histories.lengths)


class Shy:
    """Cannot be made without arguments."""

    def __init__(self, share: float) -> None:
        self.share = share


NOTHING = 3


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE, sys.modules[__name__])


def test_ours_have_the_shares_of_the_configuration() -> None:
    assert build_operators(SequenceConfig()) == (Crop(0.5), Mask(0.5), Reorder(0.8))
    config = SequenceConfig(operators=("reorder", "crop"), crop=0.2, reorder=1.0)
    assert build_operators(config) == (Reorder(1.0), Crop(0.2))
    assert build_operators(SequenceConfig(operators=())) == ()


@pytest.mark.usefixtures("own")
def test_a_run_s_views_are_made_by_operators_of_a_user(tmp_path: Path) -> None:
    few = SyntheticSequencesConfig(num_users=30, num_items=40, num_tastes=4, most_actions=20)
    dataset = generate_sequences(few, tmp_path / "data")
    sequence = SequenceConfig(operators=(f"{MODULE}:Repeat", f"{MODULE}:reverse"))
    config = SequenceRunConfig(mclrec=MclrecConfig(contrast="views", views_weight=0.1), sequence=sequence)
    batch = NextItem(dataset, config).reader("train", config).read(0, 60)
    lengths = batch.history.lengths.tolist()
    histories, *views = (each.places.split(lengths) for each in (batch.history, *batch.views))
    found = set()
    for history, *both in zip(histories, *views, strict=True):
        repeated, reversed_ = [*history[:-2], history[-1], history[-1]][-len(history) :], history.flip(0).tolist()
        made = [view.tolist() for view in both]
        assert made in ([repeated, reversed_], [reversed_, repeated]) or len(history) == 1
        found.add(made.index(reversed_))
    assert found == {0, 1}


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_such_package.here:Thing", "No module named 'no_such_package'"),
        (f"{MODULE}:Nothing", "has no attribute 'Nothing'"),
        (f"{MODULE}:Shy", "missing 1 required positional argument"),
        (f"{MODULE}:NOTHING", "which cannot be called"),
    ],
)
def test_a_name_of_no_operator_is_told(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=rf"^--sequence\.operators: expected .*, got '{name}'.*{told}"):
        build_operators(SequenceConfig(operators=(name,)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"operators": ("crop", "insert")}, r"--sequence\.operators: expected crop, mask, reorder or .*, got 'insert'"),
        ({"reorder": 1.1}, r"--sequence\.reorder: expected a share in \[0, 1\], got 1\.1"),
        ({"crop": 1.0}, r"--sequence\.crop: expected a share in \[0, 1\), got 1\.0"),
        ({"mask": -0.1}, r"--sequence\.mask: expected a share in \[0, 1\), got -0\.1"),
    ],
)
def test_what_cannot_be_is_told_at_once(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceConfig(**settings)
