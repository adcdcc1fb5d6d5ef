"""What the rows of a manifest say, and how they are spelled in its tables."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from weightstream.store.sparsity import DENSE, Sparsity, sparsity_from_json, sparsity_to_json
from weightstream.store.tables import json_text

_TOGETHER = "(together)"
"""In a commit's progress: how many memory ranks made it, and its name."""


@dataclass(frozen=True, slots=True)
class RecordRow:
    """One published version of one record; `checksums` maps each part to the checksum of its bytes.

    In a file that it shares its parts take `nbytes` from `offset` on; both are 0 where the file is its own. `sparsity` is
    what its layout follows from.
    """

    block: int
    version: int
    file: str
    checksums: Mapping[str, int]
    optimizer_steps: int
    born: int = 0
    died: int | None = None
    offset: int = 0
    nbytes: int = 0
    sparsity: Sparsity = DENSE

    @property
    def place(self) -> tuple[str, int]:
        """Where it lies: file and offset."""
        return self.file, self.offset

    def to_json(self) -> list[Any]:
        """What another rank needs to publish it, too."""
        checksums = {part: f"{value:016x}" for part, value in self.checksums.items()}
        sparse = [sparsity_to_json(self.sparsity)] if self.sparsity else []
        place = [self.offset, self.nbytes]
        return [self.block, self.version, self.file, checksums, self.optimizer_steps, *place, *sparse]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> "RecordRow":
        block, version, file, checksums, steps, offset, nbytes, *sparse = data
        sums = {part: int(value, 16) for part, value in checksums.items()}
        sparsity = sparsity_from_json(sparse[0]) if sparse else DENSE
        return cls(block, version, file, sums, steps, offset=offset, nbytes=nbytes, sparsity=sparsity)

    def values(self, born: int, died: int | None = None, *, sparse: bool) -> tuple[Any, ...]:
        """Its row in the table, alive from commit `born` on; `sparse` is whether the table says how sparse versions are."""
        assert sparse or not self.sparsity, "only a store that was made with sparse parameters has sparse versions"
        text = json_text({part: f"{value:016x}" for part, value in self.checksums.items()})
        facts: tuple[Any, ...] = (self.file, text, self.optimizer_steps, self.offset, self.nbytes)
        if sparse:
            facts += (json_text(sparsity_to_json(self.sparsity)) if self.sparsity else None,)
        return (self.block, self.version, born, died, *facts)

    @classmethod
    def of(cls, row: Sequence[Any]) -> "RecordRow":
        """From its row in the table."""
        block, version, born, died, file, text, steps, offset, nbytes, *sparse = row
        checksums = {part: int(value, 16) for part, value in json.loads(text).items()}
        return cls(block, version, file, checksums, steps, born, died, offset, nbytes, _sparsity(*sparse))

    def at(self, number: int) -> "RecordRow":
        """The row as it was at an earlier commit, at or after its birth."""
        return replace(self, died=None) if self.died is not None and self.died > number else self

    def lives_at(self, number: int) -> bool:
        """Whether the commit of that number holds it."""
        return self.born <= number and (self.died is None or number < self.died)


@dataclass(frozen=True, slots=True)
class SharedRow:
    """A file that records of families share; `live_bytes` of it are those of versions that rows point to.

    Of its header, pages up to `said_nbytes` say something; the others are as dead as bytes of no version.
    """

    serial: int
    file: str
    nbytes: int
    header_nbytes: int
    said_nbytes: int
    header_checksum: str
    live_bytes: int = 0

    @property
    def values(self) -> tuple[Any, ...]:
        """Its row in the table."""
        sizes = (self.nbytes, self.header_nbytes, self.said_nbytes)
        return (self.serial, self.file, *sizes, self.header_checksum, self.live_bytes)


@dataclass(frozen=True, slots=True)
class LifeRow:
    """What the store has written to its disk in its life, and figures of its writer's last session."""

    written_bytes: int = 0
    session: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Move:
    """A record's bytes were copied to another place; what points to the old one is to point to the new one."""

    block: int
    old: tuple[str, int]
    new: tuple[str, int]


@dataclass(frozen=True, slots=True)
class CommitRow:
    """One commit: its own number, the training step it published, and what the caller keeps with it.

    `ranks` are the memory ranks that made it together, under a `name` of its own.
    """

    number: int
    step: int
    progress: dict[str, Any]
    ranks: int = 1
    name: str = ""

    def packed(self) -> dict[str, Any]:
        """Its progress as it is kept."""
        return self.progress | ({_TOGETHER: [self.ranks, self.name]} if self.ranks > 1 else {})

    @classmethod
    def of(cls, number: int, step: int, progress: str) -> "CommitRow":
        """From the row that holds it."""
        kept = json.loads(progress)
        ranks, name = kept.pop(_TOGETHER, (1, ""))
        return cls(number, step, kept, ranks, name)


def _sparsity(text: str | None = None) -> Sparsity:
    return DENSE if text is None else sparsity_from_json(json.loads(text))
