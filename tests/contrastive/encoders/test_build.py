"""What users say wrongly is told in one line, and modules of their own are taken."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from contrastive.encoders.build import build_encoder
from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.encoders.sasrec import SASRec


class Mean(nn.Module):
    """An encoder of a user's own."""

    def __init__(self, config, dim, max_length):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, vectors, lengths, hidden):
        return torch.stack([part.mean(0) for part in vectors.split(lengths.tolist())]) * self.scale


def not_a_module(config, dim, max_length):
    return "nothing"


@pytest.fixture
def own_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "an_encoder_of_my_own", sys.modules[__name__])
    return "an_encoder_of_my_own"


def test_any_module_of_the_same_form_is_an_encoder(own_module):
    encoder = build_encoder(EncoderConfig(kind=f"{own_module}:Mean"), 4, 50)
    out = encoder(torch.arange(12.0).view(3, 4), torch.tensor([1, 2]), torch.zeros(3, dtype=torch.bool))
    assert out.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]


@pytest.mark.parametrize("kind", ["no_such_package.here:Thing", "{own}:Nothing", "{own}:not_a_module"])
def test_a_kind_that_makes_no_module_is_told(own_module, kind):
    with pytest.raises(ValueError, match=r"--encoder\.kind: expected"):
        build_encoder(EncoderConfig(kind=kind.format(own=own_module)), 4, 50)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"kind": "transformer"}, "kind"),
        ({"layers": 0}, "layers"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention_dropout": -0.1}, "attention-dropout"),
        ({"alpha": 1.5}, "alpha"),
        ({"cutoff": 0}, "cutoff"),
    ],
)
def test_settings_out_of_range_name_their_flag(settings, flag):
    with pytest.raises(ValueError, match=rf"^--encoder\.{flag}: expected "):
        EncoderConfig(**settings)


def test_heads_that_do_not_divide_the_row_are_told():
    with pytest.raises(ValueError, match=r"--encoder\.heads: expected a divisor of the rows' length 64, got 3"):
        build_encoder(EncoderConfig(heads=3), 64, 50)


@pytest.mark.parametrize("kind", ["sasrec", "bsarec", "gru4rec"])
@pytest.mark.parametrize(
    ("lengths", "tokens", "message"),
    [
        ([51], 51, "expected histories of 1 to 50 items, got 51 to 51"),
        ([2, 0], 2, "expected histories of 1 to 50 items, got 0 to 2"),
        ([], 0, "got no history"),
        ([2, 3], 6, "expected 5 items, the sum of the histories' lengths, got 6"),
    ],
)
def test_histories_which_cannot_be_are_told(kind, lengths, tokens, message):
    encoder = build_encoder(EncoderConfig(kind=kind), 64, 50)
    with pytest.raises(ValueError, match=message):
        encoder(
            torch.zeros(tokens, 64), torch.tensor(lengths, dtype=torch.int64), torch.zeros(tokens, dtype=torch.bool)
        )


def test_weights_begin_as_published():
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(), 64, 50)
    assert isinstance(encoder, SASRec)
    for name, weight in encoder.named_parameters():
        if weight.dim() == 2:
            assert abs(weight.std() - 0.02) < 0.002, name
            assert abs(weight.mean()) < 0.002, name
        elif name.endswith("norm.weight"):
            assert torch.equal(weight, torch.ones(64)), name
        else:
            assert not weight.any(), name
    # The published model has 877,888 with its 12,103 rows of 64.
    assert sum(weight.numel() for weight in encoder.parameters()) == 877_888 - 12_103 * 64
    torch.manual_seed(0)
    vectors = torch.randn(40, 64) * 0.02
    out = encoder.eval()(vectors, torch.tensor([40]), torch.zeros(40, dtype=torch.bool))
    assert abs(out.norm() - 8) < 0.01


def test_the_configuration_does_not_import_torch():
    code = "import sys, contrastive.encoders.encoder_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
