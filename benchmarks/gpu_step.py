"""How many samples per second does one GPU train, of NVIDIA's DLRM "small", and what share of its ceilings is that?

26 one-hot tables with the cardinalities of the Criteo Terabyte log (33 million rows of 128 numbers), bottom MLP
13-512-256-128, all pairs' dot products, top MLP 1024-1024-512-256-1, batch 65,536, uniform ids, dense part in bf16, SGD
on dense weights. Batches start in the CPU's memory and are copied ahead, as in training. Variants are timed one after
another, each over many steps between two events of the GPU, after some that are not measured.

The ceilings are measured in the same run: a copy of 2 GiB, and a product of two 8,192 x 8,192 matrices in bf16. The
floor is the bytes that the rows must move at the speed of the copy, plus the products at the speed of the product.
NVIDIA publishes 4.0 million samples/s on one A100. It prints one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu_network import (
    NVIDIA_SMALL,
    SMOKE,
    Shape,
    Step,
    build_network,
    draw_batches,
    flops,
    moved_bytes,
    without_memory,
)
from dlrm.batch import Batch
from dlrm.training.device_input import copy_ahead
from dlrm.training.look_ahead import look_ahead
from dlrm.training.train_step import ClickTask, TrainStep, compile_dense
from embeddings.stopwatch import Stopwatch

# name: row type, row optimizer, how the dense part runs
VARIANTS: dict[str, tuple[Any, str, str]] = {
    "eager": ("fp32", "rowwise_adagrad", "eager"),
    "compiled": ("fp32", "rowwise_adagrad", "compiled"),
    "cuda_graphs": ("fp32", "rowwise_adagrad", "cuda_graphs"),
    "compiled_sgd": ("fp32", "sgd", "compiled"),
    "compiled_fp16_rows": ("fp16", "rowwise_adagrad", "compiled"),
    "compiled_fp16_rows_sgd": ("fp16", "sgd", "compiled"),
    "trainer": ("fp32", "rowwise_adagrad", "trainer"),
}
BATCHES = 8
Train = Callable[[Iterator[Batch], int], None]  # so many steps


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a network of nearly nothing, to see that it runs")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=200, help="steps of each variant that are measured")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks.gpu_step: expected a GPU that torch can use, found none; --device cpu --small runs"
        )
    print(json.dumps(measure(torch.device(arguments.device), arguments.small, arguments.variants, arguments.steps)))


def measure(device: torch.device, small: bool, variants: list[str], steps: int) -> dict[str, Any]:
    """Measure the ceilings, then each variant; on the CPU only those that it has."""
    shape = SMOKE if small else NVIDIA_SMALL
    batches = draw_batches(shape, BATCHES)
    bandwidth, product_rate = _measure_ceilings(device, small)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "batch_size": shape.batch_size,
        "copy_bytes_per_second": bandwidth,
        "product_flops_per_second": product_rate,
    }
    for name in variants:
        row_type, optimizer, how = VARIANTS[name]
        if device.type == "cpu" and (row_type != "fp32" or how in ("compiled", "cuda_graphs")):
            continue
        train = _build(shape, device, row_type, optimizer, how)
        seconds = _time(train, batches, device, steps, small)
        bytes_moved = moved_bytes(
            shape,
            batches[:1],
            row_bytes=4 if row_type == "fp32" else 2,
            pooled_bytes=2 if device.type == "cuda" else 4,
            has_state=optimizer == "rowwise_adagrad",
        )
        shares = {"bandwidth": bytes_moved / bandwidth / seconds, "products": flops(shape) / product_rate / seconds}
        result[f"{name}_ms"] = seconds * 1e3
        result[f"{name}_samples_per_second"] = shape.batch_size / seconds
        result[f"{name}_bandwidth_share"], result[f"{name}_products_share"] = shares["bandwidth"], shares["products"]
        result[f"{name}_floor_share"] = sum(shares.values())
        result[f"{name}_where"] = _where(train, batches, device)
        print(f"{name:24} {seconds * 1e3:8.3f} ms {shape.batch_size / seconds / 1e6:7.2f} M/s", file=sys.stderr)
        del train
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    rates = {name: result[f"{name}_samples_per_second"] for name in variants if f"{name}_ms" in result}
    best = max(rates, key=lambda name: rates[name])
    return result | {"best": best, "samples_per_second": rates[best], "ms": result[f"{best}_ms"]}


def _build(shape: Shape, device: torch.device, row_type: Any, optimizer: str, how: str) -> Train:
    torch.manual_seed(0)
    model = build_network(shape, device, optimizer=optimizer, row_type=row_type)
    half = device.type == "cuda"
    if how in ("compiled", "cuda_graphs", "trainer") and half:
        compile_dense(model, device, cuda_graphs=how == "cuda_graphs")
    if how == "trainer":
        return _trainer_steps(model, device)
    step = Step(model, half=half)

    def train(batches: Iterator[Batch], count: int) -> None:
        before: torch.Tensor | None = None
        for _ in range(count):
            loss = step(next(batches))
            if before is not None:
                before.item()  # one step late, as a guard may read it without making the GPU wait
            model.tables.check_ids()
            before = loss

    return train


def _trainer_steps(model: Any, device: torch.device) -> Train:
    """The product's own step with its guards, which reads each loss before it goes on."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    precision = "bf16" if device.type == "cuda" else "fp32"
    step = TrainStep(ClickTask(model), optimizer, precision=precision)

    samples = 0

    def train(batches: Iterator[Batch], count: int) -> None:
        nonlocal samples
        # They are on the device already.
        for batch, following in look_ahead(itertools.islice(batches, count), torch.device("cpu"), Stopwatch()):
            samples += len(batch)
            step(batch, samples, following=following)

    return train


def _time(train: Train, batches: list[Batch], device: torch.device, steps: int, small: bool) -> float:
    with _input(batches, device) as ahead:
        train(ahead, 2 if small else 30)
        if device.type == "cpu":
            start = time.perf_counter()
            train(ahead, steps)
            return (time.perf_counter() - start) / steps
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        train(ahead, steps)
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / steps


@contextlib.contextmanager
def _input(batches: list[Batch], device: torch.device) -> Iterator[Iterator[Batch]]:
    ahead: Any = copy_ahead(without_memory(batches), device)
    try:
        yield ahead
    finally:
        ahead.close()  # ends its thread


def _where(train: Train, batches: list[Batch], device: torch.device) -> dict[str, float]:
    """Name what takes longest, in milliseconds per step: the GPU's kernels, or on the CPU torch's operators."""
    from torch.profiler import ProfilerActivity, profile

    steps, on_cuda = 4, device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_cuda else [])
    with _input(batches, device) as ahead:
        train(ahead, 1)
        with profile(activities=activities) as profiled:
            train(ahead, steps)
            if on_cuda:
                torch.cuda.synchronize()
    name = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, name))
    return {event.key[:60]: round(getattr(event, name) / steps / 1e3, 4) for event in events[:16]}


def _measure_ceilings(device: torch.device, small: bool) -> tuple[float, float]:
    """Measure bytes per second of a copy (read and written), and operations per second of a product."""
    numbers, side = ((1 << 16), 64) if small else ((1 << 29), 8192)
    source = torch.zeros(numbers, device=device)
    target = torch.empty_like(source)
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    copying = _time_one(lambda: target.copy_(source), device)
    multiplying = _time_one(lambda: torch.mm(left, right), device)
    return 2 * source.nbytes / copying, 2 * side**3 / multiplying


def _time_one(work: Callable[[], Any], device: torch.device, times: int = 20) -> float:
    for _ in range(3):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


if __name__ == "__main__":
    main()
