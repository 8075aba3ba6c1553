"""Keeps, for one step, what the layers of the dense part were given and the gradients of what they gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dlrm.noise.dense_gradients import ExampleRule, find_rule
from embeddings.interface import Tables


@dataclass
class RecordedModule:
    """A module whose samples' gradients are known, and what a step has told of them.

    Attributes:
        name: in the model.
        group: part of the model it belongs to.
        rule: of its gradients.
        calls: in this step; of more than one nothing is known, as their gradients add up.
        inputs: of the last call.
        delta: gradient of its output.
    """

    name: str
    group: str
    module: nn.Module
    rule: ExampleRule
    calls: int = 0
    inputs: tuple[Tensor, ...] = ()
    delta: Tensor | None = None
    handle: RemovableHandle | None = field(default=None, repr=False)

    def open(self) -> None:
        """Record the next step."""
        self.close()
        self.handle = self.module.register_forward_hook(self._keep)

    def close(self) -> None:
        """Record no longer, and forget."""
        if self.handle is not None:
            self.handle.remove()
        self.handle, self.calls, self.inputs, self.delta = None, 0, (), None

    @property
    def is_complete(self) -> bool:
        """Whether the step has told all that the rule needs."""
        return self.calls == 1 and self.delta is not None

    def squared_norms(self) -> Tensor:
        """Return |g_i|^2 [B] of the loss that backward was called on."""
        return self.rule.squared_norms(self.inputs, self._known())

    def sum_of_squares(self, weights: Sequence[Tensor] | None = None) -> Tensor:
        """Return the sum of |g_i|^2, or of |D o g_i|^2 with D given as a tensor for each of the rule's parameters."""
        if weights is not None:
            return self.rule.weighted_sum(self.inputs, self._known(), weights)
        return self.squared_norms().sum(dtype=torch.float64)

    def gradient_square(self, weights: Sequence[Tensor] | None = None) -> Tensor:
        """Return |g|^2, or |D o g|^2, of the gradients that the parameters have."""
        gradients = [_gradient(parameter).float() for parameter in self.rule.parameters]
        if weights is not None:
            gradients = [gradient * weight for gradient, weight in zip(gradients, weights, strict=True)]
        # Squares and a sum, as torch's norm of millions of numbers is wrong by up to 1 % on a CPU.
        return torch.stack([gradient.square().sum() for gradient in gradients]).sum(dtype=torch.float64)

    def products(self) -> Tensor:
        """Return <g_i, g> [B] with the gradient g that the parameters have."""
        gradients = [_gradient(parameter).float() for parameter in self.rule.parameters]
        return self.rule.products(self.inputs, self._known(), gradients)

    def _known(self) -> Tensor:
        assert self.delta is not None, "asked only where is_complete"
        return self.delta

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not (module.training and output.requires_grad):
            return
        self.calls += 1
        # As under autocast, where layers are given numbers of several types.
        self.inputs = tuple(given.detach().float() for given in inputs)
        output.register_hook(self._keep_delta)

    def _keep_delta(self, gradient: Tensor) -> None:
        self.delta = gradient.detach().float()


class DenseRecorder:
    """Records the modules of a model whose samples' gradients are known.

    A compiled dense part runs uncompiled in the steps that are recorded.

    Args:
        model: of which tables are left alone.

    Attributes:
        modules: that are recorded.
        left_out: names of trained parameters that have no rule -> how many numbers they have.
    """

    def __init__(self, model: nn.Module) -> None:
        tables = {id(part) for held in model.modules() if isinstance(held, Tables) for part in held.modules()}
        owners = [(name, module) for name, module in model.named_modules() if id(module) not in tables]
        counts: dict[int, int] = {}
        for _, module in owners:
            for parameter in module.parameters(recurse=False):
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
        self.model = model
        self.modules: list[RecordedModule] = []
        self.left_out: dict[str, int] = {}
        for name, module in owners:
            trained = [p for p in module.named_parameters(name, recurse=False) if p[1].requires_grad]
            rule = find_rule(module)
            if trained and rule is not None and all(counts[id(parameter)] == 1 for _, parameter in trained):
                self.modules.append(RecordedModule(name, part_of(name), module, rule))
            else:
                self.left_out |= {full: parameter.numel() for full, parameter in trained}
        self._compiled: dict[nn.Module, Any] = {}

    def open(self) -> None:
        """Record the next step."""
        self.close()
        for module in self.model.modules():
            if (compiled := module._compiled_call_impl) is not None:
                self._compiled[module] = compiled
                module._compiled_call_impl = None
        for recorded in self.modules:
            recorded.open()

    def close(self) -> None:
        """Record no longer, and forget."""
        for module, compiled in self._compiled.items():
            module._compiled_call_impl = compiled
        self._compiled.clear()
        for recorded in self.modules:
            recorded.close()


def part_of(name: str) -> str:
    """Return which part of the model a module belongs to: `bottom`, `interaction` or `top` of a DLRM.

    Of another model it is the first part of the module's name.
    """
    parts = name.split(".")
    return (parts[1] if parts[0] == "dense" and len(parts) > 1 else parts[0]) or "model"


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
