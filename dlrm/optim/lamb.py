"""LAMB: the dense optimizer whose step is relative to each layer's norm, so one rate serves every layer and batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlrm.optim.closure import ClosureOptimizer
from dlrm.optim.lamb_kernels import KernelMoves, suit_kernels
from dlrm.optim.lamb_operations import Layer, OperationMoves
from dlrm.optim.trust_ratios import NormBounds, squared_norms, sum_over_shards


class Lamb(ClosureOptimizer):
    """Layer-wise Adaptive Moments for Batch training (You et al. 2020, "Training BERT in 76 minutes", algorithm 2).

    Per parameter tensor w ("layer") with the gradient g, at its own step t = 1, 2, ...:

        m <- b1 m + (1 - b1) g ;  v <- b2 v + (1 - b2) g^2
        u  = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * w
        q  = phi(||w||) / ||u||   (1 where either norm is 0)
        w <- w - lr * q * u

    so that a step's length is lr * ||w||. Bias correction acts on the direction and never on ``lr``: q would cancel the
    one but not the other. Norms are of the whole tensor before the update. Nothing is read back from
    the device. State per parameter: ``step`` (float32 scalar on the CPU), ``exp_avg`` and ``exp_avg_sq`` (as w).

    A group with ``sharded=True`` holds pieces of tensors, the same ones in the same order on every rank of
    ``process_group``, a piece each (rows, columns, possibly nothing): their norms are those of the whole tensors, for
    which ranks exchange two numbers per tensor in every step, in one message.

    Args:
        params: Parameters, named parameters, or groups of them; the options up to ``norm_bounds`` may differ per group.
        lr: Length of a step relative to the layer's norm.
        betas: Decay per step of the running means of the gradient and of its square.
        eps: Added to the square root of the second moment.
        weight_decay: Multiple of w inside the direction.
        bias_correction: Divide the moments by 1 - beta^t.
        exclude_1d: Biases and norm scales (at most one dimension) get no weight decay and q = 1.
        always_adapt: With False, tensors without weight decay keep q = 1 (NVIDIA's variant).
        trust_clip: Bound q by 1 ("LAMBC").
        norm_bounds: phi keeps ||w|| between these two numbers; None is phi(x) = x.
        moment_dtype: In which the first moment is stored, as ``torch.bfloat16``; None is the parameter's type. All
            arithmetic is the parameter's.
        max_grad_norm: Before everything else, scale all gradients so that their global norm is at most this (NVIDIA's
            variant); None leaves them.
        fused: Update float32 weights on a CPU in two passes, by compiled kernels, rather than with torch's
            multi-tensor operations, which serve everything else.
        process_group: Of the ranks that hold pieces of ``sharded`` groups; None are all.

    Attributes:
        ratios: q of the last step, of every parameter that had a gradient, in the groups' order: [layers] in float64.

    Raises:
        ValueError: For options out of range, and in ``step`` for sparse gradients.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        exclude_1d: bool = True,
        always_adapt: bool = True,
        trust_clip: bool = False,
        norm_bounds: NormBounds | None = None,
        moment_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        fused: bool = True,
        process_group: Any = None,
    ) -> None:
        if max_grad_norm is not None and not 0.0 < max_grad_norm < math.inf:
            raise ValueError(f"Lamb: expected max_grad_norm > 0 or None, got {max_grad_norm}")
        if moment_dtype is not None and not moment_dtype.is_floating_point:
            raise ValueError(f"Lamb: expected moment_dtype to be a floating-point type or None, got {moment_dtype}")
        self.moment_dtype, self.max_grad_norm, self.fused = moment_dtype, max_grad_norm, fused
        self.process_group = process_group
        self.ratios: Tensor | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "exclude_1d": exclude_1d,
            "always_adapt": always_adapt,
            "trust_clip": trust_clip,
            "norm_bounds": norm_bounds,
            "sharded": False,
        }
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("moment_dtype", "max_grad_norm", "fused", "process_group")}
        return {**super().__getstate__(), **own, "ratios": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("norm_bounds", "sharded"):  # which a state that was saved before there were any lacks
                group.setdefault(name, self.defaults[name])
        for param, values in self.state.items():  # loading gives all of it the parameter's type
            values["exp_avg"] = values["exp_avg"].to(self.moment_dtype or param.dtype)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters after checking its options."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _move_all(self) -> None:
        layers = [layer for group in self.param_groups for layer in self._layers_of(group)]
        if layers:
            self._update(layers)

    def _layers_of(self, group: dict[str, Any]) -> list[Layer]:
        decay, excludes = group["weight_decay"], group["exclude_1d"]
        adapts, sharded = decay > 0 or group["always_adapt"], group["sharded"]
        layers = []
        for param in group["params"]:
            gradient = param.grad
            if gradient is None:
                if not sharded:
                    continue
                # Another rank's piece may have one, and ranks must send the same messages.
                gradient = torch.zeros_like(param)
            elif gradient.is_sparse:
                raise ValueError(
                    "Lamb: expected dense gradients, got a sparse one (tables have their own row optimizer)"
                )
            state = self.state[param] or self._make_state(param)
            tensors = param, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"]
            plain = excludes and param.ndim <= 1
            layers.append(Layer(group, *tensors, 0.0 if plain else decay, not plain and adapts))
        return layers

    def _make_state(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        # On the CPU, where reading it for the bias correction costs no synchronisation.
        state["step"] = torch.zeros((), dtype=torch.float32)
        like = torch.preserve_format
        state["exp_avg"] = torch.zeros_like(param, dtype=self.moment_dtype, memory_format=like)
        state["exp_avg_sq"] = torch.zeros_like(param, memory_format=like)
        return state

    def _update(self, layers: Sequence[Layer]) -> None:
        sharded = [place for place, layer in enumerate(layers) if layer.group["sharded"]]
        divisor = self._gradient_divisor(layers, sharded)
        moves: KernelMoves | OperationMoves
        if self.fused and suit_kernels(layers):
            moves = KernelMoves(layers, divisor)
        else:
            moves = OperationMoves(layers, divisor)
        squares = sum_over_shards(moves.squares, sharded, self.process_group)
        self.ratios = moves.find_ratios(squares)
        moves.finish(self.ratios)

    def _gradient_divisor(self, layers: Sequence[Layer], sharded: Sequence[int]) -> Tensor | None:
        """Return max(1, global gradient norm / max_grad_norm) as a float64 scalar, or None where it is switched off."""
        if self.max_grad_norm is None:
            return None
        squares = squared_norms([layer.gradient for layer in layers])
        total = sum_over_shards(squares, sharded, self.process_group).sum()
        return (total.sqrt() / self.max_grad_norm).clamp_(min=1.0)


def _check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for options whose numbers are out of range."""
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= options[name] < math.inf:
            raise ValueError(f"Lamb: expected {name} >= 0 and finite, got {options[name]}")
    if len(options["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in options["betas"]):
        raise ValueError(f"Lamb: expected two betas in [0, 1), got {options['betas']}")
    bounds = options["norm_bounds"]
    if bounds is not None and not (len(bounds) == 2 and 0.0 <= bounds[0] <= bounds[1]):
        raise ValueError(f"Lamb: expected norm_bounds of 0 <= least <= most, got {bounds}")
