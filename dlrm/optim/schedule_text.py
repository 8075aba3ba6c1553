"""Formulas as texts: `warmup(50_000) * cosine(1_450_000, end=0.1)` and back, without ever running a text."""

from __future__ import annotations

import ast
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from dlrm.optim.decays import (
    ConstantWarmup,
    Cosine,
    Exp,
    Inverse,
    LinearWarmup,
    MultiStep,
    PolyDecay,
    Sigmoid,
    Step,
    WarmupRsqrtCooldown,
)
from dlrm.optim.formulas import Constant, Formula, Piecewise, as_formula, text_of
from dlrm.optim.stages import StageSchedule
from dlrm.optim.waves import CosineRestarts, CosineWave, Sawtooth, Sine, Triangular

FORMULAS: tuple[type[Formula], ...] = (
    *(LinearWarmup, ConstantWarmup, PolyDecay, WarmupRsqrtCooldown, Step, MultiStep, Exp, Inverse, Sigmoid, Cosine),
    *(Triangular, Sine, CosineWave, CosineRestarts, Sawtooth, Constant, Piecewise, StageSchedule),
)
NAMES: dict[str, type[Formula]] = {kind.name: kind for kind in FORMULAS}
EXAMPLE = "warmup(50_000) * cosine(1_450_000, end=0.1)"
LARGEST = 10**15  # whole numbers up to here are floats without rounding
# Of these, all positional arguments together are the one field.
_LISTS = (Piecewise, StageSchedule)


@lru_cache
def parse_formula(text: str) -> Formula:
    """Return the formula that a text describes.

    Args:
        text: calls of the formulas' names, and numbers, multiplied with each other.

    Raises:
        ValueError: in one line: there is no such formula or argument, a number is out of range, or it is no product.
    """
    try:
        return _read_product(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        shown = text if len(text) <= 100 else f"{text[:100]}..."
        raise ValueError(f"expected formulas as {EXAMPLE}, got '{shown}' ({error.msg})") from None
    except (RecursionError, MemoryError):
        raise ValueError(f"expected formulas as {EXAMPLE}, got a text that is nested too deeply") from None


def describe_arguments(kind: type[Formula]) -> str:
    """Return how a formula is called, as `warmup(samples, start=0)`."""
    if kind in _LISTS:
        return (
            f"{kind.name}({'(from_sample, formula)' if kind is Piecewise else '(samples, batch, warmup, rate)'}, ...)"
        )
    arguments = [
        item.name if item.default is MISSING else f"{item.name}={text_of(item.default)}" for item in fields(kind)
    ]
    return f"{kind.name}({', '.join(arguments)})"


def _read_product(node: ast.expr) -> Formula:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _read_product(node.left) * _read_product(node.right)
    if isinstance(node, ast.Call):
        return _read_call(node)
    value = _read_value(node)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected formulas as {EXAMPLE}, got {ast.unparse(node)}")
    return as_formula(value)


def _read_call(node: ast.Call) -> Formula:
    name = ast.unparse(node.func)
    kind = NAMES.get(name)
    if kind is None:
        close = get_close_matches(name, NAMES, n=1)
        hint = f", perhaps {close[0]}" if close else ""
        raise ValueError(f"expected one of the formulas {', '.join(NAMES)}, got {name}{hint}")
    values = [_read_value(argument) for argument in node.args]
    if kind in _LISTS:
        values = [tuple(values)]
    known = [item.name for item in fields(kind)]
    given = dict(zip([item.name for item in fields(kind) if not item.kw_only], values, strict=False))
    if len(values) > len(given):
        raise _wrong_arguments(kind, f"got {ast.unparse(node)}")
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg not in known or keyword.arg in given:
            raise _wrong_arguments(kind, f"got {ast.unparse(keyword)}")
        given[keyword.arg] = _read_value(keyword.value)
    for item in fields(kind):
        if item.default is MISSING and item.name not in given:
            raise _wrong_arguments(kind, f"got {ast.unparse(node)} without {item.name}")
    return kind(**given)


def _wrong_arguments(kind: type[Formula], got: str) -> ValueError:
    return ValueError(f"expected {describe_arguments(kind)}, {got}")


def _read_value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        if not abs(node.value) <= LARGEST:
            raise ValueError(f"expected a number up to {LARGEST:g}, got {ast.unparse(node)[:40]}")
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _read_value(node.operand)
        if isinstance(value, int | float):
            return -value
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(map(_read_value, node.elts))
    if isinstance(node, ast.Name) and node.id in ("true", "false"):
        return node.id == "true"
    if isinstance(node, ast.Call) or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        return _read_product(node)
    raise ValueError(f"expected a number, a formula or a list of these, got {ast.unparse(node)}")
