"""The store's side of a step: records are loaded, updated, written and committed.

With clipping the gradients of a step wait (`pending`) until the global norm is known, and each block is updated just
before it is next served; without, as soon as its gradient is complete. Of a block that this rank owns nothing of,
nothing is done; all ranks nevertheless agree on what is due.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from weightstream.errors import StoreError
from weightstream.fabric.staging import Pool, Staging
from weightstream.families.touching import Touching
from weightstream.masking.apportioning import apportion
from weightstream.masking.remasking import Remasking
from weightstream.schedule.allotment import Allotment, Facts, sharing_records
from weightstream.schedule.operations import Load, Operation, Update, Write
from weightstream.store.futures import chain
from weightstream.store.interval import Interval
from weightstream.store.owned import Checksums, Holding, WorkingBuffer

Wait = Callable[["Future[Any]"], Any]


@dataclass(slots=True)
class _Loaded:
    buffer: "Future[WorkingBuffer]"
    done: "Future[Any]"
    checksums: Checksums = field(default_factory=dict)
    updated: bool = False


class Keeper:
    """Keeps what one memory rank owns.

    Args:
        wait: waits for bytes, and notes the time for which compute stood still.
        remasking: of the sparse parameters, if there are any.
        touching: of the records of families that steps touch.
        clip_norm: the global norm that gradients are clipped to.
    """

    def __init__(
        self,
        holding: Holding,
        facts: Facts,
        allotment: Allotment,
        staging: Staging,
        interval: Interval,
        wait: Wait,
        remasking: Remasking | None = None,
        touching: Touching | None = None,
        clip_norm: float | None = None,
    ) -> None:
        self.holding, self.store, self.staging, self.remasking = holding, holding.store, staging, remasking
        self.masking = None if remasking is None else remasking.masking
        self.touching, self._clip_norm = touching or Touching(), clip_norm
        self.deferred = facts.deferred
        self._record_buffers = allotment.record_buffers
        own = [block for block in facts.blocks if block.resident and block.trainable]
        sharing = sharing_records(facts.blocks)
        if allotment.record_buffers < len(sharing):
            self._shared = Pool([WorkingBuffer(allotment.record_bytes) for _ in range(allotment.record_buffers)])
        else:  # each as large as its block's record
            self._shared, own = Pool([]), own + sharing
        self._own = {block.index: Pool([WorkingBuffer(block.record_bytes)]) for block in own}
        for index in allotment.pinned_copies:
            holding.pin_copies(index)
        for index in allotment.pinned_states:
            holding.pin_states(index)
        self.pending: frozenset[int] = frozenset()
        """Blocks whose gradient of step `pending_step` waited for the norm when the present step began."""
        self.pending_step = 0
        self.pending_progress: dict[str, Any] = {}
        self.due: set[int] = set()
        """Blocks that have a gradient and are not updated with it yet."""
        self.coefficient = 1.0
        self.step = 0
        self.poisoned = False  # nothing of this step may be updated
        self.broken = False
        self._taken = 0  # the last step that counts
        self.interval = interval
        self._wait = wait
        self._loaded: dict[int, _Loaded] = {}
        self._writes: list[Future[Any]] = []
        self._updating: int | None = None  # the block between Update and Write
        self.committing: Future[None] | None = None
        self._accepted: tuple[int, dict[str, Any]] | None = None  # a step whose commit is not due yet, and its progress

    # records

    def load(self, block: int) -> None:
        """Begins to bring a block's records, and its gradient if that lies on disk."""
        if block in self._loaded or not self.holding.updated(block):
            return
        buffer = self._records_of(block).take()
        loading = chain([buffer], lambda: self.holding.load(block, buffer.result(), check=False))
        self._loaded[block] = _Loaded(buffer, loading)
        if block in self.pending:
            self.staging.prefetch(block)

    def update(self, block: int) -> None:
        """The optimizer step on the records of one block, per tensor or panel, in their working buffer."""
        if self.poisoned or block not in self.due:
            return
        step = self.pending_step if self.deferred else self.step
        if not self.holding.updated(block):
            self._become(block, step)
            self.due.discard(block)
            return
        self._await_commit()
        loaded = self._loaded[block]
        self._wait(loaded.done)
        self._wait(self.staging.ready(block))
        buffer = loaded.buffer.result()
        self.holding.check(block, buffer)
        self._updating = block
        gradients = self.staging.gradients(block)
        if self.coefficient < 1.0:
            for grad in gradients.values():
                grad.mul_(self.coefficient)
        if self.remasking is not None:
            self.remasking.update(self.holding, block, buffer, gradients, self.store.optimizer, step)
        else:
            for piece in self.holding.pieces(block, buffer):
                piece.optimize(self.store.optimizer, gradients.get((piece.name, piece.row)), step)
                piece.renew_copy()
        self._become(block, step)
        self.staging.release(block)
        self.due.discard(block)
        loaded.checksums = self.holding.checksums(block, buffer)
        loaded.updated = True

    def _become(self, block: int, step: int) -> None:
        if self.masking is not None:
            self.masking.become(self.holding, block, step)

    def apportion(self, step: int, gather: Callable[[Any], list[Any]]) -> None:
        """Before any record is updated with a step's gradients: finds out together with all ranks how many cells pieces of
        sparse parameters come to, where that is decided over all of them."""
        if self.masking is not None and self.masking.searched:
            apportion(self.masking, self.holding, step, gather, self._wait)

    def take_grown(self) -> dict[str, int]:
        """By parameter whose mask was changed here since this was last asked: how many of its elements came to exist."""
        return {} if self.remasking is None else self.remasking.take_grown()

    def whole(self, step: int) -> frozenset[tuple[str, int]]:
        """The sparse pieces of which a step sums the dense gradient."""
        return frozenset() if self.masking is None else self.masking.whole(step)

    def updated(self, block: int) -> WorkingBuffer | None:
        """The records of a block that is updated and not written yet."""
        loaded = self._loaded.get(block)
        return loaded.buffer.result() if loaded is not None and loaded.updated else None

    def write(self, block: int) -> None:
        """Begins to write what was updated; the working buffer is free when it is on disk."""
        loaded = self._loaded.get(block)
        if loaded is None or not loaded.updated:
            if loaded is not None:  # nothing was updated: the buffer goes back as it came
                self.release(block)
            self.staging.release(block)
            return
        del self._loaded[block]
        buffer = loaded.buffer.result()
        written = self.holding.write(block, buffer, loaded.checksums)
        self._updating = None
        self._writes.append(written)
        self._records_of(block).give(buffer, after=written)

    def renewal(self, block: int) -> list[Operation]:
        """The operations that update a block out of turn."""
        self._make_room(block)
        return [Load(block), Update(block), Write(block)]

    def release(self, block: int) -> None:
        """Gives back the buffer of records that were loaded for nothing."""
        loaded = self._loaded.pop(block)
        loaded.done.add_done_callback(lambda _: self._records_of(block).give(loaded.buffer.result()))

    def drop_loaded(self) -> None:
        for block in list(self._loaded):
            self.release(block)

    def is_loaded(self, block: int) -> bool:
        """Whether a block's records are in a working buffer, or on their way; of nothing there is nothing to load."""
        return block in self._loaded or not self.holding.updated(block)

    def keep_loaded(self, blocks: Sequence[int]) -> None:
        """Gives back the buffers of records that were loaded ahead for nothing."""
        for block in [b for b in self._loaded if b not in blocks]:
            self.release(block)

    def _make_room(self, block: int) -> None:
        """A record that was loaded ahead for nothing must not keep the last buffer."""
        sharing = [held for held in self._loaded if held not in self._own]
        if block not in {*self._loaded, *self._own} and len(sharing) >= self._record_buffers:
            self.release(sharing[0])

    def _records_of(self, block: int) -> Pool[WorkingBuffer]:
        """Where a block's working buffer comes from: a resident block has its own, as all have where there are enough."""
        return self._own.get(block, self._shared)

    # steps

    def update_touched(self, step: int) -> None:
        """Updates the records of families that a step touched, at its end; they are written with its commit."""
        self._writes.append(self.touching.update(step, self.coefficient))

    def accept_gradients(self, step: int, progress: dict[str, Any], norm: float) -> None:
        """With clipping, at the end of a step: what is due now waits for the next one."""
        if self._clip_norm is not None:
            self.coefficient = min(1.0, self._clip_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0
        try:
            self.update_touched(step)
            self.pending, self.pending_step, self.pending_progress = frozenset(self.due), step, progress
            self._taken = step
        except BaseException:
            # the step does not count, and what one family has written of it must not be published with the step before
            self.pending = frozenset()
            self.undo_writes()
            raise
        if not self.pending:
            self.commit(step, progress)

    def forget_gradients(self) -> None:
        """The step does not count: its gradients are dropped."""
        self.staging.clear()
        self.due.clear()
        self.touching.drop()
        self.drop_loaded()

    def publish_pending(self) -> None:
        """With clipping: the step before is updated as a whole."""
        self.commit(self.pending_step, self.pending_progress)
        self.pending = frozenset()

    def undo_writes(self) -> None:
        """Goes back to what was accepted last."""
        for future in self._writes:
            future.exception()
        self._writes.clear()
        self.store.discard()
        self.holding.undo()
        self.take_grown()

    def commit(self, step: int, progress: dict[str, Any]) -> None:
        """The step counts: it is committed, or accepted until a commit is due."""
        self._await_commit()
        self._writes.clear()
        self.holding.accept()
        self._accepted, self._taken = (step, progress), step
        if self.interval.passed():
            self._commit_accepted()
        else:
            self.store.accept()

    def _commit_accepted(self) -> None:
        if self._accepted is not None:
            self.committing = self.store.commit(*self._accepted)
            self._accepted = None
            self.interval.restart()

    def _await_commit(self) -> None:
        if self.committing is None:
            return
        try:
            self._wait(self.committing)
        except StoreError:
            self._accepted = None  # what was accepted since goes with the commit that failed
            raise
        self.committing = None

    def drain(self, run: Callable[[Operation], None]) -> None:
        """Applies what waits for its update and commits it; afterwards the store is at the last step.

        Raises:
            StoreError: a step was interrupted in the middle of an update.
        """
        if self.broken:
            raise StoreError(
                f"store '{self.store.path}': a step was interrupted while it updated a record, or was taken in, so that what "
                f"was not committed is not whole; close the engine and open it again at step {self.store.step}"
            )
        self.staging.recall()
        # what is loaded first: it has the buffers that the others wait for
        waiting = sorted(self.pending & self.due, key=lambda block: (block not in self._loaded, block))
        for block in [b for b in self._loaded if b not in waiting]:
            self.release(block)
        try:
            for position, block in enumerate(waiting):
                for ahead in waiting[position : position + max(1, self._record_buffers)]:
                    run(Load(ahead))
                run(Update(block))
                run(Write(block))
        except BaseException:
            self.broken |= self._updating is not None  # to update it once more would take its step twice
            raise
        if self.pending:
            self.publish_pending()
        self._await_commit()
        self._commit_accepted()
        self._await_commit()

    def not_told(self, step: int) -> None:
        """Whoever asked for a step was told that it failed. If it counts, it would be taken twice."""
        self.broken |= step <= self._taken

    def abort(self) -> None:
        """Forgets a step that failed in the middle; what the step before left to do is still there.

        A record that was being updated is neither old nor new: then only the last commit is whole.
        """
        self.broken |= self._updating is not None
        self.touching.drop()
        self.staging.abort()
        if not self.pending:
            self.staging.clear()
            self.due.clear()
        if not self.deferred:
            self.undo_writes()
        self.drop_loaded()

    def close(self, run: Callable[[Operation], None]) -> None:
        """Drains, and gives all buffers back. What an interrupted update left is not committed."""
        if self.broken:
            self.undo_writes()
            self.staging.clear()
            self._commit_accepted()
            self._await_commit()
        else:
            self.drain(run)
        self.drop_loaded()
        for block in self.holding.blocks:
            self.holding.unpin(block.index)
        for pool in (self._shared, *self._own.values()):
            for _ in range(len(pool.buffers)):
                pool.take().result().close()
        self.staging.close_buffers()
