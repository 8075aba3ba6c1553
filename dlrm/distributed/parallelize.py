"""Makes the replicated dense part one over ranks: equal weights at the start, gradients summed while backward runs.

Why not `DistributedDataParallel`: it averages gradients, where ours are those of the mean over the global batch and
are summed (a rank may have few samples of a batch, or none); it has no room for the control values that ride along
here, which would cost a message of their own in every step; and it does not say how long backward waited.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlrm.distributed.bucket_size import BUCKET_BYTES
from dlrm.distributed.ranks import Ranks

CONTROL_TYPE = torch.float32


class Control(NamedTuple):
    """What ranks tell one another with every step; received, each number is the sum over ranks."""

    loss: float = 0.0  # summed over samples
    samples: float = 0.0
    failures: float = 0.0
    asked_to_stop: float = 0.0
    time_is_up: float = 0.0


@dataclass
class _Bucket:
    """Gradients that travel as one message."""

    flat: Tensor
    views: dict[int, Tensor]  # by the parameter's place
    missing: int = 0
    work: Any = None


@dataclass
class _Plan:
    """Parameters of one bucket, while buckets are filled."""

    dtype: torch.dtype
    places: list[int] = field(default_factory=list)
    numel: int = 0


class DenseReducer:
    """Sums the gradients of dense parameters over ranks, bucket by bucket, while backward goes on.

    Parameters get their gradients late layers first, so buckets are filled in the reverse order of registration. A
    bucket leaves as soon as its last gradient is there and the buckets before it have left: every rank sends the same
    messages in the same order, also one whose batch is empty. They have a process group of their own, so that the
    order among them and the tables' messages does not matter. A parameter that has no gradient counts as zeros, or, if
    it has none on any rank, keeps none, so that the optimizer passes over it as in a process of its own.

    Args:
        parameters: those that the dense optimizer updates, the same on every rank.
        ranks: more than one.
        bucket_bytes: at which a bucket is full.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.parameters = list(parameters)
        self.ranks = ranks
        self._group = dist.new_group(timeout=ranks.timeout)
        self._buckets, self._bucket_of = self._make_buckets(bucket_bytes)
        self._tail = len(Control._fields) + len(self.parameters)  # control values, and who has a gradient
        self._control = Control()
        self._has_gradient: list[bool] = []
        self._launched = 0
        self._is_open = False
        for place, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._take, place))

    def begin(self, control: Control) -> None:
        """Make ready for a backward pass, at whose end all ranks know the sum of their `control`."""
        self._control, self._launched, self._is_open = control, 0, True
        self._has_gradient = [False] * len(self.parameters)
        for parameter in self.parameters:
            parameter.grad = None
        for bucket in self._buckets:
            bucket.missing, bucket.work = len(bucket.views), None

    def finish(self) -> Control:
        """Wait until every `.grad` is the sum over ranks, and return the sum of the control values."""
        for bucket in self._buckets:
            for place, view in bucket.views.items():
                if not self._has_gradient[place]:
                    view.zero_()
            bucket.missing = 0
        self._launch_complete()
        for bucket in self._buckets:
            bucket.work.wait()
        self._is_open = False
        tail: list[float] = self._buckets[-1].flat[-self._tail :].tolist()
        control, users = tail[: len(Control._fields)], tail[len(Control._fields) :]
        for place, (parameter, count) in enumerate(zip(self.parameters, users, strict=True)):
            parameter.grad = self._bucket_of[place].views[place] if count else None
        return Control(*control)

    def _make_buckets(self, bucket_bytes: int) -> tuple[list[_Bucket], dict[int, _Bucket]]:
        order = sorted(range(len(self.parameters)), reverse=True)
        # The last message is of a type that counts samples exactly.
        order.sort(key=lambda place: self.parameters[place].dtype == CONTROL_TYPE)
        plans: list[_Plan] = []
        for place in order:
            parameter = self.parameters[place]
            is_full = not plans or plans[-1].numel * parameter.element_size() >= bucket_bytes
            if is_full or plans[-1].dtype != parameter.dtype:
                plans.append(_Plan(parameter.dtype))
            plans[-1].places.append(place)
            plans[-1].numel += parameter.numel()
        if not plans or plans[-1].dtype != CONTROL_TYPE:
            plans.append(_Plan(CONTROL_TYPE))
        buckets = [self._allocate(plan, is_last=plan is plans[-1]) for plan in plans]
        return buckets, {place: bucket for bucket in buckets for place in bucket.views}

    def _allocate(self, plan: _Plan, *, is_last: bool) -> _Bucket:
        tail = len(Control._fields) + len(self.parameters) if is_last else 0
        device = self.parameters[0].device if self.parameters else torch.device(self.ranks.device)
        flat = torch.zeros(plan.numel + tail, dtype=plan.dtype, device=device)
        views, start = {}, 0
        for place in plan.places:
            parameter = self.parameters[place]
            views[place] = flat[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
        return _Bucket(flat, views)

    @torch.no_grad()
    def _take(self, place: int, parameter: Tensor) -> None:
        gradient = parameter.grad
        if not self._is_open or gradient is None:
            return
        if gradient.is_sparse:
            raise ValueError("ranks: expected dense gradients, got a sparse one; make a table of it (build_tables)")
        bucket = self._bucket_of[place]
        bucket.views[place].copy_(gradient)
        parameter.grad = None  # the copy travels
        self._has_gradient[place] = True
        bucket.missing -= 1
        self._launch_complete()

    def _launch_complete(self) -> None:
        while self._launched < len(self._buckets) and not self._buckets[self._launched].missing:
            bucket = self._buckets[self._launched]
            self._launched += 1
            if self._launched == len(self._buckets):
                tail = torch.tensor([*self._control, *map(float, self._has_gradient)], dtype=CONTROL_TYPE)
                bucket.flat[-self._tail :] = tail
            bucket.work = dist.all_reduce(bucket.flat, group=self._group, async_op=True)


@torch.no_grad()
def copy_from_first(tensors: Sequence[Tensor], ranks: Ranks) -> None:
    """Overwrite tensors with those of rank 0 (a collective call)."""
    for tensor in tensors:
        ranks.from_first(tensor)
