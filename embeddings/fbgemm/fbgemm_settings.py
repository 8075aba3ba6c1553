"""What fbgemm's kernels can do of what a table asks for, and how they are asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from embeddings.row_optimizers import RowAdagrad, RowAdam, RowCowClip, RowLamb, RowSGD, RowWiseAdagrad
from embeddings.tables import TableConfig


def check_build(device: torch.device) -> None:
    """Checks that the fbgemm at hand is built for the device.

    Raises:
        ValueError: When it is the build without CUDA, whose kernels would be missing at the first batch.
    """
    import fbgemm_gpu

    variant = getattr(fbgemm_gpu, "__variant__", "cuda")
    if device.type == "cuda" and variant != "cuda":
        raise ValueError(
            f"kernel 'fbgemm': expected fbgemm's build for CUDA on device {str(device)!r}, got that for {variant}; "
            "`recforge doctor --fix` installs it"
        )


def check_supported(config: TableConfig, device: torch.device) -> None:
    """Checks that fbgemm trains a table as its configuration says.

    Raises:
        ValueError: When it cannot, or would do something else without a word; it names the table and what does it.
    """
    for expected, got in _complaints(config, device):
        raise ValueError(f"table {config.name!r}: expected {expected}, got {got}: fbgemm has it so on {device.type}")


def _complaints(config: TableConfig, device: torch.device) -> list[tuple[str, str]]:
    optimizer, on_cuda = config.optimizer, device.type == "cuda"
    kind, decay = type(optimizer).__name__, 0.0 if isinstance(optimizer, RowCowClip) else optimizer.weight_decay
    found: list[tuple[str, str]] = []
    if config.dim % 4:
        found.append(("dim to be a multiple of 4 for fbgemm", str(config.dim)))
    if config.memory != "device" and not on_cuda:
        found.append(("memory 'device'", repr(config.memory)))
    # fbgemm's own CPU kernels round to nearest, which loses small updates; nothing of it trains bf16.
    types = ("fp32", "fp16") if on_cuda else ("fp32",)
    if config.row_type not in types:
        found.append((f"row_type {' or '.join(map(repr, types))}", repr(config.row_type)))
    if isinstance(optimizer, (RowAdam, RowLamb, RowCowClip)) and not on_cuda:
        found.append(("SGD, Adagrad or row-wise Adagrad", kind))
    if isinstance(optimizer, RowCowClip):
        # Its row-wise Adagrad with a decay mode of that name is another algorithm.
        found.append(("another --tables.optimizer than cowclip", kind))
    if decay and (isinstance(optimizer, (RowSGD, RowAdagrad)) or not on_cuda):
        # It takes a weight decay there, and does nothing with it.
        found.append((f"{kind} without weight_decay", str(decay)))
    if isinstance(optimizer, RowLamb):
        if optimizer.trust != "row":
            found.append(("RowLamb with trust='row'", repr(optimizer.trust)))
        if config.initial_scale == 0:
            # Its trust ratio has no guard: a row of zeros would never move.
            found.append(("init_scale > 0 under RowLamb", str(config.init_scale)))
    return found


def shared_learning_rate(configs: Sequence[TableConfig], factors: Sequence[float]) -> float:
    """Gives the learning rate of tables that one fbgemm module updates together.

    Raises:
        ValueError: When their factors differ.
    """
    for config, factor in zip(configs, factors, strict=True):
        if factor != factors[0]:
            raise ValueError(
                f"table {config.name!r}: expected the learning rate factor of table {configs[0].name!r}, {factors[0]}, "
                f"as fbgemm updates them together, got {factor}; give them different TableConfig(group=...)"
            )
    return configs[0].optimizer.learning_rate * factors[0]


def set_eps(kernel: Any, config: TableConfig, factor: float) -> None:
    """Multiplies the ``eps`` of the table, and so of all tables, that an fbgemm module updates."""
    if not isinstance(config.optimizer, RowSGD):
        kernel.update_hyper_parameters({"eps": config.optimizer.eps * factor})


def kernel_settings(config: TableConfig) -> dict[str, Any]:
    """Says a table's optimizer and row type in the words of ``SplitTableBatchedEmbeddingBagsCodegen``."""
    # Imported here: loading fbgemm takes seconds, and the CPU's own kernels do without it.
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode

    optimizer = config.optimizer
    assert not isinstance(optimizer, RowCowClip), "check_supported refuses it"
    settings: dict[str, Any] = {
        "learning_rate": optimizer.learning_rate,
        "weights_precision": SparseType(config.row_type),
        "stochastic_rounding": config.row_type != "fp32",
    }
    if isinstance(optimizer, RowSGD):
        return settings | {"optimizer": EmbOptimType.EXACT_SGD}
    settings |= {"eps": optimizer.eps}
    if isinstance(optimizer, RowAdagrad):
        return settings | {"optimizer": EmbOptimType.EXACT_ADAGRAD}
    settings |= {"weight_decay": optimizer.weight_decay}
    if isinstance(optimizer, RowWiseAdagrad):
        mode = WeightDecayMode.L2 if optimizer.weight_decay else WeightDecayMode.NONE
        return settings | {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "weight_decay_mode": mode}
    # Adam's and LAMB's decay needs no mode: it is part of the direction there, as in RowAdam and RowLamb.
    settings |= {"beta1": optimizer.betas[0], "beta2": optimizer.betas[1]}
    if isinstance(optimizer, RowAdam):
        return settings | {"optimizer": EmbOptimType.ADAM}
    return settings | {"optimizer": EmbOptimType.PARTIAL_ROWWISE_LAMB if optimizer.partial else EmbOptimType.LAMB}
