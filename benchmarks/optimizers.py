"""What do LAMB and the gradient noise scale cost, beside torch's fused Adam and beside a training step?

One thread. The network is that of `benchmarks.click_networks`: MLPs of 13-256-128-64 and 415-256-128-1, in the groups
that training makes of them. `lamb_vs_adam` is the time of a step of LAMB over that of `torch.optim.Adam(fused=True)`
on the same groups, and `lamb_vs_adam_one_group` over Adam's without groups, which is its fastest form;
`lamb_bf16_vs_adam` is that of LAMB with a first moment in 16 bits. The two of a pair take turns, and each ratio is the
median over turns.

`noise_scale_step_share` is what measuring the noise scale adds to a step on average, when one in so many steps is
measured as is the default: the time of a measured step over that of another one (`noise_scale_measured_step`), less
1, divided by that number. Here 26 tables of 100,000 rows x 64 take part, with batches of 4,096 samples of one id per
bag. Times are the processor's, of this process: a busy neighbour takes turns away, but is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from dlrm.model import DLRM
    from dlrm.training.attachments import Attachment

WARM_UP = 3
STEPS_PER_TURN = 20  # of an optimizer, which takes a fraction of a millisecond
BATCHES = 4

Turn = Callable[[], float]  # gives its seconds


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="turns of each pair that are measured")
    parser.add_argument(
        "--small", action="store_true", help="tables and batches of nearly nothing, to see that it runs"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it when it is imported
    result = measure(arguments.rounds, small=arguments.small)
    print(json.dumps({name: round(figure, 4) for name, figure in result.items()}))


def measure(rounds: int, *, small: bool) -> dict[str, float]:
    """Measure optimizers, and then training steps."""
    import torch

    from dlrm.noise.config import NoiseScaleConfig
    from embeddings.allocation import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    result: dict[str, float] = {}
    names = ("lamb", "lamb_bf16", "adam_one_group", "adam")
    turns = {name: _build_optimizer_turn(name) for name in names}
    ratios, milliseconds = _take_turns(turns, "adam", rounds)
    result |= {"lamb_vs_adam": ratios["lamb"], "lamb_bf16_vs_adam": ratios["lamb_bf16"]}
    result["lamb_vs_adam_one_group"] = ratios["lamb"] / ratios["adam_one_group"]
    result |= {f"{name}_step_ms": milliseconds[name] for name in names}
    steps = {
        "measured": _build_step_turn(watched=True, small=small),
        "plain": _build_step_turn(watched=False, small=small),
    }
    ratios, milliseconds = _take_turns(steps, "plain", max(1, rounds // 4))
    result["noise_scale_measured_step"] = ratios["measured"]
    result["noise_scale_step_share"] = (ratios["measured"] - 1.0) / NoiseScaleConfig().every_steps
    result["training_step_ms"] = milliseconds["plain"]
    return result


def _take_turns(turns: dict[str, Turn], below: str, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return each one's time over that of ``below``, and its own in milliseconds."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + WARM_UP):
        for name, turn in turns.items():
            its = turn()
            if number >= WARM_UP:
                seconds[name].append(its)
    ratios = {
        name: statistics.median(one / other for one, other in zip(its, seconds[below], strict=True))
        for name, its in seconds.items()
    }
    milliseconds = {name: 1e3 * statistics.median(its) for name, its in seconds.items()}
    for name, ratio in ratios.items():
        print(f"{name}: {milliseconds[name]:.3f} ms, {ratio:.3f} of {below}", file=sys.stderr)
    return ratios, milliseconds


def _build_optimizer_turn(name: str) -> Turn:
    import torch

    model = _build_network(rows=2).dense
    for parameter in model.parameters():
        parameter.grad = 0.01 * torch.randn_like(parameter)
    optimizer = _build_optimizer(name, model)

    def turn() -> float:
        optimizer.step()  # pays for what the others left in the caches
        start = time.process_time()
        for _ in range(STEPS_PER_TURN):
            optimizer.step()
        return (time.process_time() - start) / STEPS_PER_TURN

    return turn


def _build_optimizer(name: str, model: nn.Module) -> Optimizer:
    import torch

    from dlrm.optim.config import DenseOptimizerConfig
    from dlrm.optim.dense import build_dense_optimizer
    from dlrm.optim.groups import group_parameters

    rate = 1e-5  # so that weights stay what they are, however long it takes
    if name.startswith("adam"):
        groups = group_parameters(model) if name == "adam" else model.parameters()
        return torch.optim.Adam(groups, lr=rate, fused=True)
    config = DenseOptimizerConfig(learning_rate=rate, moment_type="bf16" if name == "lamb_bf16" else "fp32")
    return build_dense_optimizer(config, model)


def _build_step_turn(*, watched: bool, small: bool) -> Turn:
    import torch

    from benchmarks.click_networks import BATCH_SIZE, NUM_ROWS, draw_batches
    from dlrm.batch import Batch
    from dlrm.optim.config import DenseOptimizerConfig
    from dlrm.optim.dense import build_dense_optimizer
    from dlrm.training.attachments import Attachments
    from dlrm.training.train_step import ClickTask, TrainStep

    model = _build_network(rows=NUM_ROWS)
    optimizer = build_dense_optimizer(DenseOptimizerConfig(), model)
    members = [_build_watch(model)] if watched else []
    step = TrainStep(ClickTask(model), optimizer, attachments=Attachments(members), split="benchmark")
    drawn = draw_batches(1 if small else BATCHES, multi_hot=False)
    rows, number = torch.arange(BATCH_SIZE), 0

    def turn() -> float:
        nonlocal number
        ids = drawn[number % len(drawn)]
        number += 1
        batch = Batch(dense=ids.dense, sparse=ids.keyed(), labels=ids.labels, rows=rows)
        start = time.process_time()
        step(batch, number * BATCH_SIZE)
        return time.process_time() - start

    return turn


def _build_watch(model: DLRM) -> Attachment:
    """Make what measures every step."""
    from dlrm.noise.config import NoiseScaleConfig
    from dlrm.noise.gradient_meter import GradientMeter
    from dlrm.training.noise_watch import NoiseWatch

    return NoiseWatch(GradientMeter(model), NoiseScaleConfig(every_steps=1))


def _build_network(*, rows: int) -> DLRM:
    from benchmarks.click_networks import BOTTOM, DIM, LEARNING_RATE, NAMES, NUM_NUMERIC, TOP
    from dlrm.model import DLRM
    from embeddings import RowWiseAdagrad, TableConfig

    optimizer = RowWiseAdagrad(learning_rate=LEARNING_RATE)
    return DLRM(
        num_numeric=NUM_NUMERIC,
        tables=[TableConfig(name=name, num_rows=rows, dim=DIM, optimizer=optimizer) for name in NAMES],
        dim=DIM,
        bottom=BOTTOM[:-1],
        top=TOP[:-1],
    )


if __name__ == "__main__":
    main()
