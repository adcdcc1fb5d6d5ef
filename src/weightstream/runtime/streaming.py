"""A model without training: each block is fetched when it is called, the next one meanwhile; no gradients.

With several ranks all that compute make the same calls, and each fetch is announced, so that ranks that only own records
can follow.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from weightstream.errors import AuditError
from weightstream.fabric.peers import Arrival, Peers
from weightstream.families.touching import Touching
from weightstream.runtime.arriving import Arrivals
from weightstream.store.owned import Holding
from weightstream.worker.expanding import Driven, Expansion
from weightstream.worker.places import KeptPlaces
from weightstream.worker.slabs import Parameters, Slabs
from weightstream.worker.worker import Worker


class StreamedModel:
    """Serves the blocks of a model that runs in the caller's own thread, in any order.

    Which block comes next is learned from the calls themselves: the one that followed last time is fetched ahead.
    """

    def __init__(
        self,
        holding: Holding,
        peers: Peers,
        worker: Worker,
        parameters: Parameters,
        slabs: Slabs,
        streaming: int,
        driven: Mapping[str, Driven] | None = None,
        places: KeptPlaces | None = None,
        touching: Touching | None = None,
    ) -> None:
        self._peers, self._worker, self._slabs, self._touching = peers, worker, slabs, touching or Touching()
        self._expansion = Expansion(holding, driven, worker.device, places)
        self._arrivals = Arrivals(holding, peers, parameters, slabs, self._expansion)
        self._free = list(range(streaming))
        self._followed_by: dict[int, int] = {}
        self._recent: list[int] = []  # blocks in slabs, least recently used first
        self._last: int | None = None
        self._lending = False  # ranks lend each other records while a block is gone through
        residents = [block.index for block in holding.blocks if block.resident]
        for position, block in enumerate(residents):
            self._fetch(block, streaming + position)
            self._arrivals.need(block)
        self._residents = residents

    def _fetch(self, block: int, slab: int) -> None:
        _announce(self._peers, [block, slab])
        self._arrivals.fetch(block, slab)

    def _claim(self, block: int, keep: int) -> bool:
        """Gives `block` a slab, evicting the least recently used one but `keep`."""
        if self._slabs.slab_of(block) is not None:
            return True
        if not self._free:
            victim = next((b for b in self._recent if b != keep), None)
            if victim is None:
                return False
            slab = self._slabs.slab_of(victim)
            assert slab is not None
            self._evict(victim)
            self._free.append(slab)
        self._fetch(block, self._free.pop())
        self._recent.append(block)
        return True

    def _evict(self, block: int) -> None:
        if block in self._recent:
            self._recent.remove(block)
        self._arrivals.evict(block)

    def call(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one module's own forward with its block in a slab."""
        block = self._worker.block_of_module[module]
        self._claim(block, keep=block)
        self._recent.remove(block)
        self._recent.append(block)
        self._arrivals.need(block)
        if self._last is not None:
            self._followed_by[self._last] = block
        self._last = block
        ahead = self._followed_by.get(block)
        if ahead is not None:
            self._claim(ahead, keep=block)
        if not self._touching.lends(block):
            return self._worker.own_forward(module)(*args, **kwargs)
        _announce(self._peers, [block, _THROUGH])
        self._lending = True
        self._touching.enter(block)
        found = self._worker.own_forward(module)(*args, **kwargs)
        self._touching.leave(block)
        self._lending = False
        return found

    def close(self) -> None:
        if not self._lending:  # else the block has failed here: others wait for records, and would not hear of an end
            _announce(self._peers, None)
        for block in [*self._recent, *self._residents]:
            self._evict(block)
        self._expansion.close()


def follow(holding: Holding, peers: Peers, slabs: Slabs, touching: Touching | None = None) -> None:
    """What a rank that computes nothing does meanwhile: it sends what it owns of each block that is announced."""
    arrivals: dict[int, Arrival] = {}
    expansion = Expansion(holding)
    while (announced := _announce(peers, _FOLLOWS)) is not None:
        block, slab = announced
        if slab == _THROUGH:
            assert touching is not None, "a model with families is followed with them"
            touching.enter(block)
            touching.leave(block)
            continue
        if slab in arrivals:
            arrivals[slab].passed.result()
        view = expansion.landing(block, slabs[slab])
        arrivals[slab] = peers.fetch(block, view, holding.fetch(block, view))
    for arrival in arrivals.values():
        arrival.passed.result()


_FOLLOWS, _THROUGH = "follows", -1  # in place of a slab: the block is there and is gone through


def _announce(peers: Peers, fetch: list[int] | str | None) -> list[int] | None:
    """What all ranks do next: the block and slab that the computing ones fetch, the block whose records of families they
    may want, or None at the end.

    Raises:
        AuditError: they do not agree.
    """
    if peers.cluster.size == 1:
        return None
    found = [(rank, each) for rank, each in enumerate(peers.gather(fetch)) if each != _FOLLOWS]
    (first, agreed), *others = found
    for rank, each in others:
        if each != agreed:
            raise AuditError(
                f"rank {first} came to {_described(agreed)}, rank {rank} to {_described(each)}: with several ranks all must "
                f"make the same calls of the model"
            )
    return agreed


def _described(fetch: list[int] | None) -> str:
    return "the end" if fetch is None else f"block {fetch[0]}"


def without_cache(model: nn.Module) -> Callable[[], None]:
    """Turns `use_cache` off in every configuration of a model; returns what puts it back.

    A cache is written by every block, so that recomputation would write it twice.
    """
    changed = []
    for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
        if getattr(config, "use_cache", False):
            changed.append(config)
            config.use_cache = False

    def restore() -> None:
        for config in changed:
            config.use_cache = True

    return restore
