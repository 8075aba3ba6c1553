"""With a large batch, clipped rows overfit less than rows whose rate follows the batch, as was published for CowClip.

Zheng et al. 2022, arXiv:2204.06240, on a small click log of ids of very different popularity, trained for some epochs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.optim.scaling_rules import ScaledGroup, ScalingRule
from embeddings import RowAdam, RowCowClip, TableConfig
from embeddings.local.local_tables import LocalTables
from embeddings.row_optimizers import RowOptimizer

FIELDS, ROWS, DIM = 4, 2000, 8
TRAIN, TEST, BATCH, EPOCHS = 8192, 4096, 512, 5
RATIO = 16  # to the batch that the rates were chosen for
RATE, DENSE_RATE, L2 = 3e-3, 1e-3, 1e-5
TABLES = ScaledGroup(name="tables", optimizer="adam")
LINEAR_RATE = RATE * ScalingRule(name="linear").multipliers(RATIO, TABLES).learning_rate


class Clicks(NamedTuple):
    ids: Tensor  # [samples, FIELDS]
    clicked: Tensor  # [samples] of 0 and 1

    def features(self, batch: Tensor) -> KeyedJaggedTensor:
        ids = self.ids[batch].T.flatten()
        return KeyedJaggedTensor(keys=[str(i) for i in range(FIELDS)], values=ids, lengths=torch.ones_like(ids))


def draw_clicks(seed: int) -> Clicks:
    """Draw ids by Zipf's law, and clicks by what the ids are worth alone and in pairs."""
    random = np.random.default_rng(seed)
    popularity = np.arange(1, ROWS + 1) ** -1.05
    ids = random.choice(ROWS, size=(TRAIN + TEST, FIELDS), p=popularity / popularity.sum())
    alone, paired = random.normal(scale=0.6, size=(FIELDS, ROWS)), random.normal(scale=0.6, size=(FIELDS, ROWS, 3))
    fields, vectors = np.arange(FIELDS), paired[np.arange(FIELDS), ids]
    logits = alone[fields, ids].sum(axis=1) + (vectors[:, ::2] * vectors[:, 1::2]).sum(axis=(1, 2)) - 1.3
    clicked = random.random(TRAIN + TEST) < 1 / (1 + np.exp(-logits))
    return Clicks(torch.from_numpy(ids), torch.from_numpy(clicked).float())


def train(rule: RowOptimizer, seed: int) -> list[float]:
    """Return the held-out logloss after every epoch."""
    clicks = draw_clicks(seed)
    configs = [TableConfig(name=str(i), num_rows=ROWS, dim=DIM, optimizer=rule, init_scale=0.01) for i in range(FIELDS)]
    tables = LocalTables(configs, seed=seed)
    torch.manual_seed(seed)
    top = nn.Sequential(nn.Linear(FIELDS * DIM, 32), nn.ReLU(), nn.Linear(32, 1))
    dense = ScalingRule(name="sqrt").multipliers(RATIO, ScaledGroup(name="dense", optimizer="adam"))
    optimizer = torch.optim.Adam(top.parameters(), DENSE_RATE * dense.learning_rate)

    def loss(batch: Tensor) -> Tensor:
        logits = top(tables(clicks.features(batch)).values())[:, 0]
        return nn.functional.binary_cross_entropy_with_logits(logits, clicks.clicked[batch])

    held_out = []
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAIN).split(BATCH):
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
        with torch.no_grad():
            held_out.append(float(loss(torch.arange(TRAIN, TRAIN + TEST))))
    return held_out


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clipped_rows_overfit_less_than_rows_at_a_linear_rate(seed: int) -> None:
    """As published: L2 in proportion to the batch, and the rate of the small one; then clipping and nothing else.

    Gradients of a mean loss are so short here that the published clip of 1 shortens hardly any; 1e-4 does.
    """
    m = ScalingRule(name="cowclip").multipliers(RATIO, TABLES)
    linear = train(RowAdam(learning_rate=LINEAR_RATE), seed)
    cow_clip = train(RowCowClip(learning_rate=RATE * m.learning_rate, l2=L2 * m.weight_decay), seed)
    clipped = train(RowCowClip(learning_rate=LINEAR_RATE, clip=1e-4, l2_mode="lazy"), seed)
    assert linear[-1] > min(linear) + 0.08
    assert cow_clip[-1] < min(cow_clip) + 0.04
    assert cow_clip[-1] < linear[-1] - 0.06
    assert min(cow_clip) < min(linear) + 0.003
    assert clipped[-1] < linear[-1] - 0.02
