"""Blocks on their way into slabs, in them, and out again: in steps, and for a model that runs without."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from weightstream.fabric.peers import Arrival, Peers
from weightstream.store.futures import chain, done
from weightstream.store.owned import Holding, WorkingBuffer
from weightstream.worker.expanding import Expansion
from weightstream.worker.slabs import Parameters, Slab, Slabs

Wait = Callable[["Future[Any]"], Any]


class Arrivals:
    """The blocks that one rank has in its slabs, or that come there.

    Args:
        wait: waits for bytes, and may note for how long.
    """

    def __init__(
        self,
        holding: Holding,
        peers: Peers,
        parameters: Parameters,
        slabs: Slabs,
        expansion: Expansion,
        wait: Wait = Future.result,
    ) -> None:
        self._holding, self._peers, self._parameters = holding, peers, parameters
        self._slabs, self._expansion, self._wait = slabs, expansion, wait
        self._arrivals: dict[int, Arrival] = {}

    def fetch(self, block: int, slab: int, updated: WorkingBuffer | None = None) -> None:
        """Begins to bring a block into a slab.

        Args:
            updated: has the records of the block that are owned here, if they were just updated and are not written yet.
        """
        target = self._slabs[slab]
        self._slabs.hold(block, slab)
        landing = self._expansion.landing(block, target)
        if updated is not None:
            local = self._holding.serve(block, updated, landing)
        else:
            local = self._holding.fetch(block, landing)
        arrival = self._peers.fetch(block, landing, local)
        self._expansion.begin(block, target, arrival.here)
        if target.device.type != "cpu" and landing is target.landing:
            uploaded = chain([arrival.here], lambda: _uploaded(arrival.here, target))
            arrival = Arrival(uploaded, arrival.passed)
        self._arrivals[block] = arrival

    def need(self, block: int) -> None:
        """Makes sure that a block is present: waits for its bytes and binds its parameters to them."""
        if not self._parameters.present(block):
            self._wait(self._arrivals[block].here)
            slab = self._slabs.slab_of(block)
            assert slab is not None, f"block {block} is in no slab"
            self._expansion.finish(block, self._wait)
            self._parameters.bind(block, self._slabs[slab], self._holding.slabs[block])

    def evict(self, block: int) -> None:
        """A block leaves its slab, also where its bytes never came; nobody writes to the slab or sends from it any more."""
        arrival = self._arrivals.pop(block, None)
        try:
            if arrival is not None:
                try:
                    self._wait(arrival.here)
                finally:
                    self._wait(arrival.passed)
        finally:
            self._parameters.unbind(block)
            self._expansion.forget(block)
            self._slabs.release(block)

    def evict_all(self) -> None:
        """Raises the first error of those blocks that did not come, once all have left."""
        failed: BaseException | None = None
        for block in range(len(self._holding.blocks)):
            if self._slabs.slab_of(block) is not None:
                try:
                    self.evict(block)
                except BaseException as error:
                    failed = failed or error
        if failed is not None:
            raise failed


def _uploaded(arrived: "Future[Any]", slab: Slab) -> "Future[None]":
    arrived.result()
    slab.upload()
    return done(None)
