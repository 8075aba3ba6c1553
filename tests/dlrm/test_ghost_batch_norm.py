"""Ghost batch norm is batch norm of its chunks, and of the whole batch where that is one chunk; bit for bit there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dlrm.config import ModelConfig
from dlrm.ghost_batch_norm import GhostBatchNorm
from dlrm.model import DLRM
from embeddings import TableConfig


def randomize(norm: nn.BatchNorm1d) -> None:
    generator = torch.Generator().manual_seed(7)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def run(norm: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the input; those of the weights are in them."""
    given = batch.clone().requires_grad_()
    output = norm(given)
    (output * torch.linspace(0.5, 2.0, output.numel()).view_as(output)).sum().backward()
    return output.detach(), given.grad


@pytest.mark.parametrize("rows", [2, 7, 64, 127])
def test_one_chunk_is_batch_norm_bit_for_bit(rows: int) -> None:
    ours, theirs = GhostBatchNorm(5, ghost=64), nn.BatchNorm1d(5)
    for norm in (ours, theirs):
        randomize(norm)
    for step in range(3):
        batch = 3 * torch.randn(rows, 5, generator=torch.Generator().manual_seed(step)) + 1
        for left, right in zip(run(ours, batch), run(theirs, batch), strict=True):
            assert torch.equal(left, right)
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    assert torch.equal(ours.bias.grad, theirs.bias.grad)
    for name, buffer in theirs.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer), name
    theirs.eval(), ours.eval()
    assert torch.equal(ours(batch), theirs(batch))


@pytest.mark.parametrize("rows", [8, 32, 13, 15, 30])
@pytest.mark.parametrize("mode", ["per_step", "per_chunk"])
def test_chunks_are_batches_of_their_own(rows: int, mode: Any) -> None:
    """Outputs, gradients and, chunk after chunk, running statistics."""
    ours = GhostBatchNorm(3, ghost=4, momentum=0.3, momentum_mode=mode).double()
    chunks = torch.randn(rows, 3, dtype=torch.float64).tensor_split(rows // 4)
    theirs = nn.BatchNorm1d(3, momentum=0.3 / (len(chunks) if mode == "per_step" else 1)).double()
    for norm in (ours, theirs):
        randomize(norm)
    output, gradient = run(ours, torch.cat(chunks))
    parts = [chunk.clone().requires_grad_() for chunk in chunks]
    expected = torch.cat([theirs(part) for part in parts])
    (expected * torch.linspace(0.5, 2.0, expected.numel()).view_as(expected)).sum().backward()
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(output, expected, **close)
    torch.testing.assert_close(gradient, torch.cat([part.grad for part in parts]), **close)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, **close)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, **close)
    torch.testing.assert_close(ours.running_var, theirs.running_var, **close)
    assert len(set(map(len, chunks))) == 1 + (rows % (rows // 4) > 0)
    assert int(ours.num_batches_tracked) == 1


@pytest.mark.parametrize("rows", [8, 11])
def test_gradients_are_those_of_finite_differences(rows: int) -> None:
    norm = GhostBatchNorm(2, ghost=4).double()
    randomize(norm)
    batch = torch.randn(rows, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (batch,))


def test_the_noise_of_a_chunks_mean_is_that_of_its_size() -> None:
    """Its variance goes with 1 / ghost, whatever the batch."""
    variances = []
    for ghost in (8, 32, 128):
        norm = GhostBatchNorm(2000, ghost=ghost, momentum=1.0, momentum_mode="per_chunk")
        norm(torch.randn(256, 2000, generator=torch.Generator().manual_seed(0)))
        variances.append(float(norm.running_mean.var()))  # with momentum 1, of the last chunk alone
    np.testing.assert_allclose(np.multiply(variances, [8, 32, 128]), 1.0, rtol=0.15)


def test_a_row_alone_is_normalised_with_running_statistics() -> None:
    norm = GhostBatchNorm(3, ghost=4)
    randomize(norm)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    row = torch.randn(1, 3, requires_grad=True)
    output = norm(row)
    output.sum().backward()
    assert torch.isfinite(row.grad).all()
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())
    assert torch.equal(output, norm.eval()(row))


def test_no_rows_give_none_and_gradients_of_zeros() -> None:
    norm = GhostBatchNorm(3)
    output = norm(torch.empty(0, 3))
    output.sum().backward()
    assert output.shape == (0, 3)
    assert torch.equal(norm.weight.grad, torch.zeros(3))
    assert int(norm.num_batches_tracked) == 0


def test_it_computes_in_float32_under_autocast() -> None:
    norm, batch = GhostBatchNorm(3, ghost=4), 100 + torch.randn(16, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output = norm(batch.bfloat16())
    torch.testing.assert_close(
        output.float(), GhostBatchNorm(3, ghost=4)(batch.bfloat16().float()), rtol=1e-2, atol=1e-2
    )
    assert norm.running_mean.dtype == torch.float32


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="ghost >= 2"):
        GhostBatchNorm(3, ghost=1)
    with pytest.raises(ValueError, match="momentum"):
        GhostBatchNorm(3, momentum=1.5)
    with pytest.raises(ValueError, match=r"--model.ghost-size: expected at least 2, got 1"):
        ModelConfig(ghost_size=1)


def test_a_dlrm_has_it_before_the_activations_of_its_top_mlp() -> None:
    model = DLRM(
        num_numeric=3,
        tables=[TableConfig(name="a", num_rows=5, dim=4)],
        dim=4,
        top=(6, 5),
        batch_norm="ghost",
        ghost_size=32,
    )
    kinds = [type(layer) for layer in model.dense.top]
    assert kinds == [nn.Linear, GhostBatchNorm, nn.ReLU] * 2 + [nn.Linear]
    assert [layer.ghost for layer in model.modules() if isinstance(layer, GhostBatchNorm)] == [32, 32]
    assert not any(isinstance(layer, GhostBatchNorm) for layer in model.dense.bottom.modules())
