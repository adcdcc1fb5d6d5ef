"""The digest of families: of each record that the commit holds, read many at a time; the same as one by one."""

import hashlib
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tests.store.cases import BLOCKS, filled, make, put, reopen, segment
from tests.store.test_families import EXPERTS, FEW
from torch import Tensor

from weightstream.errors import DamagedRecordError
from weightstream.store import audit
from weightstream.store.arena import Arena
from weightstream.store.segments import bytes_of
from weightstream.store.store import Store
from weightstream.store.tiers import Disk

COMMITS = [range(90), range(60, 100), range(0, 100, 7)]
RECORDS = 100


def trained(path: Path, **settings: Any) -> Store:
    """In each commit some records of the first family are updated."""
    store = make(path, families=[EXPERTS, FEW], **settings)
    first = store.index(EXPERTS.name, 0)
    for value, numbers in enumerate(COMMITS):
        put(store, value, *(first + number for number in numbers))
    return store


def by_hand(store: Store) -> str:
    """In other words: a line for each tensor, one by one, in order; of blocks, of which none was updated, as well."""
    lines: list[str] = []

    def add(name: str, tensors: dict[str, Tensor], steps: int) -> None:
        for part, tensor in tensors.items():
            found = hashlib.sha256(bytes_of(tensor)).hexdigest()
            lines.append(f"{name!r} {part!r} F32 {list(tensor.shape)} {steps} {found}\n")

    for name, tensors in islice(store.items(), sum(len(block.parameters) for block in BLOCKS)):
        add(name, tensors, 0)
    for first, family in store.layouts.families:
        facts = [family.name, family.count, family.to_json(), store.seed]
        lines.append(f"family {json.dumps(facts, sort_keys=True)}\n")
        for row in store.living(first, first + family.count):
            for parameter in store.parameters_of(row.block):
                parts = {part: store.tensor(parameter.name, part) for part in ("param", "exp_avg", "exp_avg_sq")}
                add(parameter.name, parts, row.optimizer_steps)
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_records_are_read_together_and_the_digest_is_the_same(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a record that was updated again only the last version is read, and none that no commit holds."""
    issued, read = list[int](), Disk.read

    def counted(disk: Disk, path: Path, extents: Sequence[Any], *given: Any, **settings: Any) -> Any:
        if "shared" in path.parts:
            issued.append(len(extents))
        return read(disk, path, extents, *given, **settings)

    with trained(tmp_path / "store", precision=precision) as store:
        expected, first = by_hand(store), store.index(EXPERTS.name, 0)
        pending = [(first + n, filled(store.layout(first + n), 9), 9, 9) for n in range(120)]
        store.write_many(pending).result(timeout=30)
        monkeypatch.setattr(Disk, "read", counted)
        for at_once in (1, 10, 50):
            monkeypatch.setattr(audit, "READ_BYTES", 2 * at_once * Arena.slot_bytes(store.layout(first)))
            issued.clear()
            assert store.digest() == expected
            assert sum(issued) == 3 * RECORDS  # masters and both moments
            assert RECORDS / at_once <= len(issued) < RECORDS / at_once + len(COMMITS)


def test_a_damaged_record_among_many_is_named(tmp_path: Path) -> None:
    with trained(tmp_path / "store") as store:
        first = store.index(EXPERTS.name, 0)
        path, layout = segment(store, first + 50), store.layout(first + 50)
        offset = store.versions.records[first + 50].committed.offset
    with path.open("r+b") as file:
        file.seek(offset + layout.part("param").offset - layout.header_nbytes)
        file.write(b"damage")
    with (
        reopen(tmp_path / "store", writable=False) as store,
        pytest.raises(DamagedRecordError, match=r"layer\.expert\.50.* version 1, part 'param'"),
    ):
        store.digest()
