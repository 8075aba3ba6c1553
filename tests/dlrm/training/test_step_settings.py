"""How the dense part runs, compiled, as graphs or with short factors: what is refused, what is said, what comes out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from dlrm.batched_dots import batched_dots
from dlrm.cli import main
from dlrm.config import StepConfig
from dlrm.interaction import DotInteraction
from dlrm.model import DenseNetwork, mlp
from dlrm.training.train_step import check_compile, compile_dense, describe_step, set_matmul_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def precision_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_graphs_need_the_compiler_and_a_gpu(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"^--step.cuda-graphs: expected --step.compile beside it, got none$"):
        StepConfig(cuda_graphs=True)
    monkeypatch.chdir(tmp_path)
    graphs = ["--step.device", "cpu", "--step.compile", "--step.cuda-graphs"]
    assert main(["train", "synthetic", *graphs]) != 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "cuda-graphs" in line]
    assert said.endswith("--step.cuda-graphs: expected --step.device cuda, got cpu")
    assert list(tmp_path.iterdir()) == []  # no data were made for it


def test_a_cpu_needs_a_compiler_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    check_compile(CUDA, cuda_graphs=True)
    with pytest.raises(ValueError, match=r"^--step.compile: expected g\+\+ or clang\+\+ on the PATH"):
        check_compile(CPU, cuda_graphs=False)


def test_only_the_dense_part_is_compiled_and_replayed_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[nn.Module, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode=None: asked.append((self, mode)))
    model = nn.Module()
    model.dense, model.tables = nn.Linear(1, 1), nn.Linear(1, 1)
    compile_dense(model, CUDA, cuda_graphs=True)
    compile_dense(model, CUDA)
    assert asked == [(model.dense, "reduce-overhead"), (model.dense, None)]


def test_short_factors_are_asked_of_torch_and_taken_back(precision_as_before: None) -> None:
    set_matmul_precision("tf32")
    assert torch.get_float32_matmul_precision() == "high"
    for other in ("fp32", "bf16"):
        set_matmul_precision(other)
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (StepConfig(), ["device cuda (auto)", "dense part not compiled"]),
        (StepConfig(precision="tf32", device="cuda"), ["device cuda (--step.device)", "factors of 10 bits on a GPU"]),
        (StepConfig(compile=True), ["dense part compiled (--step.compile)"]),
        (StepConfig(compile=True, cuda_graphs=True), ["replayed as CUDA graphs (--step.cuda-graphs)"]),
    ],
)
def test_what_was_chosen_is_said(config: StepConfig, words: list[str]) -> None:
    lines = "\n".join(describe_step(config, CUDA, 2))
    for phrase in words:
        assert phrase in lines
    assert ("replayed" in lines) == config.cuda_graphs


def network() -> DenseNetwork:
    torch.manual_seed(0)
    return DenseNetwork(bottom=mlp([3, 8]), interaction=DotInteraction(4, 8), top=(8,), dropout=0.0)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does so
@pytest.mark.parametrize("half", [False, True])
def test_batches_of_other_sizes_need_one_more_graph_and_give_the_same(
    half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: with its interaction, and traced with gradients; torch's own code in place of generated code."""
    monkeypatch.setattr("dlrm.interaction.pairwise_dots", batched_dots)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled, plain = network(), network()
    torch._dynamo.reset()
    compiled.compile(backend=keep, fullgraph=True)
    for size in (64, 64, 17, 64, 33):
        inputs = torch.randn(size, 3), torch.randn(size, 24, requires_grad=True)
        results = []
        for dense in (compiled, plain):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                logits = dense(*inputs)
            results.append([logits, *torch.autograd.grad(logits.float().sum(), [inputs[1], *dense.parameters()])])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    assert len(graphs) == 2
