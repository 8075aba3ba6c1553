"""Whatever state is saved comes back exactly, and rows can be found without us."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dlrm.checkpoints.checkpoint import CheckpointStore

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def identical(left: Any, right: Any) -> bool:
    """Equal in types, values and bits, at any depth."""
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.shape == right.shape
            and left.dtype == right.dtype
            and left.contiguous().reshape(-1).view(torch.uint8).tolist()
            == right.contiguous().reshape(-1).view(torch.uint8).tolist()
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(
            type(a) is type(b) and identical(left[a], right[b]) for a, b in zip(left, right, strict=True)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(identical, left, right))
    return repr(left) == repr(right)  # tells 1.0 from 1, -0.0 from 0.0, and knows NaN


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tensor = torch.randint(0, 100, shape, generator=generator).to(dtype)
    if draw(st.booleans()) and tensor.ndim > 1:
        tensor = tensor.transpose(0, 1)
    return tensor


SCALARS = st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats() | st.text(max_size=4)
KEYS = st.text(alphabet="ab/~0\u00e9", max_size=3) | st.integers(-2, 12) | st.just("__metadata__")
STATES = st.dictionaries(
    KEYS,
    st.recursive(
        SCALARS | tensors(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(KEYS, inner, max_size=4)
        ),
        max_leaves=12,
    ),
    max_size=4,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=STATES)
def test_any_nested_state_comes_back_exactly(state: dict[Any, Any], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    store = CheckpointStore(folder)
    store.save(state, samples=1)
    restored = store.restore_latest()
    assert restored is not None
    assert identical(restored.state, state)


def test_optimizer_state_comes_back_with_integer_keys_and_tuples(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.8, 0.9))
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    store = CheckpointStore(tmp_path)
    store.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, samples=4)
    restored = store.restore_latest()
    assert restored is not None
    assert identical(restored.state["optimizer"], optimizer.state_dict())
    assert restored.state["optimizer"]["param_groups"][0]["betas"] == (0.8, 0.9)
    assert set(restored.state["optimizer"]["state"]) == {0, 1}
    torch.optim.Adam(model.parameters()).load_state_dict(restored.state["optimizer"])


def test_views_of_one_storage_and_unusual_dtypes_come_back(tmp_path: Path) -> None:
    storage = torch.arange(24, dtype=torch.float32)
    state = {
        "whole": storage,
        "nested": {"same": storage, "overlap": storage[3:9], "column": storage.view(4, 6)[:, 2], "row": storage[:1]},
        "expanded": torch.tensor([7.0]).expand(5),
        "small": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
        "complex": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    store = CheckpointStore(tmp_path)
    store.save(state, samples=0)
    restored = store.restore_latest()
    assert restored is not None
    expected = {**state, "parameter": torch.ones(2), "complex": torch.tensor([1 - 2j], dtype=torch.complex64)}
    assert identical(restored.state, expected)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in restored.state["nested"].values())
    restored.state["whole"].zero_()  # memory of its own
    assert restored.state["nested"]["same"].sum() == storage.sum()


def test_rows_are_addressable_by_table_with_the_library_alone(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    weight = torch.randn(5, 4)
    store.save({"tables": {"user.weight": weight}, "dense": {"w": torch.ones(1)}}, samples=12)
    store.wait()
    folder = tmp_path / "samples-000000000012"
    assert {path.name for path in folder.iterdir()} == {
        "tables.safetensors",
        "dense.safetensors",
        "state.json",
        "manifest.json",
    }
    assert torch.equal(load_file(folder / "tables.safetensors")["user.weight"], weight)
    (tmp_path / "ordinary").touch()  # whoever may read what this user makes may read checkpoints
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "ordinary").stat().st_mode}


def test_a_top_level_key_that_is_no_file_name_is_kept_apart(tmp_path: Path) -> None:
    state = {key: torch.full((2,), float(i)) for i, key in enumerate(["../up", "..-up", "a", "A", "", "x" * 300])}
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(state, samples=1)
    restored = store.restore_latest()
    assert restored is not None
    assert identical(restored.state, state)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}
    files = [path.name.lower() for path in restored.info.folder.glob("*.safetensors")]
    assert len(set(files)) == len(state)  # also where a file system takes A for a


def test_shapes_types_and_names_may_change_between_saves(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    states: list[dict[str, Any]] = [
        {"a": torch.ones(3)},
        {"a": torch.full((3,), 2**40), "b": torch.ones(1)},
        {"a": torch.zeros(2, 2)},
    ]
    for samples, state in enumerate(states):
        store.save(state, samples=samples)
        restored = store.restore_latest()
        assert restored is not None
        assert identical(restored.state, state)


def test_names_that_meet_are_kept_apart(tmp_path: Path) -> None:
    a, b, c, d, e = (torch.full((2,), float(i)) for i in range(5))
    state = {"x": {"b/c": a, "b": {"c": b, "c~2": c}, 1: d, "1": e}, 7: a, "7": b}
    store = CheckpointStore(tmp_path)
    store.save(state, samples=1)  # type: ignore[arg-type]
    restored = store.restore_latest()
    assert restored is not None
    assert identical(restored.state, state)
