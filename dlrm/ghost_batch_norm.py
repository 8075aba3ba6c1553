"""Batch norm over small parts of a batch, so that its noise stays that of a small batch however large the batch is."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dlrm.distributed.ranks import Ranks

MomentumMode = Literal["per_step", "per_chunk"]


class GhostBatchNorm(nn.BatchNorm1d):
    """Ghost batch normalisation (Hoffer, Hubara, Soudry 2017, "Train longer, generalize better", algorithm 1).

    In training, the rank's batch [B, C] is cut into chunks of ``ghost`` rows, and each is normalised with its own mean
    and variance. Where the batch cannot be cut evenly, chunks are a little larger; one of fewer than ``ghost`` rows is
    a single chunk. A single row has no variance: it is normalised with the running statistics, which it leaves as they
    are, and so does a batch of no rows. In evaluation this is batch norm with its running statistics.

    Of n chunks with the statistics s_1 ... s_n (variances unbiased), and e = momentum, or e = momentum / n:

        running <- (1 - e)^n running + sum_i e (1 - e)^(n - i) s_i

    Chunks are those of one rank, and so are the running statistics, until `average_over_ranks`.

    Args:
        num_features: C.
        ghost: Rows of a chunk; with the whole batch in one, this is `torch.nn.BatchNorm1d` bit for bit.
        eps: Added to the variance.
        momentum: Weight of the new in the running statistics.
        momentum_mode: ``per_step`` spreads the momentum over a step's chunks (e = momentum / n), so that a step moves
            the running statistics about as far as plain batch norm's; ``per_chunk`` gives it to each, as published.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        num_features: int,
        ghost: int = 128,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        momentum_mode: MomentumMode = "per_step",
    ) -> None:
        if ghost < 2:
            raise ValueError(f"GhostBatchNorm: expected ghost >= 2, as one row has no variance, got {ghost}")
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"GhostBatchNorm: expected momentum in [0, 1], got {momentum}")
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.ghost, self.momentum_mode = ghost, momentum_mode

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [B, C]."""
        rows = len(input)
        chunks = max(1, rows // self.ghost)
        if not self.training or rows < 2:
            return self._normalise(input)
        if chunks == 1:
            return super().forward(input)
        size, larger = divmod(rows, chunks)
        # Chunks of two sizes, which differ by 1, as those of `torch.tensor_split`.
        cut = larger * (size + 1)
        parts = [(input[:cut], larger), (input[cut:], chunks - larger)]
        outputs, statistics = zip(*[self._normalise_chunks(part, count) for part, count in parts if count], strict=True)
        self._follow(*map(torch.cat, zip(*statistics, strict=True)))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def extra_repr(self) -> str:
        """Say what is different from batch norm, too."""
        own = f"ghost={self.ghost}, momentum_mode={self.momentum_mode}"
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, {own}"

    def _normalise(self, rows: Tensor) -> Tensor:
        """Normalise with the running statistics."""
        return nn.functional.batch_norm(
            rows, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    def _normalise_chunks(self, rows: Tensor, count: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Normalise each of ``count`` chunks of one size; return them with their means and unbiased variances."""
        wide = rows.view(count, -1, self.num_features).to(self.weight.dtype)
        size = wide.shape[1]
        variances, means = torch.var_mean(wide, dim=1, correction=0, keepdim=True)
        normal = (wide - means) * torch.rsqrt(variances + self.eps) * self.weight + self.bias
        statistics = means.detach().squeeze(1), variances.detach().squeeze(1) * (size / (size - 1))
        return normal.view_as(rows).to(rows.dtype), statistics

    @torch.no_grad()
    def _follow(self, means: Tensor, variances: Tensor) -> None:
        """Let the running statistics follow those of chunks, [n, C] each."""
        count = len(means)
        momentum = float(self.momentum or 0.0) / (count if self.momentum_mode == "per_step" else 1)
        powers = torch.arange(count - 1, -1, -1, dtype=means.dtype, device=means.device)
        weights = momentum * (1.0 - momentum) ** powers
        for running, new in ((self.running_mean, means), (self.running_var, variances)):
            if running is not None:
                running.mul_((1.0 - momentum) ** count).add_(weights @ new)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


@torch.no_grad()
def average_over_ranks(module: nn.Module, ranks: Ranks) -> None:
    """Give every `GhostBatchNorm` in a module the running statistics of all ranks together (a collective call).

    The mean is that of the means, and the variance, by the law of total variance, the mean of the variances and the
    variance of the means. Ranks that have not seen any rows yet do not count.
    """
    norms = [part for part in module.modules() if isinstance(part, GhostBatchNorm)]
    if ranks.count == 1 or not norms:
        return
    parts = []
    for norm in norms:
        mean, variance = norm.get_buffer("running_mean").double(), norm.get_buffer("running_var").double()
        has_seen = (norm.get_buffer("num_batches_tracked") > 0).double().view(1)
        parts.append(torch.cat([has_seen, has_seen * mean, has_seen * (variance + mean.square())]))
    summed = ranks.sum_tensor(torch.cat(parts)).split([len(part) for part in parts])
    for norm, total in zip(norms, summed, strict=True):
        if total[0] > 0:
            mean, square = (total[1:] / total[0]).chunk(2)
            norm.get_buffer("running_mean").copy_(mean)
            norm.get_buffer("running_var").copy_(square - mean.square())
