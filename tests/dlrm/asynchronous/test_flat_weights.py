"""A model's weights and statistics as pieces: all that is trained goes there and back, and nothing else."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dlrm.asynchronous.flat_weights import FlatWeights
from embeddings import RowSGD, TableConfig
from embeddings.build import build_tables
from parameter_server.dense_codec import PIECE

TABLE = TableConfig(name="a", num_rows=10, dim=4, optimizer=RowSGD(learning_rate=1.0))


def test_a_model_goes_through_its_pieces_and_back() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict(
        {
            "tables": build_tables([TABLE], seed=0, device="cpu"),
            "first": shared,
            "again": shared,
            "short": nn.Linear(3, 5).bfloat16(),
            "norm": nn.BatchNorm1d(7),
            "frozen": nn.Linear(2, 2).requires_grad_(False),
        }
    )
    model["norm"].register_buffer("constant", torch.ones(9), persistent=False)
    model["norm"].num_batches_tracked.fill_(17)
    model["norm"].running_var.uniform_(1, 2)
    with torch.no_grad():
        model["first"].weight.t_()  # laid out otherwise in memory
    weights = FlatWeights(model)
    numbers = 64 * 64 + 64 + 15 + 5 + 14 + 6
    assert (weights.num_weight_pieces, weights.num_pieces) == (1, 2)
    assert weights.numbers == PIECE + 14
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pieces = weights.take()
    assert pieces.shape == (2, PIECE)
    assert not pieces[0, numbers:].any()
    assert not pieces[1, 14:].any()
    with torch.no_grad():
        for tensor in (*model.parameters(), model["norm"].running_mean, model["norm"].running_var):
            tensor.zero_()
    weights.put(pieces)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model["short"].weight.dtype == torch.bfloat16
    weights.add_to_weights(np.full((1, PIECE), 0.5, np.float32))
    torch.testing.assert_close(model["again"].bias, before["first.bias"] + 0.5)
    torch.testing.assert_close(model["short"].bias, before["short.bias"] + 0.5)
    torch.testing.assert_close(model["norm"].running_var, before["norm.running_var"])
