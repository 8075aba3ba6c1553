"""DLRM "small" as NVIDIA publishes it (DeepLearningExamples, PyTorch/Recommendation/DLRM), and batches for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.batch import Batch
from dlrm.model import DLRM
from embeddings import RowSGD, RowWiseAdagrad, TableConfig
from embeddings.tables import RowType

# Values of the 26 columns of the Criteo Terabyte log that come at least 15 times, and one more for all others.
CARDINALITIES = [
    *(7912889, 33823, 17139, 7339, 20046, 4, 7105, 1382, 63, 5554114, 582469, 245828, 11),
    *(2209, 10667, 104, 4, 968, 15, 8165896, 2675940, 7156453, 302516, 12022, 97, 35),
]
LEARNING_RATE = 0.1


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is trained."""

    num_rows: list[int]
    dim: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    batch_size: int
    num_numeric: int = 13

    @property
    def names(self) -> list[str]:
        """Of features and tables."""
        return [f"C{number + 1}" for number in range(len(self.num_rows))]

    @property
    def widths(self) -> list[tuple[int, ...]]:
        """Of the layers of the two MLPs, inputs included."""
        vectors = len(self.num_rows) + 1
        interaction = self.dim + vectors * (vectors - 1) // 2
        return [(self.num_numeric, *self.bottom, self.dim), (interaction, *self.top, 1)]


NVIDIA_SMALL = Shape(num_rows=CARDINALITIES, dim=128, bottom=(512, 256), top=(1024, 1024, 512, 256), batch_size=65536)
SMOKE = Shape(num_rows=[min(n, 50) for n in CARDINALITIES[:5]], dim=8, bottom=(16,), top=(16,), batch_size=64)


def build_network(shape: Shape, device: torch.device, *, optimizer: str, row_type: RowType) -> DLRM:
    """Build the model with its tables in the device's memory, and draw their rows there: four billion numbers."""
    kind = {"sgd": RowSGD, "rowwise_adagrad": RowWiseAdagrad}[optimizer]
    tables = [
        TableConfig(
            name=name,
            num_rows=rows,
            dim=shape.dim,
            optimizer=kind(learning_rate=LEARNING_RATE),
            row_type=row_type,
            init_scale=0.0,
        )
        for name, rows in zip(shape.names, shape.num_rows, strict=True)
    ]
    model = DLRM(
        num_numeric=shape.num_numeric,
        tables=tables,
        dim=shape.dim,
        bottom=shape.bottom,
        top=shape.top,
        device=device,
        kernel="fbgemm",
    )
    for table in model.tables.rows():
        scale = table.config.num_rows**-0.5
        table.weight.uniform_(-scale, scale)
    return model


def draw_batches(shape: Shape, count: int) -> list[Batch]:
    """Draw batches of one uniform id per feature, the kindest to no cache; on the CPU, as a reader gives them."""
    generator = torch.Generator().manual_seed(0)
    size = shape.batch_size
    batches = []
    for _ in range(count):
        ids = [torch.randint(rows, (size,), generator=generator, dtype=torch.int32) for rows in shape.num_rows]
        batches.append(
            Batch(
                dense=torch.randn(size, shape.num_numeric, generator=generator),
                sparse=KeyedJaggedTensor(
                    keys=shape.names,
                    values=torch.cat(ids),
                    lengths=torch.ones(size * len(ids), dtype=torch.int32),
                ),
                labels=torch.randint(2, (size,), generator=generator).float(),
                rows=torch.arange(size),
            )
        )
    return batches


def without_memory(batches: list[Batch]) -> Iterator[Batch]:
    """Give the batches again and again, each as a new one that remembers nothing of its last time."""
    while True:
        for batch in batches:
            ids = batch.sparse
            fresh = KeyedJaggedTensor(keys=ids.keys(), values=ids.values(), lengths=ids.lengths())
            yield Batch(dense=batch.dense, sparse=fresh, labels=batch.labels, rows=batch.rows)


def moved_bytes(shape: Shape, batches: list[Batch], *, row_bytes: int, pooled_bytes: int, has_state: bool) -> float:
    """Count what the tables and the interaction of one step must read and write, however it is done.

    The lookup reads each row that the batch names once and writes the pooled vectors. The interaction reads these in
    forward and again in backward, and writes their gradient. The update reads that, and reads and writes each row
    once, with its sum of squares. Activations and weights of the MLPs are left out: they are part of the products.

    Args:
        shape: of the network.
        batches: whose distinct rows are counted.
        row_bytes: per number of a row.
        pooled_bytes: per number of a pooled vector.
        has_state: whether rows have a sum of squares.
    """
    rows = sum(
        len(torch.unique(ids)) for batch in batches for ids in batch.sparse.values().view(len(shape.num_rows), -1)
    ) / len(batches)
    pooled = shape.batch_size * len(shape.num_rows) * shape.dim * pooled_bytes
    return rows * (3 * shape.dim * row_bytes + (8 if has_state else 0)) + 5 * pooled


def flops(shape: Shape) -> float:
    """Count the operations of the matrix products of one step: outputs, weights' and inputs' gradients, and pairs."""
    layers = sum(fan_in * fan_out for widths in shape.widths for fan_in, fan_out in pairwise(widths))
    vectors = len(shape.num_rows) + 1
    products = 3 * layers - shape.num_numeric * shape.widths[0][1] + 2 * vectors * vectors * shape.dim
    return 2.0 * shape.batch_size * products


class Step:
    """A step without guards: forward, loss, backward with the rows' update, dense update; nothing waits for it.

    Args:
        model: on its device.
        half: whether the dense part runs in bf16.
    """

    def __init__(self, model: DLRM, *, half: bool) -> None:
        self.model, self.half = model, half
        self.device = next(model.parameters()).device.type
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, fused=True)

    def __call__(self, batch: Batch) -> Tensor:
        """Train on a batch and return its loss, which may not have been computed yet."""
        # Before forward: gradients may lie where a CUDA graph's next replay writes.
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.half):
            logits = self.model(batch)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), batch.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()
