"""The fused softmax is the formula's, holds one buffer of scores, and survives scores of any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive.losses.full_softmax import full_softmax
from contrastive.losses.softmax_in_place import softmax_by_passes, softmax_in_place


def draw(size: int, n: int, dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    hidden, rows = (torch.randn(count, dim, generator=generator, dtype=torch.float64) for count in (size, n))
    targets = torch.randint(n, (size,), generator=generator)
    return hidden.to(dtype).requires_grad_(), rows.to(dtype).requires_grad_(), targets


def test_value_and_gradients_are_those_of_the_formula(formulas: SimpleNamespace) -> None:
    hidden, rows, targets = draw(6, 9, 4)
    expected = formulas.next_item(hidden, rows, targets)
    got = full_softmax(hidden, rows, targets)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(2 * got, (hidden, rows)), torch.autograd.grad(2 * expected, (hidden, rows)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000])
def test_blocks_of_columns_make_no_difference(n: int) -> None:
    hidden, rows, targets = draw(300, n, 8)
    expected = F.cross_entropy(hidden @ rows.T, targets)
    got = full_softmax(hidden, rows, targets)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got, (hidden, rows)), torch.autograd.grad(expected, (hidden, rows)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_corrections_spare_the_own_target_and_leave_rows_out() -> None:
    hidden, rows, targets = draw(4, 7, 3)
    correction = torch.tensor([0.3, -torch.inf, 0.0, -1.0, 2.0, -torch.inf, 0.5], dtype=torch.float64)
    targets[0], targets[1] = 1, 4
    scores = hidden @ rows.T + correction
    scores[range(4), targets] = (hidden * rows[targets]).sum(1)
    expected = F.cross_entropy(scores, targets)
    got = full_softmax(hidden, rows, targets, correction)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got, (hidden, rows)), torch.autograd.grad(expected, (hidden, rows)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_float32_stays_close_whatever_the_size_of_scores(scale: float) -> None:
    hidden, rows, targets = draw(32, 2000, 16)
    expected = F.cross_entropy(scale * hidden @ rows.T, targets)
    got = full_softmax((scale * hidden).float(), rows.float(), targets)
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=1e-5)
    singles = [part.detach().float().requires_grad_() for part in (scale * hidden, rows)]
    ours = torch.autograd.grad(full_softmax(*singles, targets), singles)
    theirs = torch.autograd.grad(expected, (hidden, rows))
    assert (ours[0] * scale - theirs[0]).norm() < 1e-4 * theirs[0].norm()
    assert (ours[1] - theirs[1]).norm() < 1e-4 * theirs[1].norm()


@pytest.mark.parametrize("normalise", [softmax_in_place, softmax_by_passes])
def test_scores_become_probabilities_where_they_stand(normalise: Callable[[Tensor], Tensor]) -> None:
    scores = 30 * torch.randn(8, 333, dtype=torch.float64)
    scores[2, 5] = -torch.inf
    probabilities = scores.clone()
    log_total = normalise(probabilities)
    torch.testing.assert_close(log_total, scores.logsumexp(1), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(probabilities, scores.softmax(1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("is_corrected", [False, True])
def test_gradients_can_be_differentiated(is_corrected: bool) -> None:
    hidden, rows, targets = draw(3, 5, 2)
    correction = torch.tensor([0.3, -torch.inf, 0.0, -1.0, 2.0], dtype=torch.float64) if is_corrected else None
    assert torch.autograd.gradgradcheck(lambda h, r: full_softmax(h, r, targets, correction), (hidden, rows))


class _LargeTensors(TorchDispatchMode):
    """Keeps every tensor of at least so many numbers that an operator gives, so that no address is used again."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.found: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() >= self.numbers:
            self.found.append(out)
        return out


def count_buffers(loss: Any, hidden: Tensor, rows: Tensor, targets: Tensor) -> int:
    with _LargeTensors(len(hidden) * len(rows)) as mode:
        loss(hidden, rows, targets).backward()
    return len({tensor.untyped_storage().data_ptr() for tensor in mode.found})


def test_there_is_one_buffer_of_scores() -> None:
    sample = draw(40, 500, 8)
    assert count_buffers(lambda hidden, rows, targets: F.cross_entropy(hidden @ rows.T, targets), *sample) > 1
    assert count_buffers(full_softmax, *sample) == 1


def test_gradients_can_be_asked_for_twice_and_for_one_side() -> None:
    hidden, rows, targets = draw(5, 6, 3)
    loss = full_softmax(hidden, rows, targets)
    first = torch.autograd.grad(loss, (hidden, rows), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, rows))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (alone,) = torch.autograd.grad(full_softmax(hidden, rows.detach(), targets), hidden)
    assert torch.equal(alone, first[0])


def test_no_histories_cost_nothing() -> None:
    hidden, rows, targets = draw(0, 6, 3)
    loss = full_softmax(hidden, rows, targets)
    loss.backward()
    assert loss == 0
    assert rows.grad is not None
    assert (rows.grad == 0).all()


def test_hidden_states_of_autocast_are_taken_in_the_rows_precision() -> None:
    hidden, rows, targets = draw(5, 6, 3, torch.float32)
    full_softmax(hidden.to(torch.bfloat16), rows, targets).backward()
    assert hidden.grad is not None
    assert rows.grad is not None
    assert rows.grad.dtype == torch.float32


def test_what_does_not_fit_is_told() -> None:
    hidden, rows, targets = draw(5, 6, 3)
    with pytest.raises(ValueError, match=r"expected \[B, dim\] and \[n, dim\], got \[5, 3\] and \[6, 2\]"):
        full_softmax(hidden, rows[:, :2], targets)
    with pytest.raises(ValueError, match="expected one target for each of 5 histories, got 4"):
        full_softmax(hidden, rows, targets[:4])
    with pytest.raises(ValueError, match="expected a correction for each of 6 rows, got 2"):
        full_softmax(hidden, rows, targets, torch.zeros(2))
