"""One checkpoint on disk: what its files hold, who writes them, and how a state is put together from them.

- `<group>.safetensors`: the tensors below one top-level key of the state, under their names in it.
- `state.json`: the rest of the state; which file holds which group; and where the pieces of parted tensors lie.
- `manifest.json`: see `manifest.py`.

Rank 0 writes what exists once, and its own pieces of what is parted. Any other rank r writes its pieces and the
entries that are each rank's own (`PER_RANK`): `rank-0000r.<group>.safetensors` and `rank-0000r.state.json`. One process
is rank 0.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cattrs
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dlrm.checkpoints.atomic_folder import sync
from dlrm.checkpoints.finite_state import check_block
from dlrm.checkpoints.manifest import FileInfo, Manifest, describe_file, own_versions, write_manifest
from dlrm.checkpoints.pieces import BLOCK_BYTES, PartedTensor, Parts, Piece, describe_pieces, merge_pieces
from dlrm.checkpoints.state_tree import FlatState, unflatten
from dlrm.checkpoints.tensor_file import TensorFile, write_blocks

STATE = "state.json"
PER_RANK = ("random", "stage_seconds", "prepared")


@dataclass(frozen=True, kw_only=True)
class RankFiles:
    """What one rank has written: its files, and group -> tensor -> its pieces among them."""

    files: dict[str, FileInfo]
    pieces: dict[str, dict[str, Any]]


def own_part(state: Mapping[str, object]) -> dict[str, object]:
    """Return the entries of a state that another rank than 0 saves."""
    return {key: value for key, value in state.items() if key in PER_RANK or isinstance(value, Parts)}


def write_rank_files(folder: Path, state: FlatState, rank: int, *, finite: bool = False) -> RankFiles:
    """Write a rank's files, down to the disk; rank 0's `state.json` comes later, as it tells of all ranks' pieces.

    Args:
        folder: exists.
        state: the rank's.
        rank: the rank.
        finite: refuse far pieces that hold NaN or infinities.

    Raises:
        ValueError: they do.
        OSError, safetensors.SafetensorError: a write failed, for instance because the disk is full.
    """
    names = _name_files(state.tensors, _prefix(rank))
    for group, tensors in state.tensors.items():
        if far := state.far.get(group):
            _write_far(folder / names[group], group, tensors, far, finite=finite)
        else:
            save_file(tensors, folder / names[group])
    written = list(names.values())
    if rank:
        _write_json(folder / f"{_prefix(rank)}{STATE}", {"files": names, "state": state.skeleton})
        written.append(f"{_prefix(rank)}{STATE}")
    files = {name: _settle(folder / name) for name in written}
    pieces = {group: describe_pieces(parts, names[group]) for group, parts in state.parts.items()}
    return RankFiles(files=files, pieces=pieces)


def _write_far(path: Path, group: str, tensors: Mapping[str, Tensor], far: Parts, *, finite: bool) -> None:
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    shapes |= {name: (tensor.dtype, tensor.shape) for name, tensor in far.items()}

    def blocks() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            yield name, tensor.contiguous()
        for name, first, block in _read_far(far):
            if finite:
                check_block(f"{group}/{name}", block, first)
            yield name, block

    write_blocks(path, shapes, blocks())


def _read_far(far: Parts) -> Iterator[tuple[str, int, Tensor]]:
    """Yield name, number of the first row, and rows of far tensors; each row is asked for once for all tensors."""
    together: dict[Callable[[int, int], Mapping[str, Tensor]], dict[str, str]] = {}
    for name, tensor in far.items():
        (piece,) = tensor.pieces
        assert piece.far is not None
        together.setdefault(piece.far.read_rows, {})[name] = piece.far.name
    for read_rows, names in together.items():
        held = [far[name] for name in names]
        row_bytes = sum(math.prod(tensor.shape[1:]) * tensor.dtype.itemsize for tensor in held)
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        for first in range(0, held[0].shape[0], step):
            rows = read_rows(first, min(first + step, held[0].shape[0]))
            for name, own in names.items():
                yield name, first, rows[own].contiguous()


def complete_checkpoint(
    folder: Path,
    state: FlatState,
    ranks: list[RankFiles],
    *,
    samples: int,
    metric: float | None,
    is_best: bool,
    save: str = "",
) -> None:
    """Write rank 0's `state.json` and the manifest, once all ranks have written their files.

    Args:
        folder: holds these files.
        state: rank 0's.
        ranks: what each has written, by rank.
        samples: of the manifest, as all that follows.
        metric: NaN counts as None.
        is_best: as is.
        save: as is.

    Raises:
        ValueError: the ranks' pieces do not make up the whole of a tensor.
        OSError: a write failed, or a rank's file is not there.
    """
    groups = {group: merge_pieces([rank.pieces[group] for rank in ranks]) for group in state.parts}
    for parts in groups.values():
        for name, tensor in _open_parts(folder, parts).items():
            tensor.check_tiled(name)
    for name, info in ((name, info) for rank in ranks[1:] for name, info in rank.files.items()):
        if (size := (folder / name).stat().st_size) != info.bytes:
            raise OSError(f"expected {info.bytes} bytes in {name}, got {size}")
    names = _name_files(state.tensors)
    _write_json(folder / STATE, {"files": names, "state": state.skeleton, "pieces": groups})
    files = {name: info for rank in ranks for name, info in rank.files.items()}
    manifest = Manifest(
        samples=samples,
        metric=metric if metric is not None and math.isfinite(metric) else None,
        is_best=is_best,
        files=files | {STATE: _settle(folder / STATE)},
        written_with=own_versions(),
        ranks=len(ranks),
        save=save,
    )
    write_manifest(folder, manifest)


def write_done(folder: Path, rank: int, written: RankFiles) -> None:
    """Say in the folder, atomically, that a rank has written its files."""
    scratch = folder / f"{_prefix(rank)}tmp"
    _write_json(scratch, asdict(written))
    sync(scratch)
    scratch.rename(_done(folder, rank))
    sync(folder)


def take_done(folder: Path, rank: int) -> RankFiles | None:
    """Return, once, what a rank has written; None if it is not done yet."""
    path = _done(folder, rank)
    if not path.exists():
        return None
    written = cattrs.structure(json.loads(path.read_text(encoding="utf-8")), RankFiles)
    path.unlink()
    return written


def read_state(folder: Path, manifest: Manifest, rank: int = 0) -> dict[str, Any]:
    """Read the state of a checkpoint whose files are intact, as a rank sees it.

    Tensors lie in memory of their own, on the CPU; parted tensors are read when they are asked for. Of a rank that had
    no part in the save, the entries that are each rank's own say only `{"rank": ..., "samples": ...}`.
    """
    content = json.loads((folder / STATE).read_text(encoding="utf-8"))
    parts = {group: _open_parts(folder, described) for group, described in content.get("pieces", {}).items()}
    state = _read_skeleton(folder, content, parts)
    if rank:
        own_file = f"{_prefix(rank)}{STATE}"
        own: dict[str, Any] = {}
        if own_file in manifest.files:
            own = _read_skeleton(folder, json.loads((folder / own_file).read_text(encoding="utf-8")), parts)
        for key in PER_RANK:
            if key in state:
                state[key] = own.get(key, {"rank": rank, "samples": manifest.samples})
    return state


def _read_skeleton(folder: Path, content: Any, parts: dict[str, Parts]) -> dict[str, Any]:
    with ExitStack() as stack:
        # Read rather than mapped: mapped pages count as the process's memory, beside the tensors made of them.
        files = {
            group: stack.enter_context(safe_open(folder / name, framework="pt", backend="pread"))
            for group, name in content["files"].items()
            if group not in parts
        }

        def find(group: str, name: str) -> Tensor:
            # Cloned, as torch aligns its memory to 64 bytes, which can decide in which order a kernel sums.
            tensor: Tensor = files[group].get_tensor(name).clone()
            return tensor

        state: dict[str, Any] = unflatten(content["state"], find, parts.__getitem__)
    return state


def _open_parts(folder: Path, described: Mapping[str, Any]) -> Parts:
    files: dict[str, TensorFile] = {}
    parts = Parts()
    for name, tensor in described.items():
        pieces = []
        for piece in tensor["pieces"]:
            file = files.setdefault(piece["file"], TensorFile(folder / piece["file"]))
            read = partial(file.read, piece["name"])
            pieces.append(Piece(first=tuple(piece["first"]), shape=tuple(piece["shape"]), read=read))
        dtype = getattr(torch, tensor["dtype"])
        parts[name] = PartedTensor(shape=tuple(tensor["shape"]), dtype=dtype, pieces=tuple(pieces))
    return parts


def _name_files(groups: Iterable[str], prefix: str = "") -> dict[str, str]:
    """Give every group a file whose name any file system takes."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for group in groups:
        stem = wanted = re.sub(r"[^\w-]", "_", group, flags=re.ASCII)[:100] or "_"
        attempt = 1
        while stem.lower() in taken:
            attempt += 1
            stem = f"{wanted}-{attempt}"
        taken.add(stem.lower())
        names[group] = f"{prefix}{stem}.safetensors"
    return names


def _prefix(rank: int) -> str:
    return f"rank-{rank:05d}." if rank else ""


def _done(folder: Path, rank: int) -> Path:
    return folder / f"{_prefix(rank)}done"


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def _settle(path: Path) -> FileInfo:
    """Wait until a file is on the disk, and describe it."""
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that nobody else may read
    sync(path)
    return describe_file(path)
