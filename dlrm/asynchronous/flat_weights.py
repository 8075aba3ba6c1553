"""A model's dense part as one vector: its weights first, then the running statistics of its norms, in whole pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dlrm.checkpoints.table_state import table_prefixes
from parameter_server.dense_codec import PIECE, Floats, count_pieces


class FlatWeights:
    """Copies a model's dense part into pieces [pieces, PIECE] float32, and back.

    A tensor that several layers share is there once. Weights end with a piece and statistics begin another, as they
    are not combined alike. Buffers of whole numbers, and those that checkpoints leave out, stay each model's own.

    Args:
        model: its tables have no part in this.

    Attributes:
        weights: parameters, frozen ones too.
        statistics: floating point buffers.
        num_weight_pieces: the first pieces.
        num_pieces: of all.
        numbers: length of the vector.

    Raises:
        ValueError: it has no dense parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        prefixes, kept = table_prefixes(model), model.state_dict().keys()
        named = [(name, p) for name, p in model.named_parameters() if not name.startswith(prefixes)]
        self.weights: Sequence[Tensor] = [parameter.detach() for _, parameter in named]
        self.parameters = [parameter for _, parameter in named]
        self.statistics: Sequence[Tensor] = [
            buffer
            for name, buffer in model.named_buffers()
            if name in kept and buffer.is_floating_point() and not name.startswith(prefixes)
        ]
        if not self.weights:
            raise ValueError("expected a model with dense parameters to share, got one of tables only")
        statistics = sum(tensor.numel() for tensor in self.statistics)
        self.num_weight_pieces = count_pieces(sum(tensor.numel() for tensor in self.weights))
        self.num_pieces = self.num_weight_pieces + count_pieces(statistics)
        self.numbers = self.num_weight_pieces * PIECE + statistics

    def take(self) -> Floats:
        """Return a copy of all."""
        pieces = torch.zeros(self.num_pieces, PIECE)
        for tensor, place in self._places(pieces, [*self.weights, *self.statistics]):
            place.copy_(tensor)
        return _as_floats(pieces)

    def take_gradients(self, decays: Mapping[int, float]) -> Floats:
        """Return a copy of the weights' gradients [num_weight_pieces, PIECE]; zeros where there is none.

        Args:
            decays: by `id` of the parameter, how much of it is added to its gradient.
        """
        pieces = torch.zeros(self.num_weight_pieces, PIECE)
        for parameter, (tensor, place) in zip(self.parameters, self._places(pieces, self.weights), strict=True):
            if parameter.grad is not None:
                place.copy_(parameter.grad)
                if decay := decays.get(id(parameter), 0.0):
                    place.add_(tensor.to(place), alpha=decay)
        return _as_floats(pieces)

    def put(self, pieces: Floats) -> None:
        """Set all."""
        for tensor, place in self._places(torch.from_numpy(pieces), [*self.weights, *self.statistics]):
            tensor.copy_(place)

    def put_weights(self, pieces: Floats) -> None:
        """Set the weights to [num_weight_pieces, PIECE]."""
        for tensor, place in self._places(torch.from_numpy(pieces), self.weights):
            tensor.copy_(place)

    def add_to_weights(self, pieces: Floats) -> None:
        """Add [num_weight_pieces, PIECE] to the weights."""
        for tensor, place in self._places(torch.from_numpy(pieces), self.weights):
            tensor.add_(place.to(tensor.device))

    def _places(self, pieces: Tensor, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tensors with what belongs to each, in its shape."""
        flat, at = pieces.view(-1), 0
        for index, tensor in enumerate(tensors):
            if index == len(self.weights):
                at = self.num_weight_pieces * PIECE
            yield tensor, flat[at : at + tensor.numel()].view(tensor.shape)
            at += tensor.numel()


def _as_floats(pieces: Tensor) -> Floats:
    floats: Floats = pieces.numpy()
    return floats


def relative_distance(own: Floats, master: Floats) -> float:
    """Return ||own - master|| / ||master||."""
    length = float(np.linalg.norm(master))
    return float(np.linalg.norm(own - master)) / length if length > 0.0 else 0.0
