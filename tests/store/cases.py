"""A small model's records, an oracle that writes them, and devices that are slow, full or dead."""

import errno
import hashlib
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightstream.blocks import Block, Parameter
from weightstream.store.device import Device
from weightstream.store.initial import Recipe
from weightstream.store.layout import Precision, RecordLayout
from weightstream.store.optimizers import AdamW
from weightstream.store.recipes import Step
from weightstream.store.segments import AlignedBuffer, RecordBuffer, part_tensors
from weightstream.store.sparsity import SparsePiece, Sparsity
from weightstream.store.store import Store
from weightstream.store.tiers import Disk

CHUNK_BYTES = 4096  # several chunks per part, even of these small records
CONTRACT = {"seed": 3, "reduction_groups": 8, "shape": [1, 2]}


_SHAPES = {
    "embed": {"weight": (500, 8)},
    "odd": {"weight": (33, 80), "bias": (33,), "scale": (), "none": (0, 4), "frozen": (5, 3)},
    "still": {"weight": (4, 4), "bias": (4,)},
}  # awkward ones, and a block that is never trained


def _block(index: int, name: str, shapes: dict[str, tuple[int, ...]]) -> Block:
    parameters = tuple(
        Parameter(f"{name}.{key}", shape, trainable=key != "frozen" and name != "still")
        for key, shape in shapes.items()
    )
    return Block(index, f'{name} ü "{index}"', parameters, (name,))


BLOCKS = tuple(_block(index, name, shapes) for index, (name, shapes) in enumerate(_SHAPES.items()))
TRAINED = [block.index for block in BLOCKS if block.trainable]
RECIPES = {p.name: Recipe((Step("normal", (0.0, 0.5)),)) for block in BLOCKS for p in block.parameters}


def make(path: Path, precision: Precision = "bf16", device: Any = None, **changes: Any) -> Store:
    """A new store of the small model."""
    arguments: dict[str, Any] = {
        "blocks": BLOCKS,
        "recipes": RECIPES,
        "optimizer": AdamW(lr=0.1),
        "precision": precision,
        "contract": CONTRACT,
        "disk": Disk(chunk_bytes=CHUNK_BYTES, device=device),
    }
    return Store.create(path, **(arguments | changes))


def reopen(path: Path, device: Any = None, *, writable: bool = True) -> Store:
    return Store.open(path, writable=writable, disk=Disk(chunk_bytes=CHUNK_BYTES, device=device))


def segment(store: Store, index: int) -> Path:
    """The file of the version that the last commit published."""
    return store.versions.segment_path(index, store.versions.records[index].committed)


def filled(layout: RecordLayout, value: int) -> RecordBuffer:
    """A record whose every tensor, and every mask, is a function of `value`."""
    record_buffer = RecordBuffer(layout)
    for number, part in enumerate(part for part in layout.states if part.name != "mask"):
        for name, tensor in record_buffer.tensors(part.name).items():
            tensor.copy_(expected_tensor(tensor, number, name, value))
    for piece in layout.sparsity:
        spec = layout.spec("mask", piece.name)
        assert spec is not None
        record_buffer.tensors("mask")[piece.name].copy_(
            raw_mask(layout, piece.name, kept_by(spec.piece_shape, piece, value))
        )
    if layout.has("copy"):
        for name, tensor in record_buffer.tensors("copy").items():
            tensor.copy_(record_buffer.tensors("param")[name])
    return record_buffer


def sparsity_of(store: Store, index: int, *shares: float) -> Sparsity:
    """Of each sparse parameter of a record about this share of its blocks; 1.0 stands for dense."""
    found = []
    parameters = [p for p in store.parameters_of(index) if p.name in store.masks]
    for parameter, share in zip(parameters, shares, strict=False):
        block = store.masks[parameter.name].block
        size = block[0] * block[1]
        if share < 1.0:
            found.append(SparsePiece(parameter.name, int(share * (parameter.numel // size)) * size, block))
    return tuple(found)


def kept_by(shape: tuple[int, ...], piece: SparsePiece, value: int) -> Tensor:
    """A dense mask with the piece's number of blocks, another one for each value."""
    high, wide = piece.block
    grid = (shape[0] // high, shape[1] // wide)
    chosen = np.random.default_rng(value).permutation(grid[0] * grid[1])[: piece.ones]
    cells = np.zeros(grid[0] * grid[1], dtype=bool)
    cells[chosen] = True
    return torch.from_numpy(np.kron(cells.reshape(grid), np.ones((high, wide), dtype=bool)).astype(bool))


def raw_mask(layout: RecordLayout, name: str, dense: Tensor) -> Tensor:
    """How a mask is to be kept, said once more in other words: bit by bit, or gap by gap."""
    spec = layout.spec("mask", name)
    assert spec is not None
    assert spec.piece is not None
    high, wide = spec.piece.block
    bits = dense[::high, ::wide].reshape(-1).tolist()
    if all(bits):
        return torch.zeros(0, dtype=torch.uint8)
    forms = [
        bytes(
            sum(bit << place for place, bit in enumerate(bits[start : start + 8])) for start in range(0, len(bits), 8)
        )
    ]
    for width in (1, 2):
        most = 256**width - 1
        gaps, gap = list[int](), 0
        for bit in bits:
            gap += not bit
            if bit or gap == most:
                gaps.append(gap)
                gap = 0
        room = sum(bits) + (len(bits) - sum(bits)) // most
        forms.append(b"".join(gap.to_bytes(width, "little") for gap in gaps + [most] * (room - len(gaps))))
    return torch.tensor(list(min(forms, key=len)), dtype=torch.uint8)


def expected_tensor(like: Tensor, number: int, name: str, value: int) -> Tensor:
    count = torch.arange(like.numel(), dtype=torch.float32).reshape(like.shape)
    return count % 97 + value * 1000 + number * 10 + len(name)


def loaded(store: Store, index: int) -> dict[str, Tensor]:
    """Everything that `load` serves, as copies, by `part/parameter`."""
    buffer = RecordBuffer(store.layout(index))
    store.load(index, buffer).result(timeout=30)
    return {
        f"{part.name}/{name}": tensor.clone()
        for part in store.layout(index).states
        for name, tensor in buffer.tensors(part.name).items()
    }


def fetched(store: Store, index: int) -> dict[str, Tensor]:
    """What `fetch` serves, as copies, by parameter."""
    part = store.layout(index).streamed
    buffer = AlignedBuffer(store.layout(index).fetched_nbytes)
    store.fetch(index, buffer.view).result(timeout=30)
    return {name: tensor.clone() for name, tensor in part_tensors(part, buffer.view).items()}


def assert_holds(store: Store, index: int, value: int | None, initial: dict[int, dict[str, Tensor]]) -> None:
    """The store serves `value` for this record, or its initial values if that is None."""
    found = loaded(store, index)
    if value is None:
        wanted = initial[index]
    else:
        record_buffer = filled(store.layout(index), value)
        wanted = {
            f"{part.name}/{name}": tensor
            for part in store.layout(index).states
            for name, tensor in record_buffer.tensors(part.name).items()
        }
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    for name, tensor in fetched(store, index).items():
        assert torch.equal(tensor, wanted[f"param/{name}"].to(tensor.dtype))


def put(store: Store, value: int, *indices: int) -> None:
    """One commit of new versions of these records, written together."""
    versions = {index: store.version(index) + 1 for index in indices}
    store.write_many([(i, filled(store.layout(i), value), version, version) for i, version in versions.items()])
    store.commit(store.step + 1, {"value": value}).result(timeout=30)


def assert_accounted(store: Store) -> None:
    """What the manifest says of shared files is so: live bytes, places, sizes; and no file is there without a use."""
    shared = store.versions.shared
    places: dict[str, dict[int, tuple[int, int]]] = {}
    for row in store.manifest.records():
        if row.offset:
            known = places.setdefault(row.file, {}).setdefault(row.offset, (row.block, row.nbytes))
            assert known == (row.block, row.nbytes), "a place belongs to one record"
    rows = {row.file: row for row in store.manifest.shared()}
    assert places.keys() <= rows.keys()
    for name, row in rows.items():
        found = sorted((offset, nbytes) for offset, (_, nbytes) in places.get(name, {}).items())
        assert row.live_bytes == sum(nbytes for _, nbytes in found)
        assert all(offset + nbytes <= after for (offset, nbytes), (after, _) in pairwise(found))
        if found:
            assert found[0][0] >= row.header_nbytes
            assert (store.path / "segments" / name).stat().st_size == row.nbytes >= sum(found[-1])
    there = {str(path.relative_to(store.path / "segments")) for path in (store.path / "segments").rglob("shared/*/*")}
    uncommitted = {file.name for file in (*shared.filling.files, *shared._doubtful)}
    assert {name for name, row in rows.items() if row.live_bytes} <= there
    assert there <= rows.keys() | uncommitted | set(shared._spare) | shared._resting


def step(store: Store, value: int, index: int = 0) -> None:
    store.write(index, filled(store.layout(index), value), value, value)
    store.commit(value, {"value": value}).result(timeout=30)


def files(path: Path) -> dict[str, bytes]:
    """Everything below a directory, to show that a refusal changed nothing."""
    return {str(found.relative_to(path)): found.read_bytes() for found in path.rglob("*") if found.is_file()}


@contextmanager
def fast_directory() -> Iterator[Path]:
    """A directory in memory where there is one: a crash is tried some hundred times, and syncs are slow on a disk."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(prefix="store ", dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)


def told_apart_by(root: Path) -> bytes:
    """Differs where files below a directory do, in what they hold or in which of their names are links to one file; but for
    the index of a write-ahead log, which is made anew by who opens it."""
    found, first = hashlib.sha256(), dict[int, Path]()
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.name.endswith("-shm"):
            link, contents = first.setdefault(path.stat().st_ino, path), path.read_bytes()
            found.update(repr((path.relative_to(root), link.relative_to(root), len(contents))).encode() + contents)
        elif path.is_dir():
            found.update(repr(path.relative_to(root)).encode())
    return found.digest()


class Wrapped:
    """A device that passes everything on; those below change one thing."""

    def __init__(self, device: Device | None = None) -> None:
        self._device = device or Device()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


class Slow(Wrapped):
    """Every read and write takes this long."""

    def __init__(self, *, read_s: float = 0.0, write_s: float = 0.0) -> None:
        super().__init__()
        self.read_s, self.write_s = read_s, write_s

    def read(self, handle: int, view: memoryview, offset: int) -> int:
        time.sleep(self.read_s)
        return self._device.read(handle, view, offset)

    def write(self, handle: int, view: memoryview, offset: int) -> int:
        time.sleep(self.write_s)
        return self._device.write(handle, view, offset)


class Gated(Wrapped):
    """Writes wait until the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    def write(self, handle: int, view: memoryview, offset: int) -> int:
        assert self.gate.wait(timeout=30)
        return self._device.write(handle, view, offset)


class Logged(Wrapped):
    """Names of what was synced, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self._names: dict[int, str] = {}

    def open(self, path: Path, *, write: bool) -> int:
        handle = self._device.open(path, write=write)
        self._names[handle] = path.name
        return handle

    def sync(self, handle: int) -> None:
        self._device.sync(handle)
        self.events.append(self._names[handle])

    def sync_directory(self, directory: Path) -> None:
        self._device.sync_directory(directory)
        self.events.append(directory.name)


class Jittery(Wrapped):
    """Every operation takes a random while, so that they overlap in many ways."""

    def __init__(self, seed: int, longest_s: float) -> None:
        super().__init__()
        self._random = random.Random(seed)
        self._longest_s = longest_s

    def read(self, handle: int, view: memoryview, offset: int) -> int:
        time.sleep(self._random.random() * self._longest_s)
        return self._device.read(handle, view, offset)

    def write(self, handle: int, view: memoryview, offset: int) -> int:
        time.sleep(self._random.random() * self._longest_s)
        return self._device.write(handle, view, offset)

    def sync(self, handle: int) -> None:
        time.sleep(self._random.random() * self._longest_s)
        self._device.sync(handle)


class Full(Wrapped):
    """No space once `full` is set."""

    full = False

    def write(self, handle: int, view: memoryview, offset: int) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._device.write(handle, view, offset)


class Mortal(Wrapped):
    """After `writes_left` more writes nothing reaches the disk any more, as when the process dies."""

    writes_left: int | None = None

    def _live(self) -> None:
        if self.writes_left is not None:
            self.writes_left -= 1
            if self.writes_left < 0:
                raise OSError(errno.EIO, "the process is dead")

    def write(self, handle: int, view: memoryview, offset: int) -> int:
        self._live()
        return self._device.write(handle, view, offset)

    def sync(self, handle: int) -> None:
        self._live()
        self._device.sync(handle)


class Buffered(Wrapped):
    """A file system without direct I/O."""

    direct = False

    def open(self, path: Path, *, write: bool) -> int:
        return os.open(path, (os.O_RDWR | os.O_CREAT) if write else os.O_RDONLY, 0o644)


def abandon(store: Store) -> None:
    """End the store as a crash would: nothing more is written or committed, the lock goes."""
    device = store.disk.device
    if isinstance(device, Mortal):
        device.writes_left = 0
    store.disk.close()
    store.versions.commits.close()
    store.memory.close()
    store.manifest.close()
    assert store._lock_handle is not None
    os.close(store._lock_handle)


def trains_on(path: Path, said: Connection) -> None:
    """A process that trains until it is killed, and says which steps are committed."""
    store = reopen(path)
    for value in range(store.step + 1, 100_000):
        for index in TRAINED:
            store.write(index, filled(store.layout(index), value + index), value, value)
        store.commit(value, {"step": value}).result()
        said.send(value)
