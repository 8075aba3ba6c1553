"""GRU4Rec (Hidasi et al. 2016; in the form of Tan et al. 2016, arXiv:1606.08117): a recurrent encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from contrastive.encoders.dropout import dropout
from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.encoders.jagged import check_lengths


class GRU4Rec(nn.Module):
    """Dropout on items, GRUs without bias, a linear layer on the last state; an `encoder.Encoder`.

    A recurrent network knows its positions, and has no keys to hide: a hidden item enters as the row of PAD.

    Args:
        config: `layers`, `gru_width` and `dropout`.
        dim: length of a row.
        max_length: longest history.
    """

    def __init__(self, config: EncoderConfig, dim: int, max_length: int) -> None:
        super().__init__()
        self.max_length, self.dropout = max_length, config.dropout
        self.gru = nn.GRU(dim, config.gru_width, num_layers=config.layers, bias=False)
        self.output = nn.Linear(config.gru_width, dim)
        for weight in self.gru.parameters():
            nn.init.xavier_uniform_(weight)

    def forward(self, vectors: Tensor, lengths: Tensor, hidden: Tensor) -> Tensor:
        """Encode histories; see `encoder.Encoder`.

        Raises:
            ValueError: a history is empty or longer than `max_length`, or the lengths do not add up.
        """
        check_lengths(lengths.cpu().numpy(), len(vectors), self.max_length)
        x = dropout(vectors, self.dropout if self.training else 0.0)
        _, states = self.gru(_pack(x, lengths))
        out: Tensor = self.output(states[-1])
        return out


def _pack(x: Tensor, lengths: Tensor) -> PackedSequence:
    """Order tokens by their step, and histories by their length, as torch's recurrent networks take them."""
    order = lengths.argsort(descending=True, stable=True)
    first = lengths.cumsum(0) - lengths
    steps = torch.arange(len(x), device=x.device) - first.repeat_interleave(lengths)
    rank = order.argsort().repeat_interleave(lengths)
    tokens = (steps * len(lengths) + rank).argsort()
    at_step = steps.bincount().cpu()
    return PackedSequence(x.index_select(0, tokens), at_step, order, order.argsort())
