"""The store as a rank sees it that owns nothing of it: what is in it, and where it stands; not a byte of it.

Such a rank keeps only what it computes. What does not fit in its memory goes to scratch of its own.
"""

import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from weightstream.errors import StoreError
from weightstream.store.facts import Row, blocks_of, masks_of, units_of
from weightstream.store.families import Layouts
from weightstream.store.futures import done
from weightstream.store.layout import Precision, RecordLayout
from weightstream.store.optimizers import Optimizer
from weightstream.store.scratch import Scratch
from weightstream.store.sparsity import InitialMask, Sparsity
from weightstream.store.tiers import Disk
from weightstream.trace.recorder import Log


class Elsewhere:
    """What `Store` is to an engine, for a rank that owns no record.

    Args:
        path: the store's, for messages.
        catalogue: what `catalogue_of` gave on the rank that has it.
        scratch: a folder for bytes that only this process needs; removed at the end.
    """

    def __init__(self, path: Path, catalogue: Mapping[str, Any], scratch: Path) -> None:
        self.path = path
        self.precision: Precision = catalogue["precision"]
        self.optimizer = Optimizer.from_json(catalogue["optimizer"])
        self.panel_elements: int = catalogue["panel_elements"]
        self.contract: dict[str, Any] = catalogue["contract"]
        self.step: int = catalogue["step"]
        self.progress: dict[str, Any] = catalogue["progress"]
        rows: list[Row] = [(index, name, facts) for index, name, facts in catalogue["blocks"]]
        self.blocks, self.units = blocks_of(rows), units_of(rows)
        self._layouts = Layouts(self.units, (), self.precision, self.optimizer, masks_of(rows))
        firsts = [next(unit.index for unit in self.units if unit.block == block.index) for block in self.blocks]
        self._ranges = [range(first, stop) for first, stop in zip(firsts, [*firsts[1:], len(self.units)], strict=True)]
        self.before_look: Callable[[], None] = lambda: None
        self.attached = False
        self._folder = scratch
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        self._disk = Disk()
        self._disk.device.probe(scratch)
        self._scratch = Scratch(self._disk, scratch)

    def units_of(self, block: int) -> range:
        """The indices of a block's units."""
        return self._ranges[block]

    def layout(self, index: int) -> RecordLayout:
        """Where the numbers of a record lie at version 0; of a sparse one ask `layout_of`, as nothing is known here of how
        sparse it is now."""
        return self._layouts[index]

    @property
    def layouts(self) -> Layouts:
        """See `Store.layouts`."""
        return self._layouts

    def sparsity(self, index: int) -> Sparsity:
        """How sparse a record is at version 0; see `layout`."""
        return self.layout(index).sparsity

    def layout_of(self, index: int, sparsity: Sparsity) -> RecordLayout:
        """See `Store.layout_of`."""
        return self._layouts.of(index, sparsity)

    @property
    def masks(self) -> Mapping[str, InitialMask]:
        """See `Store.masks`."""
        return self._layouts.masks

    def commit(self, step: int, progress: Mapping[str, Any]) -> "Future[None]":
        """Nothing of the commit is here."""
        self.step, self.progress = step, dict(progress)
        return done(None)

    def accept(self) -> None:
        """Nothing to keep."""

    def discard(self) -> None:
        """Nothing to undo."""

    def pin(self, index: int, parts: Collection[str]) -> None:
        """Nothing to pin."""

    def unpin(self, index: int, parts: Collection[str] | None = None) -> None:
        """Nothing was pinned."""

    def scratch_write(self, key: Hashable, view: memoryview) -> "Future[None]":
        """See `Store.scratch_write`."""
        return self._scratch.write(key, view)

    def scratch_read(self, key: Hashable, view: memoryview) -> "Future[None]":
        """See `Store.scratch_read`."""
        return self._scratch.read(key, view)

    def scratch_free(self, key: Hashable) -> None:
        """See `Store.scratch_free`."""
        self._scratch.free(key)

    def watch(self, log: Log) -> None:
        """See `Store.watch`: here scratch alone."""
        self._disk.traffic.log = log

    @property
    def counters(self) -> dict[tuple[str, str], dict[str, int]]:
        """See `Store.counters`: here scratch alone."""
        found: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: {"read": 0, "written": 0})
        for kind, nbytes in list(self._disk.traffic.read_bytes.items()):
            found["disk", kind]["read"] = nbytes
        for kind, nbytes in list(self._disk.traffic.written_bytes.items()):
            found["disk", kind]["written"] = nbytes
        return dict(found)

    def items(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Refused: the numbers are with the memory ranks."""
        self._refuse()

    def digest(self) -> str:
        """Refused: the numbers are with the memory ranks."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise StoreError(
            f"store '{self.path}': this rank computes and owns no records; ask a memory rank, or open the store by itself"
        )

    def close(self) -> None:
        """Lets the scratch go."""
        self._disk.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def catalogue_of(rows: Sequence[Row], **facts: Any) -> dict[str, Any]:
    """What `Elsewhere` needs to know, as JSON."""
    return {"blocks": [list(row) for row in rows], **facts}
