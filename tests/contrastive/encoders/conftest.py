"""Encoders as their papers and the published code write them: padded to the whole window, one head after the other."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear


def draw_histories(lengths, hide=0.0, dim=64, seed=0, all_hidden=()):
    """Vectors of items, PAD's among them where they are hidden."""
    torch.manual_seed(seed)
    lengths = torch.tensor(lengths)
    total = int(lengths.sum())
    pad, items = torch.randn(dim, dtype=torch.float64), torch.randn(total, dim, dtype=torch.float64)
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    hidden = (torch.rand(total) < hide) | torch.isin(owner, torch.tensor(all_hidden, dtype=torch.int64))
    # Not all of a history by chance: those are asked for.
    first = lengths.cumsum(0) - lengths
    for history, (start, length) in enumerate(zip(first.tolist(), lengths.tolist(), strict=True)):
        if history not in all_hidden and bool(hidden[start : start + length].all()):
            hidden[start + length // 2] = False
    items = torch.where(hidden[:, None], pad, items)
    return SimpleNamespace(lengths=lengths, vectors=items, hidden=hidden, pad=pad, max_length=50)


def pad_histories(histories, vectors, left):
    """Vectors [B, N, dim], PAD's where none is; [B, N] where an item is shown, and where one is; [B] the last."""
    size = (len(histories.lengths), histories.max_length)
    padded = histories.pad.expand(*size, -1).clone()
    shown, there = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
    start, last = 0, []
    for history, length in enumerate(histories.lengths.tolist()):
        first = histories.max_length - length if left else 0
        own, slots = slice(start, start + length), slice(first, first + length)
        hides = histories.hidden[own]
        padded[history, slots] = torch.where(hides[:, None], histories.pad, vectors[own])
        shown[history, slots] = ~hides
        there[history, slots] = True
        start += length
        last.append(slots.stop - 1)
    return padded, shown, there, torch.tensor(last)


def normalise(x, norm):
    return layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, 1e-12)


def attend(attention, x, shown, there=None):
    """Post-norm self-attention of [B, N, dim]; -1e4 on all keys that are hidden, padding or later.

    With `there`, hidden keys are nearer than those, so that a query with none but hidden keys before it sees these.
    """
    window, dim = x.shape[1:]
    heads, width = attention.heads, dim // attention.heads
    later = torch.ones(window, window, dtype=torch.bool).triu(1)
    masked = (later | ~shown[:, None, :]).double() * -10000.0
    if there is not None:
        blind = ~shown.any(1)[:, None, None]
        masked = torch.where((later | ~there[:, None, :]) & ~blind, -1e9, masked)
    weight, bias = attention.project.weight, attention.project.bias
    contexts = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        q, k, v = (linear(x, weight[part * dim :][own], bias[part * dim :][own]) for part in range(3))
        contexts.append((q @ k.mT / math.sqrt(width) + masked).softmax(-1) @ v)
    out = linear(torch.cat(contexts, -1), attention.output.weight, attention.output.bias)
    return normalise(x + out, attention.norm)


def filter_frequencies(module, x, cutoff):
    """BSARec's filter by torch's Fourier transform."""
    window = x.shape[1]
    spectrum = torch.fft.rfft(x, dim=1, norm="ortho")
    spectrum = torch.cat([spectrum[:, : cutoff // 2 + 1], torch.zeros_like(spectrum[:, cutoff // 2 + 1 :])], dim=1)
    low = torch.fft.irfft(spectrum, n=window, dim=1, norm="ortho")
    return normalise(x + low + module.beta**2 * (x - low), module.norm)


def encode_padded(encoder, histories, vectors, *, left, cutoff=None, alpha=0.0):
    """SASRec, or BSARec with `cutoff`."""
    x, shown, there, last = pad_histories(histories, vectors, left)
    blind = ~shown.any(1)
    x = normalise(x + encoder.positions.weight, encoder.norm)
    for mixer, network in zip(encoder.mixers, encoder.networks, strict=True):
        if cutoff is None:
            x = attend(mixer, x, shown)
        else:
            real = (there | blind[:, None])[:, :, None]
            filtered = filter_frequencies(mixer.filter, x * real, cutoff)
            x = alpha * filtered + (1 - alpha) * attend(mixer.attention, x, shown, there)
        inner = gelu(linear(x, network.widen.weight, network.widen.bias))
        x = normalise(x + linear(inner, network.narrow.weight, network.narrow.bias), network.norm)
    return x[torch.arange(len(x)), last]


def enlarge_weights(encoder, seed=1):
    """Makes what the initial weights hide visible: attention that differs, biases and norms that do something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(torch.randn_like(weight) * (0.15 if weight.dim() > 1 else 0.3))
    return encoder.eval()


@pytest.fixture(scope="session")
def references():
    return SimpleNamespace(draw_histories=draw_histories, encode_padded=encode_padded, enlarge_weights=enlarge_weights)
