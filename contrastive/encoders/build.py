"""From an encoder's configuration to the encoder."""

from __future__ import annotations

import pkgutil

from torch import nn

from contrastive.encoders.bsarec import BSARec
from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.encoders.gru4rec import GRU4Rec
from contrastive.encoders.sasrec import SASRec

_CLASSES = {"sasrec": SASRec, "bsarec": BSARec, "gru4rec": GRU4Rec}


def build_encoder(config: EncoderConfig, dim: int, max_length: int) -> nn.Module:
    """Build an `encoder.Encoder`, whose weights are drawn from torch's generator.

    Args:
        config: kind and sizes.
        dim: length of an item's row, and of the vectors that come out.
        max_length: longest history.

    Raises:
        ValueError: the kind names no class that makes a module, or its sizes do not suit.
    """
    if config.kind in _CLASSES:
        return _CLASSES[config.kind](config, dim, max_length)
    try:
        encoder = pkgutil.resolve_name(config.kind)(config, dim, max_length)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--encoder.kind: expected package.module:Class, got '{config.kind}': {error}") from error
    if not isinstance(encoder, nn.Module):
        raise ValueError(
            f"--encoder.kind: expected '{config.kind}' to make a torch module, got {type(encoder).__name__}"
        )
    return encoder
