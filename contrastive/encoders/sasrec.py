"""SASRec (Kang and McAuley 2018, arXiv:1808.09781) in the form of RecBole, on which the published MCLRec stands."""

from __future__ import annotations

from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.encoders.self_attention import SelfAttention
from contrastive.encoders.transformer import TransformerEncoder


class SASRec(TransformerEncoder):
    """Causal self-attention, post-norm, GELU; an `encoder.Encoder`.

    A hidden item is seen by nobody, as its score gets -1e4; a history of nothing else is encoded as RecBole does.

    Args:
        config: sizes and dropout.
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
            config.positions or "oldest",
            lambda: SelfAttention(dim, config.heads, config.dropout, config.attention_dropout),
        )
