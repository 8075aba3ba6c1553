"""Checkpoints come back exactly, survive kills, damage and full disks, and are snapshots of one moment."""

from __future__ import annotations

import json
import random
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dlrm.checkpoints import checkpoint_folder, manifest
from dlrm.checkpoints.checkpoint import CheckpointStore


def test_a_checkpoint_holds_the_state_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    rows = torch.zeros(1_000_000)
    progress = {"seen": [0]}
    store = CheckpointStore(tmp_path, keep_last=10)
    for step in range(1, 4):  # the copies are reused from save to save
        rows.fill_(step)
        progress["seen"][0] = step
        store.save({"tables": {"a.weight": rows}, "progress": progress}, samples=step)
        rows.fill_(-1.0)
        progress["seen"][0] = -1
    store.wait()
    for info in store.list():
        written = load_file(info.folder / "tables.safetensors")["a.weight"]
        assert written.unique().tolist() == [info.samples]
    restored = store.restore_latest()
    assert restored is not None
    assert restored.state["progress"] == {"seen": [3]}


def test_saving_returns_while_the_write_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_begun, go_on = threading.Event(), threading.Event()
    write = checkpoint_folder.write_rank_files

    def write_later(*args: Any, **kwargs: Any) -> Any:
        has_begun.set()
        assert go_on.wait(timeout=30)
        return write(*args, **kwargs)

    monkeypatch.setattr("dlrm.checkpoints.checkpoint.write_rank_files", write_later)
    store = CheckpointStore(tmp_path)
    store.save({"a": torch.ones(1)}, samples=1)
    assert store.list() == ()
    while not has_begun.wait(timeout=0.1):
        assert store._pending is not None
        assert not store._pending.done()
    CheckpointStore(tmp_path)  # a second process that starts removes nothing that is being written
    threading.Timer(0.2, go_on.set).start()
    store.save({"a": torch.ones(1)}, samples=2)  # waits for the first
    assert [info.samples for info in store.list()][-1] == 1
    store.wait()
    assert [info.samples for info in store.list()] == [2, 1]


def test_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for samples, metric in enumerate([0.5, 0.7, 0.6, 0.8, 0.75, 0.7, float("nan")]):
        store.save(
            {"a": torch.tensor(metric).nan_to_num()}, samples=samples, metric=metric, is_best=metric in (0.5, 0.7, 0.8)
        )
        if samples == 4:
            store.wait()
            assert [(info.samples, info.is_best) for info in store.list()] == [(4, False), (3, True)]
    # The 0.7 at 5 samples was declared the best by its caller, who is believed.
    store.wait()
    assert [(info.samples, info.metric) for info in store.list()] == [(6, None), (5, 0.7)]
    store.save({"a": torch.ones(())}, samples=7)
    store.save({"a": torch.ones(())}, samples=8)
    store.wait()
    assert [(info.samples, info.is_best) for info in store.list()] == [(8, False), (7, False), (5, True)]
    assert len(list(tmp_path.iterdir())) == 3
    best = CheckpointStore(tmp_path).restore_best()
    assert best is not None
    assert (best.info.samples, best.info.metric) == (5, 0.7)
    assert best.state["a"] == torch.tensor(0.7)


def test_a_checkpoint_of_as_many_samples_is_replaced_by_the_later_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for samples, value in [(1, 1.0), (2, 2.0), (2, 2.5), (2, 2.75)]:
        store.save({"a": torch.tensor(value)}, samples=samples)
    restored = store.restore_latest()
    assert restored is not None
    assert restored.state["a"] == 2.75
    assert [info.samples for info in store.list()] == [2, 1]


def test_nothing_there_is_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "never")
    assert store.restore_latest() is None
    assert store.restore_best() is None
    assert store.list() == ()
    assert not (tmp_path / "never").exists()
    store.save({"a": 1}, samples=1)
    assert store.restore_best() is None


def fill(folder: Path) -> CheckpointStore:
    store = CheckpointStore(folder)
    for samples in (100, 200):
        generator = torch.Generator().manual_seed(samples)
        state = {
            "tables": {"a.weight": torch.randn(40, 4, generator=generator)},
            "dense": {"w": torch.randn(7, generator=generator)},
            "progress": {"samples": samples, "rate": 0.1},
        }
        store.save(state, samples=samples, metric=samples / 1000, is_best=True)
    store.wait()
    return store


def test_any_damaged_byte_is_named_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    dice = random.Random(7)
    fill(tmp_path / "intact")
    names = ["tables.safetensors", "dense.safetensors", "state.json", "manifest.json"]
    for trial in range(160):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "intact", folder)
        name = names[trial % 4]
        path = folder / "samples-000000000200" / name
        content = bytearray(path.read_bytes())
        place = dice.randrange(len(content))
        kind = dice.choice(["flip", "truncate", "append", "zero", "delete"])
        if kind == "flip":
            content[place] ^= 1 << dice.randrange(8)
        elif kind == "truncate":
            del content[place:]
        elif kind == "append":
            content += b" "
        elif kind == "zero":
            content[place:] = bytes(len(content) - place)
        if kind == "delete":
            path.unlink()
        elif bytes(content) == path.read_bytes():
            continue
        else:
            path.write_bytes(content)
        for restored in (CheckpointStore(folder).restore_latest(), CheckpointStore(folder).restore_best()):
            assert restored is not None
            assert restored.state["progress"]["samples"] == 100, (name, kind, place)
            (line,) = restored.skipped
            assert "samples-000000000200" in line, line
            assert name in line, line
            assert "after 100 samples" in line, line
            assert "\n" not in line, line
            if kind in ("truncate", "append") and name != "manifest.json":
                assert f"got {len(content)}" in line, line


def test_every_checkpoint_damaged_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "samples-000000000100" / "state.json").unlink()
    (tmp_path / "samples-000000000200" / "manifest.json").write_text("[]")
    reasons = r"intact.*samples-000000000200: manifest.*samples-000000000100: state.*"
    with pytest.raises(ValueError, match=reasons + "another --output$"):
        CheckpointStore(tmp_path).restore_latest()
    with pytest.raises(ValueError, match=reasons + "--evaluation.no-test-best$"):
        CheckpointStore(tmp_path).restore_best()


def test_a_newer_format_is_an_error_and_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    monkeypatch.setattr(manifest, "READABLE", (0,))
    with pytest.raises(ValueError, match="expected checkpoint format 0, got 2"):
        CheckpointStore(tmp_path).restore_latest()


def test_a_run_goes_on_past_a_damaged_checkpoint_and_replaces_it(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "samples-000000000200" / "tables.safetensors").write_bytes(b"")
    store = CheckpointStore(tmp_path, keep_last=2)
    restored = store.restore_latest()
    assert restored is not None
    store.save(restored.state | {"again": True}, samples=150)
    store.wait()
    assert (tmp_path / "samples-000000000200").exists()  # newer than all that is kept: somebody may want to look at it
    store.save(restored.state | {"again": True}, samples=200)
    store.save(restored.state | {"again": True}, samples=250)
    restored = store.restore_latest()
    assert restored is not None
    assert restored.skipped == ()
    assert restored.state["again"]
    assert [info.samples for info in CheckpointStore(tmp_path).list()] == [250, 200, 100]  # 100 is the best intact one
    assert not (tmp_path / "samples-000000000200").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_a_state_that_is_not_finite_is_not_written(bad: float, dtype: torch.dtype, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save({"tables": {"user.weight": torch.zeros(3)}}, samples=1)
    rows = torch.zeros(30_000, 4, dtype=dtype)
    rows[20_003, 2] = bad
    store.save({"tables": {"item.weight": torch.zeros(2), "user.weight": rows}}, samples=2)
    with pytest.raises(
        ValueError, match=r"2 samples was not written.*tables/user\.weight.* in row 20003;.*after 1 sam"
    ):
        store.wait()
    assert [info.samples for info in store.list()] == [1]
    store.save({"tables": {"user.weight": torch.ones(3)}}, samples=3)  # it can go on
    store.wait()
    unchecked = CheckpointStore(tmp_path, finite=False)
    unchecked.save({"tables": {"user.weight": rows}}, samples=4)
    restored = unchecked.restore_latest()
    assert restored is not None
    assert torch.equal(restored.state["tables"]["user.weight"].view(torch.uint8), rows.view(torch.uint8))


@pytest.mark.parametrize("place", [0, 32_767, 32_768, 65_540])
def test_no_place_of_a_tensor_escapes_the_check(place: int, tmp_path: Path) -> None:
    values = torch.zeros(65_541)
    values[place] = float("nan")
    store = CheckpointStore(tmp_path)
    store.save({"dense": values}, samples=1)
    with pytest.raises(ValueError, match=f"dense/dense, got nan in row {place};"):
        store.wait()


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ([1], "state: expected a dict, got list"),
        ({"a": {"b": {1, 2}}}, "state 'a/b': expected tensor.*got set"),
        ({"a": {1.5: 0}}, "state 'a': expected keys that are str or int, got 1.5"),
        ({"a": [torch.eye(2).to_sparse()]}, "state 'a/0': expected a dense tensor"),
        ({"a": torch.empty(2, device="meta")}, "state 'a': expected a dense tensor"),
    ],
)
def test_what_cannot_be_saved_is_named_at_once(state: Any, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        CheckpointStore(tmp_path).save(state, samples=1)


def test_keep_last_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--checkpoint\.keep-last: expected at least 1, got 0"):
        CheckpointStore(tmp_path, keep_last=0)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_one_line(message: str) -> None:
    assert "\n" not in message
    for part in (
        "after 2 samples was not written",
        "4,000,000 bytes",
        "--output",
        "kept: the checkpoints after 1 samples",
    ):
        assert part in message, message


def test_a_write_that_fails_loses_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save({"tables": torch.ones(1000)}, samples=1)
    store.wait()
    with largest_file(100_000):
        store.save({"tables": torch.ones(1_000_000)}, samples=2)
        with pytest.raises(ValueError, match="not written") as caught:
            store.save({"tables": torch.ones(10)}, samples=3)
    assert_one_line(str(caught.value))
    assert [path.name for path in tmp_path.iterdir()] == ["samples-000000000001"]
    store.save({"tables": torch.ones(1_000_000)}, samples=4)
    restored = store.restore_latest()
    assert restored is not None
    assert restored.info.samples == 4


def test_a_disk_without_room_is_found_out_before_it_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    store.save({"tables": torch.ones(1000)}, samples=1)
    store.wait()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    store.save({"tables": torch.ones(1_000_000)}, samples=2)
    with pytest.raises(ValueError, match=r"the disk is full.*got 1,000,000;") as caught:
        store.wait()
    assert_one_line(str(caught.value))
    assert [path.name for path in tmp_path.iterdir()] == ["samples-000000000001"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = CheckpointStore(tmp_path / "file" / "checkpoints")
    store.save({"a": 1}, samples=1)
    with pytest.raises(ValueError, match=r"1 samples was not written.*there is no earlier checkpoint"):
        store.wait()


def test_manifests_say_what_wrote_them(tmp_path: Path) -> None:
    fill(tmp_path)
    said = json.loads((tmp_path / "samples-000000000200" / "manifest.json").read_text())
    assert said["format_version"] == 2
    assert said["samples"] == 200
    assert said["metric"] == 0.2
    assert said["ranks"] == 1
    assert said["written_with"]["torch"] == torch.__version__
    sizes = {name: info["bytes"] for name, info in said["files"].items()}
    assert sizes == {p.name: p.stat().st_size for p in (tmp_path / "samples-000000000200").iterdir() if p.name in sizes}
    assert CheckpointStore(tmp_path).list()[0].bytes == sum(sizes.values())


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / ".writing-dead").mkdir()
    (tmp_path / ".writing-dead" / "tables.safetensors").write_bytes(b"half")
    (tmp_path / ".removing-dead").mkdir()
    holder = (
        "import fcntl, os, sys\nos.mkdir(sys.argv[1])\nfcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / ".writing-alive")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as alive:
        assert alive.stdout is not None
        assert alive.stdout.readline() == "held\n"
        CheckpointStore(tmp_path)
        assert {path.name for path in tmp_path.glob(".*")} == {".writing-alive"}
        alive.kill()
    CheckpointStore(tmp_path)
    assert list(tmp_path.glob(".*")) == []
    assert [info.samples for info in CheckpointStore(tmp_path).list()] == [200, 100]
