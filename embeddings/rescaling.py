"""Rescales what row optimizers remember when the batch size changes in mid-run, so that rare rows keep their pace.

A row's gradient is that of the mean loss: g = (1 / B) * sum of h over its occurrences in a batch of B samples. With p
occurrences per sample, their number in a batch is Poisson(p * B). Let q(B) = 1 - exp(-p * B) be the probability that a
batch touches the row, and h_mean the mean of h. Over the batches that touch it, which are all that the state of a lazy
optimizer has seen,

    E[g | touched]      = p * h_mean / q(B)
    E[g ** 2 | touched] = (p / B * E[h ** 2] + p ** 2 * h_mean ** 2) / q(B)

For a rare row, p * B << 1, they are h_mean / B and E[h ** 2] / B ** 2: a batch k times as large makes gradients k times
smaller, and a state of the old size would slow the row down k times: Adagrad's for good, Adam's for some
1 / (1 - beta2) touches. For a frequent row, p * B >> 1, they are p * h_mean and p ** 2 * h_mean ** 2 + noise: about the
same for every batch size, as with dense weights. States are multiplied by what the expectations are after the change,
divided by what they were before it:

    first moment:                   q(before) / q(after)
    second moment, sum of squares:  q(before) / q(after) * (1 / after + p) / (1 / before + p)

where h_mean ** 2 = E[h ** 2] is taken for the second, which is not known: all gradients of a row are alike. It makes no
difference to rare rows; of a frequent one whose gradients are mostly noise, it leaves a second moment which is too
large by at most the ratio of the batch sizes, as that of dense weights is left, and which Adam forgets. The factors go
from before / after, and from its square, for p = 0 to 1 for frequent rows.

An optimizer that moves all rows has seen the other batches as well, so that q falls away: the first moment stays, and
the second one of a rare row is multiplied by before / after. Decay within a gradient and CowClip's bound, which do not
go with 1 / B, are not considered. ``eps`` is compared with gradients that become before / after times as large where it
matters most, on rare rows: see ``Tables.set_eps_factor``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from embeddings.interface import TableRows, Tables
from embeddings.row_optimizers import moves_all_rows

_SQUARES = ("sum_of_squares", "second_moment")


@torch.no_grad()
def rescale_states(
    tables: Tables, batch_before: float, batch_after: float, frequencies: Mapping[str, Tensor] | None = None
) -> None:
    """Rescales the row optimizers' states that this process holds for another number of samples per step.

    Args:
        tables: Whole ones or shards; every rank calls this.
        batch_before: Samples per step until now, over all ranks.
        batch_after: And from now on.
        frequencies: Of tables by name: how often each row is expected to occur in a sample, [num_rows], or a sparse
            tensor of the rows that do. Of others, each row is taken to occur as often as the next, with one id for
            each of the table's features in a sample.

    Raises:
        ValueError: When a batch size is not above 0, frequencies are not those of a table's rows, or no rows are here.
    """
    for batch in (batch_before, batch_after):
        if not 0 < batch < float("inf"):
            raise ValueError(f"rescale_states: expected batch sizes above 0, got {batch_before} and {batch_after}")
    if tables.far_tables():
        raise ValueError("rescale_states: expected rows in this process or its group, got tables on servers")
    for rows in tables.rows():
        is_lazy = not moves_all_rows(rows.config.optimizer)
        listed, rates = _rates_of(rows, frequencies or {})
        first, second = _factors(rates, batch_before, batch_after, is_lazy=is_lazy)
        never_first, never_second = _factors(
            torch.zeros(1, dtype=torch.float64), batch_before, batch_after, is_lazy=is_lazy
        )
        factors = {"first_moment": (first, never_first)} | dict.fromkeys(_SQUARES, (second, never_second))
        for name, state in rows.state.items():
            if name in factors:
                factor, never = (f.to(state) for f in factors[name])
                factor = factor[:, None] if state.ndim == 2 else factor
                if listed is None:
                    state.mul_(factor)
                else:
                    own = state[listed.to(state.device)] * factor
                    state.mul_(never)[listed.to(state.device)] = own


def _rates_of(rows: TableRows, frequencies: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
    """Returns rows, counted from the first one here, and their rates; None: of all rows, or one rate that all have."""
    config = rows.config
    if config.name not in frequencies:
        return None, torch.full((1,), len(config.features) / config.num_rows, dtype=torch.float64)
    given = frequencies[config.name].detach()
    given = given.cpu().double().coalesce() if given.is_sparse else given.to("cpu", torch.float64)
    rates = given.values() if given.is_sparse else given
    if given.shape != (config.num_rows,) or not bool((rates >= 0).all()):
        raise ValueError(
            f"frequencies of table {config.name!r}: expected {config.num_rows} numbers >= 0, got shape "
            f"{tuple(given.shape)}{f', the least {float(rates.min())}' if rates.numel() else ''}"
        )
    end = rows.first_row + rows.weight.shape[0]
    if not given.is_sparse:
        return None, rates[rows.first_row : end]
    (listed,) = given.indices()
    here = (listed >= rows.first_row) & (listed < end)
    return listed[here] - rows.first_row, rates[here]


def _factors(rates: Tensor, before: float, after: float, *, is_lazy: bool) -> tuple[Tensor, Tensor]:
    """Returns what first moments and squares are multiplied by, of rows that occur so often in a sample."""
    touches = torch.ones_like(rates)
    if is_lazy:
        touches = torch.expm1(-rates * before) / torch.expm1(-rates * after)
        touches[rates == 0] = before / after
    return touches, touches * (1 / after + rates) / (1 / before + rates)
