"""Norms of each sample's gradient of the dense part, without ever making those gradients.

The gradient of a linear layer's weight is, for one sample, the outer product of the layer's input a and the gradient
delta of its output, so that its squared norm is |a|^2 |delta|^2, and with the bias (|a|^2 + 1) |delta|^2 (Goodfellow
2015, arXiv:1510.01799). Both lie at hand in every backward pass. The other modules of ours that have parameters have
rules of their own; a module without one is left out, and is named.

A preconditioned gradient D g, as Adam's, has norms that do not factor so, but their sum over samples does:
sum_i |D o (delta_i a_i^T)|^2 = <D^2, (delta^2)^T a^2>, one product of matrices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dlrm.interaction import DotInteraction
from dlrm.model import Constant

Inputs = tuple[Tensor, ...]
Gradients = Sequence[Tensor]  # one for each of a rule's parameters: a gradient, or what is multiplied with one


class ExampleRule(ABC):
    """What is known of the samples' gradients of one module's own parameters.

    Everywhere `inputs` are the module's, and `delta` is the gradient of its output; each row belongs to one sample.

    Attributes:
        parameters: that the rule is about.
    """

    def __init__(self, *parameters: nn.Parameter) -> None:
        self.parameters = parameters

    @abstractmethod
    def squared_norms(self, inputs: Inputs, delta: Tensor) -> Tensor:
        """Return |g_i|^2 [B]."""

    @abstractmethod
    def products(self, inputs: Inputs, delta: Tensor, vectors: Gradients) -> Tensor:
        """Return <g_i, v> [B]; v has a tensor for each parameter."""

    @abstractmethod
    def weighted_sum(self, inputs: Inputs, delta: Tensor, weights: Gradients) -> Tensor:
        """Return sum_i |D o g_i|^2, a scalar; D has a tensor for each parameter."""


class LinearRule(ExampleRule):
    """Of `nn.Linear`, on inputs [B, in] or, with several rows per sample, [B, n, in]."""

    def squared_norms(self, inputs: Inputs, delta: Tensor) -> Tensor:
        """See `ExampleRule`; of several rows per sample, the products of all pairs of rows add up."""
        given, bias = inputs[0], float(len(self.parameters) > 1)
        if given.ndim == 2:
            return (_squares(given) + bias) * _squares(delta)
        return ((given @ given.mT + bias) * (delta @ delta.mT)).sum(dim=(1, 2))

    def products(self, inputs: Inputs, delta: Tensor, vectors: Gradients) -> Tensor:
        """See `ExampleRule`."""
        found: Tensor = torch.linalg.vecdot(nn.functional.linear(inputs[0], *vectors), delta)
        return found if found.ndim == 1 else found.sum(dim=1)

    def weighted_sum(self, inputs: Inputs, delta: Tensor, weights: Gradients) -> Tensor:
        """See `ExampleRule`; of several rows per sample it is not known, and is NaN."""
        given = inputs[0]
        if given.ndim > 2:
            return given.new_full((), torch.nan)
        squared = delta.square()
        total = (weights[0].square() * (squared.mT @ given.square())).sum()
        return total + (weights[1].square() * squared.sum(dim=0)).sum() if len(weights) > 1 else total


class ConstantRule(ExampleRule):
    """Of the vector that stands in for a bottom MLP: a sample's gradient is that of the output."""

    def squared_norms(self, inputs: Inputs, delta: Tensor) -> Tensor:
        """See `ExampleRule`."""
        return _squares(delta)

    def products(self, inputs: Inputs, delta: Tensor, vectors: Gradients) -> Tensor:
        """See `ExampleRule`."""
        return delta @ vectors[0]

    def weighted_sum(self, inputs: Inputs, delta: Tensor, weights: Gradients) -> Tensor:
        """See `ExampleRule`."""
        return (delta.square().sum(dim=0) * weights[0].square()).sum()


class CombinationsRule(ExampleRule):
    """Of the learned combinations P of `DotInteraction`: with D the products' gradient [n, k], g_i = D^T V V^T."""

    def squared_norms(self, inputs: Inputs, delta: Tensor) -> Tensor:
        """See `ExampleRule`."""
        return _squares(_of_combinations(inputs, delta).flatten(1))

    def products(self, inputs: Inputs, delta: Tensor, vectors: Gradients) -> Tensor:
        """See `ExampleRule`."""
        return (_of_combinations(inputs, delta) * vectors[0]).sum(dim=(1, 2))

    def weighted_sum(self, inputs: Inputs, delta: Tensor, weights: Gradients) -> Tensor:
        """See `ExampleRule`."""
        return (_of_combinations(inputs, delta).square().sum(dim=0) * weights[0].square()).sum()


def find_rule(module: nn.Module) -> ExampleRule | None:
    """Return the rule of a module's own trained parameters, None where there is none."""
    trained = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
    if type(module) is nn.Linear:
        return LinearRule(*trained) if module.weight.requires_grad else None
    if isinstance(module, Constant):
        return ConstantRule(*trained)
    return CombinationsRule(*trained) if isinstance(module, DotInteraction) else None


def _of_combinations(inputs: Inputs, delta: Tensor) -> Tensor:
    """Return every sample's gradient of P [B, k, n], which is as small as the interaction itself."""
    dense, pooled = inputs
    dim = dense.shape[1]
    vectors = torch.cat([dense, pooled], dim=1).unflatten(1, (-1, dim))
    of_products = delta[:, dim:].unflatten(1, (vectors.shape[1], -1))
    gradients: Tensor = of_products.mT @ (vectors @ vectors.mT)
    return gradients


def _squares(rows: Tensor) -> Tensor:
    # A norm, as it reads the numbers once and keeps nothing.
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norms.square()
