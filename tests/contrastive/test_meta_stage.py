"""A whole model takes the second-order meta step: through real encoders, its tables and weights as they were."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from contrastive.augmenters import Augmenters
from contrastive.data.sequences import ITEM
from contrastive.encoders.build import build_encoder
from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.losses.cross_batch_memory import CrossBatchMemory
from contrastive.mclrec_config import MclrecConfig
from contrastive.mclrec_losses import HiddenStates, stage_loss
from contrastive.meta_stage import second_order_stage
from contrastive.model import SequenceModel
from contrastive.next_item_task import NextItemTask
from contrastive.sequence_batch import Histories, SequenceBatch
from dlrm.distributed.ranks import ALONE
from embeddings import RowAdam, TableConfig

NUM_ITEMS, DIM = 11, 32


def build(kind: str, kernels: str = "torch") -> SequenceModel:
    torch.manual_seed(3)
    config = EncoderConfig(kind=kind, inner=16, gru_width=8, dropout=0.0, attention_dropout=0.0, kernels=kernels)
    table = TableConfig(name=ITEM, num_rows=NUM_ITEMS + 1, dim=DIM, optimizer=RowAdam(learning_rate=0.1))
    return SequenceModel([table], build_encoder(config, DIM, 6), Augmenters(DIM, (6, 4)))


def draw_batch() -> SequenceBatch:
    generator = torch.Generator().manual_seed(4)

    def draw_histories() -> Histories:
        lengths = torch.tensor([3, 1, 5, 2])
        return Histories(torch.randint(0, NUM_ITEMS + 1, (int(lengths.sum()),), generator=generator), lengths)

    history, *views = (draw_histories() for _ in range(3))
    ids = torch.arange(NUM_ITEMS + 1)
    return SequenceBatch(
        sparse=KeyedJaggedTensor([ITEM], ids, lengths=torch.tensor([len(ids)])),
        history=history,
        views=tuple(views),
        targets=torch.tensor([4, 9, 1, 2]),
        rows=torch.arange(4),
    )


def gradients(model: SequenceModel, batch: SequenceBatch, rate: float) -> torch.Tensor:
    config = MclrecConfig(beta=0.5, views_weight=0.1, second_order=True, virtual_rate=rate)
    second_order_stage(model, batch, config).loss.backward()
    return torch.cat([weight.grad.flatten() for weight in model.augmenters.parameters()])


@pytest.mark.parametrize("kind", ["sasrec", "bsarec", "gru4rec"])
def test_encoders_can_be_stepped_through(kind: str) -> None:
    model, batch = build(kind), draw_batch()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    through_step = gradients(model, batch, 0.5)
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
    assert all(weight.grad is None for weight in model.encoder.parameters())

    model.zero_grad()
    unmoved = gradients(model, batch, 1e-9)
    model.zero_grad()
    with torch.no_grad():
        rows = model.rows(batch)
        hidden = HiddenStates(None, model.encode(rows, *batch.views))
    config = MclrecConfig(beta=0.5, views_weight=0.1)
    stage_loss("augmenters", hidden, rows, batch.targets, model.augmenters, config).loss.backward()
    first_order = torch.cat([weight.grad.flatten() for weight in model.augmenters.parameters()])
    torch.testing.assert_close(unmoved, first_order, rtol=1e-4, atol=1e-6)
    assert (through_step - first_order).norm() > 1e-3 * first_order.norm()


def test_kernels_without_second_derivatives_are_told() -> None:
    with pytest.raises(RuntimeError, match=r"--encoder.kernels torch"):
        gradients(build("sasrec", "auto"), draw_batch(), 0.5)


def test_the_loops_task_takes_the_step_and_refuses_ranks() -> None:
    batch, config = draw_batch(), MclrecConfig(beta=0.5, second_order=True, virtual_rate=0.5)
    model = build("sasrec")
    task = NextItemTask(model, config)
    task.enter("augmenters")
    loss, _ = task(batch)
    assert loss.item() == second_order_stage(model, batch, config).loss.item()
    assert task.values()["augmenters_loss"] == loss.item()
    with pytest.raises(ValueError, match=r"--mclrec.second-order: expected one process, got 2 ranks"):
        NextItemTask(model, config, replace(ALONE, count=2))


def test_the_loops_task_contrasts_with_a_models_memory() -> None:
    model, batch = build("sasrec"), draw_batch()
    model.memory = CrossBatchMemory(DIM, 16)
    task = NextItemTask(model, MclrecConfig(contrast="memory", views_weight=0.5))
    terms = []
    for _ in range(2):
        loss, _ = task(batch)
        loss.backward()
        terms.append(task.values()["views_contrast"])
    assert terms[1] > terms[0], "more negatives, with the first batch in memory"
    assert "memory._memory.embedding_memory" in model.state_dict()
