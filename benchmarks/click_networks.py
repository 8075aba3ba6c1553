"""One click network, three times: ours, written the plain way, and torchrec's own; with batches for each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch as TorchrecBatch
from torchrec.models.dlrm import DLRM as TorchrecDLRM
from torchrec.models.dlrm import DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad as TorchrecRowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.batch import Batch
from dlrm.model import DLRM
from dlrm.training.train_step import ClickTask, TrainStep
from embeddings import RowWiseAdagrad, TableConfig

BATCH_SIZE = 4096
NUM_NUMERIC = 13
NUM_TABLES = 26
NUM_ROWS = 100_000
DIM = 64
BOTTOM = [256, 128, DIM]
TOP = [256, 128, 1]
LEARNING_RATE = 0.01
NAMES = [f"C{i + 1}" for i in range(NUM_TABLES)]
LONGEST_BAG = 32
# Bags are min(geometric, 32) ids long: 8.0 on average.
BAG_END_PROBABILITY = 0.1231

Step = Callable[[int], float]  # trains on the batch of that number and gives the loss


@dataclass(frozen=True, kw_only=True)
class Ids:
    """A batch as it comes out of a reader."""

    dense: Tensor
    values: Tensor
    lengths: Tensor
    labels: Tensor

    def keyed(self) -> KeyedJaggedTensor:
        """Make what tables take; anew for each step, as a reader would, because it remembers its offsets."""
        return KeyedJaggedTensor(keys=NAMES, values=self.values, lengths=self.lengths)


def draw_batches(count: int, *, multi_hot: bool) -> list[Ids]:
    """Draw uniform ids, the kindest to nobody's cache: one per bag, or 1 to 32."""
    random = np.random.default_rng(0)
    batches = []
    for _ in range(count):
        bags = NUM_TABLES * BATCH_SIZE
        lengths = np.ones(bags, dtype=np.int64)
        if multi_hot:
            lengths = np.minimum(random.geometric(BAG_END_PROBABILITY, bags), LONGEST_BAG)
        batches.append(
            Ids(
                dense=torch.from_numpy(random.standard_normal((BATCH_SIZE, NUM_NUMERIC), dtype=np.float32)),
                values=torch.from_numpy(random.integers(0, NUM_ROWS, lengths.sum())),
                lengths=torch.from_numpy(lengths),
                labels=torch.from_numpy(random.integers(0, 2, BATCH_SIZE).astype(np.float32)),
            )
        )
    return batches


def build_steps(batches: list[Ids]) -> Iterator[tuple[str, Step]]:
    """Build the three networks with their optimizers; each is named."""
    yield "ours", _build_ours(batches)
    yield "plain", _build_plain(batches)
    yield "torchrec", _build_torchrec(batches)


def _build_ours(batches: list[Ids]) -> Step:
    optimizer = RowWiseAdagrad(learning_rate=LEARNING_RATE)
    model = DLRM(
        num_numeric=NUM_NUMERIC,
        tables=[TableConfig(name=name, num_rows=NUM_ROWS, dim=DIM, optimizer=optimizer) for name in NAMES],
        dim=DIM,
        bottom=BOTTOM[:-1],
        top=TOP[:-1],
    )
    dense_optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    step = TrainStep(ClickTask(model), dense_optimizer, split="benchmark")
    rows = torch.arange(BATCH_SIZE)

    def train(number: int) -> float:
        ids = batches[number % len(batches)]
        batch = Batch(dense=ids.dense, sparse=ids.keyed(), labels=ids.labels, rows=rows)
        return step(batch, (number + 1) * BATCH_SIZE)

    return train


class PlainNetwork(nn.Module):
    """The network as torch's documentation would have it."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(NUM_ROWS, DIM, mode="sum", sparse=True) for _ in range(NUM_TABLES))
        self.bottom = _layers([NUM_NUMERIC, *BOTTOM], last_is_linear=False)
        vectors = NUM_TABLES + 1
        self.top = _layers([DIM + vectors * (vectors - 1) // 2, *TOP], last_is_linear=True)
        self.pairs = torch.tril_indices(vectors, vectors, offset=-1)

    def forward(self, dense: Tensor, bags: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Give logits [B]."""
        bottom = self.bottom(dense)
        pooled = [table(ids, offsets) for table, (ids, offsets) in zip(self.tables, bags, strict=True)]
        vectors = torch.stack([bottom, *pooled], dim=1)
        products = torch.bmm(vectors, vectors.mT)[:, self.pairs[0], self.pairs[1]]
        logits: Tensor = self.top(torch.cat([bottom, products], dim=1)).squeeze(-1)
        return logits


def _build_plain(batches: list[Ids]) -> Step:
    network = PlainNetwork()
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
    # Its collate function has done this before the step.
    bags = [_split_bags(ids) for ids in batches]

    def train(number: int) -> float:
        place = number % len(batches)
        logits = network(batches[place].dense, bags[place])
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batches[place].labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return train


def _split_bags(ids: Ids) -> list[tuple[Tensor, Tensor]]:
    lengths = ids.lengths.view(NUM_TABLES, BATCH_SIZE)
    parts = ids.values.split(lengths.sum(dim=1).tolist())
    return [(part, own.cumsum(0) - own) for part, own in zip(parts, lengths, strict=True)]


def _build_torchrec(batches: list[Ids]) -> Step:
    tables = FusedEmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=name, embedding_dim=DIM, num_embeddings=NUM_ROWS, feature_names=[name])
            for name in NAMES
        ],
        optimizer_type=TorchrecRowWiseAdagrad,
        optimizer_kwargs={"lr": LEARNING_RATE},
        device=torch.device("cpu"),
    )
    task = DLRMTrain(TorchrecDLRM(tables, NUM_NUMERIC, BOTTOM, TOP))
    fused = {id(parameter) for parameter in tables.parameters()}
    dense = [parameter for parameter in task.parameters() if id(parameter) not in fused]
    optimizer = torch.optim.SGD(dense, lr=LEARNING_RATE)

    def train(number: int) -> float:
        ids = batches[number % len(batches)]
        batch = TorchrecBatch(dense_features=ids.dense, sparse_features=ids.keyed(), labels=ids.labels)
        loss, _ = task(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return train


def _layers(widths: list[int], *, last_is_linear: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[: -1 if last_is_linear else None])
