"""BSARec: a frequency filter beside self-attention (Shin et al., AAAI 2024, arXiv:2312.10325)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.encoders.frequency_filter import FrequencyFilter
from contrastive.encoders.jagged import Layout
from contrastive.encoders.self_attention import SelfAttention
from contrastive.encoders.transformer import TransformerEncoder


class BSARec(TransformerEncoder):
    """SASRec whose layers begin with alpha * filter + (1 - alpha) * attention; an `encoder.Encoder`.

    Positions count from the newest item, as in the published code, which pads on the left. The filter takes
    `max_length` positions whatever a history's length, so that one history has the same vector in every batch.

    Args:
        config: sizes, dropout, `alpha` and `cutoff`.
        dim: length of a row.
        max_length: longest history.

    Raises:
        ValueError: the heads do not divide dim.
    """

    def __init__(self, config: EncoderConfig, dim: int, max_length: int) -> None:
        super().__init__(
            config,
            dim,
            max_length,
            config.positions or "newest",
            lambda: FilteredAttention(config, dim, max_length),
        )


class FilteredAttention(nn.Module):
    """The first half of a layer of BSARec, eq. 7: filter and attention side by side, each with residual and norm."""

    def __init__(self, config: EncoderConfig, dim: int, max_length: int) -> None:
        super().__init__()
        self.alpha = config.alpha
        self.filter = FrequencyFilter(dim, max_length, config.cutoff, config.dropout)
        self.attention = SelfAttention(dim, config.heads, config.dropout, config.attention_dropout)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Map the vectors of all slots [S, dim] to others."""
        return torch.lerp(self.attention(x, layout), self.filter(x, layout), self.alpha)

    def from_last(self, x: Tensor, last: Tensor, layout: Layout) -> Tensor:
        """Compute `forward` of each history's last item alone, [B, dim]."""
        attended = self.attention.from_last(x, last, layout)
        return torch.lerp(attended, self.filter.from_last(x, last, layout), self.alpha)
