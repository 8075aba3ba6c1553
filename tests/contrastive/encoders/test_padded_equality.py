"""Encoders equal their padded originals in float64, values and gradients, though nothing is padded to the window."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.encoders.build import build_encoder
from contrastive.encoders.encoder_config import EncoderConfig

KERNELS = ("auto", "torch")
MIXED = [1, 50, 3, 1, 17, 50, 2, 8, 8, 31, 4, 4, 4, 9, 1, 49]


def make(references, kind, **settings):
    torch.manual_seed(0)
    config = EncoderConfig(kind=kind, **settings)
    return references.enlarge_weights(build_encoder(config, 64, 50))


def outputs_and_gradients(encode, encoder, histories, vectors, weights):
    """The histories' vectors, and the gradients of all weights and of all items which are shown."""
    vectors = vectors.clone().requires_grad_()
    shown = torch.where(histories.hidden[:, None], vectors.detach(), vectors)
    out = encode(shown)
    gradients = torch.autograd.grad((out.sin() * weights).sum(), [vectors, *encoder.parameters()])
    return [out.detach(), *gradients]


def assert_equal_to_padded(references, encoder, histories, tolerance=1e-5, **form):
    twin = copy.deepcopy(encoder).double()
    weights = torch.randn(len(histories.lengths), 64, dtype=torch.float64)
    expected = outputs_and_gradients(
        lambda vectors: references.encode_padded(twin, histories, vectors, **form),
        twin,
        histories,
        histories.vectors,
        weights,
    )
    dtype = next(encoder.parameters()).dtype
    got = outputs_and_gradients(
        lambda vectors: encoder(vectors, histories.lengths, histories.hidden),
        encoder,
        histories,
        histories.vectors.to(dtype),
        weights.to(dtype),
    )
    names = ["output", "vectors", *(name for name, _ in encoder.named_parameters())]
    for name, one, other in zip(names, got, expected, strict=True):
        # Gradients of weights are sums over all histories.
        scale = max(1.0, float(other.abs().max()))
        error = float((one.double() - other).abs().max()) / scale
        assert error < tolerance, (name, error)


FORMS = {
    "sasrec": ({"kind": "sasrec"}, {"left": False}),
    "sasrec, newest": ({"kind": "sasrec", "positions": "newest"}, {"left": True}),
    "sasrec, 3 layers, 1 head": ({"kind": "sasrec", "layers": 3, "heads": 1}, {"left": False}),
    "sasrec, 1 layer, 4 heads": ({"kind": "sasrec", "layers": 1, "heads": 4}, {"left": False}),
    "bsarec": ({"kind": "bsarec", "cutoff": 5, "alpha": 0.7}, {"left": True, "cutoff": 5, "alpha": 0.7}),
    "bsarec, oldest": (
        {"kind": "bsarec", "cutoff": 9, "alpha": 0.3, "positions": "oldest"},
        {"left": False, "cutoff": 9, "alpha": 0.3},
    ),
    "bsarec, all frequencies": ({"kind": "bsarec", "cutoff": 60}, {"left": True, "cutoff": 60, "alpha": 0.7}),
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hidden", ["nothing", "half", "half, and all of some"])
def test_an_encoder_equals_its_padded_original(references, form, kernels, hidden):
    built, padded = FORMS[form]
    all_hidden = (0, 1, 2, 9) if "all" in hidden else ()
    histories = references.draw_histories(MIXED, hide=0.0 if hidden == "nothing" else 0.5, all_hidden=all_hidden)
    assert_equal_to_padded(references, make(references, **built, kernels=kernels), histories, **padded)


@pytest.mark.parametrize("form", ["sasrec", "bsarec"])
def test_in_float64_they_are_equal_to_rounding(references, form):
    built, padded = FORMS[form]
    histories = references.draw_histories(MIXED, hide=0.3, all_hidden=(4, 5))
    assert_equal_to_padded(references, make(references, **built).double(), histories, tolerance=1e-11, **padded)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    hide=st.sampled_from([0.0, 0.3, 0.8]),
    seed=st.integers(0, 1000),
    form=st.sampled_from(["sasrec", "bsarec"]),
    kernels=st.sampled_from(KERNELS),
)
def test_any_lengths_in_any_order(references, lengths, hide, seed, form, kernels):
    built, padded = FORMS[form]
    blind = tuple(i for i in range(len(lengths)) if (seed >> i) & 1 and hide > 0.5)
    histories = references.draw_histories(lengths, hide=hide, seed=seed, all_hidden=blind)
    assert_equal_to_padded(references, make(references, **built, kernels=kernels), histories, **padded)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kind", ["sasrec", "bsarec", "gru4rec"])
def test_a_history_has_the_same_vector_in_every_batch(references, kind, kernels):
    encoder = make(references, kind, kernels=kernels)
    histories = references.draw_histories(MIXED, hide=0.5, all_hidden=(3,))
    vectors = histories.vectors.float()
    together = encoder(vectors, histories.lengths, histories.hidden)
    start = 0
    for history, length in enumerate(MIXED):
        own = slice(start, start + length)
        alone = encoder(vectors[own], histories.lengths[history : history + 1], histories.hidden[own])
        torch.testing.assert_close(alone[0], together[history], rtol=1e-5, atol=1e-5)
        start += length


@pytest.mark.parametrize("layers", [1, 2])
def test_gru4rec_equals_the_recurrence_written_out(references, layers):
    encoder = make(references, "gru4rec", layers=layers).double()
    histories = references.draw_histories(MIXED, hide=0.3)
    got = encoder(histories.vectors, histories.lengths, histories.hidden)
    for vector, items in zip(got, histories.vectors.split(MIXED), strict=True):
        for layer in range(layers):
            into, back = getattr(encoder.gru, f"weight_ih_l{layer}"), getattr(encoder.gru, f"weight_hh_l{layer}")
            state, states = torch.zeros(128, dtype=torch.float64), []
            for item in items:
                (r, z, n), (hr, hz, hn) = (into @ item).chunk(3), (back @ state).chunk(3)
                z = torch.sigmoid(z + hz)
                state = (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + z * state
                states.append(state)
            items = torch.stack(states)
        expected = encoder.output.weight @ state + encoder.output.bias
        torch.testing.assert_close(vector, expected, rtol=1e-10, atol=1e-10)
