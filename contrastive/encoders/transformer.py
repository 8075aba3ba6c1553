"""The frame that SASRec and BSARec share: positions, layers of which the last one works for the last item alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from contrastive.encoders.dropout import dropout
from contrastive.encoders.encoder_config import INITIAL_STD, EncoderConfig, Positions
from contrastive.encoders.jagged import Layout, lay_out
from contrastive.encoders.self_attention import NORM_EPS, FeedForward
from embeddings.kernels.vectors import LANES


class Mixer(Protocol):
    """The part of a layer that lets a history's items see one another."""

    def __call__(self, x: Tensor, layout: Layout) -> Tensor:
        """Map the vectors of all slots [S, dim] to others."""
        ...

    def from_last(self, x: Tensor, last: Tensor, layout: Layout) -> Tensor:
        """Compute the same for the last item of each history, [B, dim]; `last` are these items' rows of `x`."""
        ...


class TransformerEncoder(nn.Module):
    """Item and position, normalised, through layers of a mixer and a feed-forward network, read at the last item.

    Linear layers work on all tokens side by side, without padding; the last layer for one item a history.

    Args:
        config: sizes and dropout.
        dim: length of a row.
        max_length: longest history.
        positions: which end of a history positions are counted from.
        make_mixer: makes a layer's mixer.
    """

    def __init__(
        self,
        config: EncoderConfig,
        dim: int,
        max_length: int,
        positions: Positions,
        make_mixer: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.max_length, self.count_from, self.dropout = max_length, positions, config.dropout
        self.heads, self.kernels = config.heads, config.kernels
        self.positions = nn.Embedding(max_length, dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mixers = nn.ModuleList(make_mixer() for _ in range(config.layers))
        self.networks = nn.ModuleList(FeedForward(dim, config.inner, config.dropout) for _ in range(config.layers))
        self.apply(_initialise)

    def forward(self, vectors: Tensor, lengths: Tensor, hidden: Tensor) -> Tensor:
        """Encode histories; see `encoder.Encoder`.

        Raises:
            ValueError: a history is empty or longer than `max_length`, or the lengths do not add up.
        """
        padded = not (self.kernels == "auto" and self._suits_kernels(vectors))
        layout = lay_out(lengths, hidden, self.max_length, positions=self.count_from, padded=padded)
        x = vectors if layout.sources is None else vectors.index_select(0, layout.sources)
        x = self.norm(x + self.positions.weight.index_select(0, layout.positions))
        x = dropout(x, self.dropout if self.training else 0.0)
        mixers: Sequence[Mixer] = tuple(self.mixers)  # type: ignore[arg-type]
        for mixer, network in zip(mixers[:-1], self.networks, strict=False):
            x = network(mixer(x, layout))
        out: Tensor = self.networks[-1](mixers[-1].from_last(x, x.index_select(0, layout.last), layout))
        return out if layout.order is None else out.index_select(0, layout.order)

    def _suits_kernels(self, vectors: Tensor) -> bool:
        on_cpu = vectors.device.type == "cpu" and vectors.dtype == torch.float32
        whole_registers = (vectors.shape[1] // self.heads) % LANES == 0
        return on_cpu and whole_registers and not torch.is_autocast_enabled("cpu")


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INITIAL_STD)
    if isinstance(module, nn.Linear):
        torch.nn.init.zeros_(module.bias)
