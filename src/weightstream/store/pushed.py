"""What a target holds: one index that names every object of a commit, and the objects.

index/<serial>.json                                    the commit; its own checksum is in it
segments/<record>.<version>.<checksum>.safetensors      a record, exactly as in the store
hugging_face/<checksum>.<name>                         a file of an imported store's folder

Each push writes an index of the next serial number after everything that it names, and only then removes the one
before. So whatever stops a push, and however a file system writes, the newest whole index is a whole commit.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import xxhash

from weightstream.errors import DamagedRecordError, StoreError
from weightstream.store.facts import SPARSE
from weightstream.store.rows import CommitRow, RecordRow
from weightstream.store.sparsity import DENSE, Sparsity, sparsity_from_json, sparsity_to_json
from weightstream.store.target import PARTIAL, MissingObjectError, Target

FORMAT_NUMBER, SPARSE_FORMAT_NUMBER = 2, 3
"""Of a store without sparse parameters, and of one with them."""
INDEX, SEGMENTS, FILES = "index", "segments", "hugging_face"
FOLDERS = (INDEX, SEGMENTS, FILES)

_OURS = {
    INDEX: re.compile(r"index/\d{8}\.json"),
    SEGMENTS: re.compile(r"segments/\d{5,}\.\d+\.[0-9a-f]{16}\.safetensors"),
    FILES: re.compile(r"hugging_face/[0-9a-f]{16}\.[^/]+"),
}


@dataclass(frozen=True, slots=True)
class PushedRecord:
    """One version of one record, and the object that holds its file."""

    block: int
    version: int
    optimizer_steps: int
    object: str
    nbytes: int
    checksums: Mapping[str, int]
    sparsity: Sparsity = DENSE

    @classmethod
    def of(cls, row: RecordRow, nbytes: int) -> "PushedRecord":
        sums = {part: f"{value:016x}" for part, value in sorted(row.checksums.items())}
        sparse = [sparsity_to_json(row.sparsity)] if row.sparsity else []
        checksum = xxhash.xxh3_64_hexdigest(_json([row.block, row.version, sums, *sparse]))
        name = f"{SEGMENTS}/{row.block:05d}.{row.version}.{checksum}.safetensors"
        return cls(row.block, row.version, row.optimizer_steps, name, nbytes, row.checksums, row.sparsity)

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "block": self.block,
            "version": self.version,
            "optimizer_steps": self.optimizer_steps,
            "object": self.object,
            "nbytes": self.nbytes,
            "checksums": {part: f"{value:016x}" for part, value in self.checksums.items()},
        }
        return found | ({"sparsity": sparsity_to_json(self.sparsity)} if self.sparsity else {})

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "PushedRecord":
        sums = {part: int(text, 16) for part, text in entry["checksums"].items()}
        return cls(**dict(entry) | {"checksums": sums, "sparsity": sparsity_from_json(entry.get("sparsity", ()))})


@dataclass(frozen=True, slots=True)
class PushedFile:
    """One file of the folder that an imported store has; `path` counts from that folder."""

    path: str
    object: str
    nbytes: int
    checksum: str

    @classmethod
    def of(cls, path: str, data: bytes) -> "PushedFile":
        checksum = xxhash.xxh3_64_hexdigest(data)
        return cls(path, f"{FILES}/{checksum}.{PurePosixPath(path).name}", len(data), checksum)


@dataclass(frozen=True, slots=True)
class Index:
    """A commit at a target. `meta`, `blocks` and `families` are those of the store's manifest."""

    serial: int
    commit: CommitRow
    meta: Mapping[str, Any]
    blocks: Sequence[tuple[int, str, dict[str, Any]]]
    families: Sequence[tuple[int, str, int, dict[str, Any]]]
    records: Sequence[PushedRecord]
    files: Sequence[PushedFile]

    @property
    def name(self) -> str:
        return f"{INDEX}/{self.serial:08d}.json"

    @property
    def objects(self) -> dict[str, int]:
        """Every object that it names → its bytes."""
        records = {record.object: record.nbytes for record in self.records}
        return records | {file.object: file.nbytes for file in self.files}

    def same_commit(self, other: "Index") -> bool:
        """Whether all but the serial number is equal."""
        return replace(self, serial=0)._body() == replace(other, serial=0)._body()

    def to_bytes(self) -> bytes:
        body = self._body()
        return json.dumps(body | {"checksum": _checksum(body)}, sort_keys=True, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Index":
        """Read an index back.

        Raises:
            CutShortError: it ends too early.
            DamagedRecordError: it is not what was written.
            StoreError: it has a format that this version does not know.
        """
        try:
            body = json.loads(data)
            found, checksum = body["format"], body.pop("checksum")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CutShortError(f"{where} is not a whole index: {error}") from error
        if found not in (FORMAT_NUMBER, SPARSE_FORMAT_NUMBER):
            raise StoreError(
                f"{where}: expected format {FORMAT_NUMBER} or {SPARSE_FORMAT_NUMBER}, found {found}; another version of "
                "weightstream reads it"
            )
        if checksum != _checksum(body):
            raise DamagedRecordError(
                f"{where}: expected checksum {checksum}, found {_checksum(body)}; it was damaged or changed"
            )
        records = [PushedRecord.from_json(entry) for entry in body["records"]]
        return cls(
            body["serial"],
            CommitRow(body["commit"], body["step"], body["progress"]),
            body["meta"],
            [(block, name, facts) for block, name, facts in body["blocks"]],
            [(first, name, count, facts) for first, name, count, facts in body["families"]],
            records,
            [PushedFile(**entry) for entry in body["files"]],
        )

    def _body(self) -> dict[str, Any]:
        body = {
            "format": SPARSE_FORMAT_NUMBER if any(SPARSE in facts for _, _, facts in self.blocks) else FORMAT_NUMBER,
            "serial": self.serial,
            "commit": self.commit.number,
            "step": self.commit.step,
            "progress": self.commit.progress,
            "meta": dict(self.meta),
            "blocks": [list(block) for block in self.blocks],
            "families": [list(family) for family in self.families],
            "records": [record.to_json() for record in self.records],
            "files": [
                {"path": file.path, "object": file.object, "nbytes": file.nbytes, "checksum": file.checksum}
                for file in self.files
            ],
        }
        found: dict[str, Any] = json.loads(_json(body))
        return found


class CutShortError(DamagedRecordError):
    """An index that was not written to its end."""


def indexes(target: Target) -> list[str]:
    """The objects that are indexes, whole or not, the newest first."""
    return sorted((name for name in target.sizes(INDEX) if _OURS[INDEX].fullmatch(name)), reverse=True)


def newest(target: Target) -> Index | None:
    """The commit that a target holds; None where no push has ended yet.

    Raises:
        DamagedRecordError: there were indexes, and none of them is whole.
    """
    problems: list[DamagedRecordError] = []
    names = indexes(target)
    for name in names:
        try:
            return Index.from_bytes(target.read(name), f"target '{target.name}': {name}")
        except MissingObjectError:
            return newest(target)  # a push has just replaced it
        except DamagedRecordError as error:
            problems.append(error)
    if not problems or (len(names) == 1 and serial_of(names[0]) == 1 and isinstance(problems[0], CutShortError)):
        return None  # the very first push was interrupted
    raise DamagedRecordError(
        f"{problems[0]}; what is there cannot be pulled: restore this file, or remove {INDEX}/ and push again"
    )


def serial_of(name: str) -> int:
    return int(PurePosixPath(name).stem)


def strangers(target: Target) -> list[str]:
    """What is in the target that no push put there."""
    return [name for name in target.names() if name not in FOLDERS]


def unnamed(target: Target, index: Index) -> list[str]:
    """Objects of earlier or interrupted pushes that this index has no use for, those that would mislead first."""
    wanted = index.objects.keys() | {index.name}
    found: list[str] = []
    for folder in FOLDERS:
        for name in target.sizes(folder):
            ours = _OURS[folder].fullmatch(name.removesuffix(PARTIAL) if target.local else name)
            if ours and name not in wanted:
                found.append(name)
    return found


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json(body)).hexdigest()


def _json(value: Any) -> bytes:
    """One spelling for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
