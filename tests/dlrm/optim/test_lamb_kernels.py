"""Lamb's compiled kernels do what torch's operations do, whatever the options, sizes and threads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.optim import lamb, lamb_kernels
from dlrm.optim.lamb import Lamb
from dlrm.optim.lamb_kernels import PIECE
from dlrm.optim.trust_ratios import trust_ratios

SHAPES = [(16, 13), (7,), (33, 17), (1, 1), (1,), (2, 3, 4), (1025,), (0, 4), ()]


def train(fused: bool, shapes: list[tuple[int, ...]], *, steps: int = 6, seed: int = 0, **options: Any) -> Lamb:
    """Train weights, some of which have no gradient in some steps, in two groups with different options."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in shapes]
    half = len(shapes) // 2
    groups = [{"params": weights[:half], "lr": 0.05, "trust_clip": True}, {"params": weights[half:], **options}]
    optimizer = Lamb(groups, lr=0.02, fused=fused, **options)
    for step in range(steps):
        for place, weight in enumerate(weights):
            gradient = torch.randn(weight.shape, generator=generator) * 10.0 ** -(place % 4)
            weight.grad = None if (step + place) % 5 == 0 and place else gradient
        optimizer.step()
    return optimizer


def check_equal(ours: Lamb, theirs: Lamb) -> None:
    torch.testing.assert_close(ours.ratios, theirs.ratios, rtol=1e-6, atol=0.0)
    for left, right in zip(ours.param_groups, theirs.param_groups, strict=True):
        for weight, expected in zip(left["params"], right["params"], strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
            for name, value in theirs.state[expected].items():
                # A sum may be rounded to either of two neighbours.
                rounding = 2.0**-7 if value.dtype == torch.bfloat16 else 1e-6
                torch.testing.assert_close(ours.state[weight][name], value, rtol=rounding, atol=1e-7)


@pytest.fixture
def operations_are_barred(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Only the kernels may move weights."""
    with monkeypatch.context() as patch:
        patch.setattr(lamb, "OperationMoves", None)
        yield patch


OPTIONS: list[dict[str, Any]] = [
    {"weight_decay": 0.0},
    {"weight_decay": 0.3, "max_grad_norm": 0.5},
    {"weight_decay": 0.1, "bias_correction": False, "betas": (0.8, 0.95), "eps": 1e-3},
    {"weight_decay": 0.1, "exclude_1d": False, "norm_bounds": (0.5, 1.0)},
    {"weight_decay": 0.0, "always_adapt": False},
    {"weight_decay": 0.1, "max_grad_norm": 0.5, "moment_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_kernels_equal_operations(options: dict[str, Any], operations_are_barred: Any) -> None:
    # Where moments are rounded, differences of the last bit grow.
    steps = 1 if "moment_dtype" in options else 6
    ours = train(True, SHAPES, steps=steps, **options)
    operations_are_barred.undo()
    check_equal(ours, train(False, SHAPES, steps=steps, **options))


def test_moments_in_16_bits_are_the_nearest_ones() -> None:
    """Of random bits of float32, as torch rounds them: ties, tiny and large numbers, infinities."""
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    bits[:1000] = bits[:1000] & ~0xFFFF | 0x8000
    wide = bits.view(torch.float32)
    wide = torch.cat([wide[~wide.isnan()], torch.tensor([float("inf"), -float("inf"), 0.0, -0.0])])
    narrow = np.empty(len(wide), np.uint16)
    lamb_kernels.shorten(wide.numpy().view(np.uint32), narrow)
    assert np.array_equal(narrow, wide.bfloat16().view(torch.uint16).numpy())
    back = np.empty(len(wide), np.uint32)
    lamb_kernels.widen(narrow, back)
    assert np.array_equal(back, wide.bfloat16().float().numpy().view(np.uint32))


def test_what_is_no_number_is_none_in_16_bits() -> None:
    """Of either sign, whatever the other bits: the lowest ones, the highest ones, all of them, any."""
    drawn = np.random.default_rng(0).integers(1, 1 << 23, 10_000)
    payloads = np.concatenate([drawn, [1, 0x7FFF, 0x8000, 0xFFFF, 0x400000, 0x7F8000, 0x7FFFFF]]).astype(np.uint32)
    for sign in (0x7F800000, 0xFF800000):
        narrow = np.empty(len(payloads), np.uint16)
        lamb_kernels.shorten(payloads | np.uint32(sign), narrow)
        back = torch.from_numpy(narrow.view(np.int16)).view(torch.bfloat16)
        assert back.isnan().all()
        assert (back.signbit() == (sign == 0xFF800000)).all()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), min_size=0, max_size=3).map(tuple), min_size=2, max_size=6),
    st.integers(0, 1000),
)
def test_kernels_equal_operations_for_any_shapes(shapes: list[tuple[int, ...]], seed: int) -> None:
    check_equal(train(True, shapes, steps=2, seed=seed), train(False, shapes, steps=2, seed=seed))


@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_and_threads_do_not_change_a_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a neighbour in the same call; many pieces, the last one a short one."""
    shapes = [(5, PIECE + 1), (3,), (PIECE // 8 + 5, 1)]
    used = []
    monkeypatch.setattr(lamb_kernels, "run_all", lambda tasks: used.append(len(tasks)) or [task() for task in tasks])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = train(True, shapes, steps=2)
        torch.set_num_threads(threads)
        several = train(True, shapes, steps=2)
    finally:
        torch.set_num_threads(before)
    assert bool(used) == (threads > 1)
    for left, right in zip(alone.param_groups, several.param_groups, strict=True):
        assert all(map(torch.equal, left["params"], right["params"]))
    check_equal(several, train(False, shapes, steps=2))


@pytest.mark.parametrize("which", ["weight", "gradient", "mean", "square"])
def test_what_does_not_lie_in_a_row_is_left_to_operations(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels take addresses, and would read whatever lies there."""
    monkeypatch.setattr(lamb, "KernelMoves", None)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(5, 7, generator=generator)) for _ in range(2)]
    optimizers = [Lamb([weight], lr=0.1) for weight in weights]
    ours, theirs = weights
    gradients = torch.randn(3, 5, 7, generator=generator)
    for optimizer in optimizers:  # makes the states
        optimizer.fused, optimizer.param_groups[0]["params"][0].grad = False, gradients[0].clone()
        optimizer.step()
        optimizer.fused = True
    theirs.data.copy_(ours.data)
    state = optimizers[0].state[ours]
    if which == "weight":
        ours.data = ours.data.T.contiguous().T
    elif which != "gradient":
        name = {"mean": "exp_avg", "square": "exp_avg_sq"}[which]
        state[name] = state[name].T.contiguous().T
    ours.grad = gradients[1].T.contiguous().T if which == "gradient" else gradients[1]
    theirs.grad = gradients[1]
    optimizers[0].step()
    optimizers[1].fused = False
    optimizers[1].step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_what_is_negated_lazily_is_left_to_operations() -> None:
    """In its memory the sign is the other one, as in the imaginary part of a conjugate."""
    plain, lazy = (torch.nn.Parameter(torch.arange(1.0, 7.0).reshape(2, 3)) for _ in range(2))
    gradient = torch._neg_view(torch.randn(2, 3))
    assert gradient.is_neg()
    assert gradient.is_contiguous()
    plain.grad, lazy.grad = gradient.resolve_neg(), gradient
    for weight in (plain, lazy):
        Lamb([weight], lr=0.1).step()
    torch.testing.assert_close(lazy, plain, rtol=1e-6, atol=1e-7)
    lazy.data, lazy.grad = torch._neg_view(-lazy.data), plain.grad
    with pytest.raises(RuntimeError, match="negation"):  # by torch, whose operations refuse it
        Lamb([lazy], lr=0.1).step()


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_between_forward_and_backward_is_noticed(fused: bool) -> None:
    """As with torch's optimizers; else the gradient would be that of other weights."""
    weights = [torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    optimizer = Lamb(weights, fused=fused)
    for place, weight in enumerate(weights):
        loss = (weight * weight).sum()
        weight.grad, weights[1 - place].grad = torch.ones(3, 3), None
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_other_types_are_left_to_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lamb, "KernelMoves", None)
    for dtype, options in [
        (torch.float64, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"moment_dtype": torch.float16}),
    ]:
        weight = torch.nn.Parameter(torch.ones(3, 3, dtype=dtype))
        weight.grad = torch.ones_like(weight)
        Lamb([weight], lr=0.25, weight_decay=0.0, **options).step()
        torch.testing.assert_close(weight.detach(), torch.full((3, 3), 0.75, dtype=dtype), rtol=1e-2, atol=0)


def test_ratios_of_kernels_are_those_of_operations() -> None:
    """With zeros, infinities and NaN on either side."""
    numbers = [0.0, 1e-30, 0.25, 4.0, 1e30, float("inf"), float("nan")]
    squares = torch.tensor([(w, u) for w in numbers for u in numbers], dtype=torch.float64)
    for bounds, clip in [(None, False), (None, True), ((0.5, 1.5), False), ((0.5, 1.5), True)]:
        row = [0.1, 0.9, 0.999, 1e-6, 1.0, *(bounds or (0.0, np.inf)), 1.0 if clip else np.inf, 0.0, 1.0]
        found = np.empty(len(squares))
        places = np.zeros(len(squares), np.int64)
        lamb_kernels.find_ratios(squares.numpy(), np.array([row]), places, found)
        expected = trust_ratios(squares, bounds=bounds, clip=clip)
        finite = torch.isfinite(expected)
        torch.testing.assert_close(torch.from_numpy(found)[finite], expected[finite], rtol=1e-12, atol=0.0)
        assert not torch.isfinite(torch.from_numpy(found)[~finite]).any()


def test_an_interrupted_copy_goes_on_bit_for_bit() -> None:
    optimizer = train(True, SHAPES, steps=3)
    twin = copy.deepcopy(optimizer)
    for which in (optimizer, twin):
        generator = torch.Generator().manual_seed(9)
        for group in which.param_groups:
            for weight in group["params"]:
                weight.grad = torch.randn(weight.shape, generator=generator)
        which.step()
    for left, right in zip(optimizer.param_groups, twin.param_groups, strict=True):
        assert all(map(torch.equal, left["params"], right["params"]))
