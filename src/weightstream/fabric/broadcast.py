"""Blocks on their way down: from the ranks that own their units through a chain or tree into every slab.

One thread carries out one rank's part, block by block in order of issue. Bytes go on as soon as they are there, chunk by
chunk, and straight from one slab to the next: nothing is copied on the way.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from weightstream.cluster import Cluster
from weightstream.fabric.links import Channel, Handle
from weightstream.fabric.trees import Route, broadcast_route
from weightstream.store.futures import new_future, settle
from weightstream.trace.recorder import NO_LOG, Log

CHUNK_BYTES = 2 << 20
AHEAD = 32  # receives that are posted before their bytes come
JOBS, UNITS, CHUNKS = 1 << 7, 1 << 7, 1 << 14


def tag(job: int, unit: int, chunk: int, layer: int = 0) -> int:
    """Tells the messages apart that are under way at once between two ranks, in 31 bits."""
    return (((job % JOBS) * UNITS + unit % UNITS) * 8 + layer) * CHUNKS + chunk % CHUNKS


def bytes_tensor(view: memoryview) -> Tensor:
    """Writable memory as a tensor of bytes."""
    return torch.frombuffer(view, dtype=torch.uint8) if view.nbytes else torch.empty(0, dtype=torch.uint8)


def all_left(sends: Sequence[Handle]) -> None:
    """Waits until all of these are sent."""
    for handle in sends:
        handle.wait()


@dataclass(frozen=True, slots=True)
class Span:
    """One unit of a block: its bytes in the slab, who owns it, and what number it has in the store."""

    unit: int
    start: int
    stop: int
    owner: int


@dataclass(frozen=True, slots=True)
class _Piece:
    data: Tensor
    route: Route
    tag: int
    unit: int
    number: int  # of the unit within its block


class Broadcast:
    """One rank's part in bringing blocks to slabs."""

    def __init__(self, channel: Channel, cluster: Cluster, log: Log = NO_LOG) -> None:
        self._channel, self._cluster, self._log = channel, cluster, log
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fabric-down")
        self._leaving = ThreadPoolExecutor(1, thread_name_prefix="fabric-passed")
        self._job = 0

    def start(
        self, view: memoryview, spans: Sequence[Span], local: "Mapping[int, Future[object]]", block: int = 0
    ) -> "tuple[Future[None], Future[None]]":
        """Begins with the next block.

        Args:
            view: the slab; bytes of units of this rank are there when their future in `local` is done.
            block: whose bytes they are, in notes.

        Returns:
            Futures: all bytes are here; and all that this rank passes on has left.
        """
        here: Future[None] = new_future()
        passed: Future[None] = new_future()
        job, self._job = self._job, self._job + 1
        self._thread.submit(self._run, job, view, spans, local, here, passed, block)
        return here, passed

    def close(self) -> None:
        """Ends the threads once what was begun is done."""
        self._thread.shutdown(wait=True)
        self._leaving.shutdown(wait=True)

    def _run(
        self,
        job: int,
        view: memoryview,
        spans: Sequence[Span],
        local: "Mapping[int, Future[object]]",
        here: "Future[None]",
        passed: "Future[None]",
        block: int,
    ) -> None:
        sends: list[Handle] = []
        try:
            pieces = self._pieces(job, view, spans)
            began_s = self._move(pieces, local, sends)
        except BaseException as error:
            self._channel.stop(str(error))  # others wait for what does not come from here
            here.set_exception(error)
            passed.set_exception(error)
            return
        here.set_result(None)
        come = sum(piece.data.nbytes for piece in pieces if piece.route.source is not None)
        leave = sum(piece.data.nbytes * len(piece.route.targets) for piece in pieces)

        def left() -> None:
            all_left(sends)
            self._log.note("fetch", block, "down", began_s, time.perf_counter(), max(come, leave))

        # the next block comes while the rest of this one leaves: else the link would rest for a chunk's way
        self._leaving.submit(settle, passed, left)

    def _move(
        self,
        pieces: "list[_Piece]",
        local: "Mapping[int, Future[object]]",
        sends: list[Handle],
    ) -> float:
        """Gives the time at which the first bytes were there to be moved."""
        channel, began_s = self._channel, time.perf_counter()
        expected = (piece for piece in pieces if piece.route.source is not None)
        posted: deque[Handle] = deque()

        def post() -> None:
            piece = next(expected, None)
            if piece is not None:
                assert piece.route.source is not None
                posted.append(channel.receive(piece.data, piece.route.source, piece.tag, f"unit {piece.unit}"))

        for _ in range(AHEAD):
            post()
        own = deque(piece for piece in pieces if piece.route.source is None)

        def send(piece: _Piece) -> None:
            for target in piece.route.targets:
                sends.append(channel.send(piece.data, target, piece.tag, f"unit {piece.unit}"))

        came = False
        for piece in pieces:
            # what is read here leaves as soon as it may, so that links are busy in both directions; waiting for it only
            # in order keeps ranks from waiting for each other
            # (and not so early that a tag passes its earlier use, on a unit that this rank has yet to pass on)
            while own and own[0].number < piece.number + UNITS // 2 and (own[0] is piece or local[own[0].unit].done()):
                local[own[0].unit].result()
                began_s = began_s if sends or came else time.perf_counter()
                send(own.popleft())
            if piece.route.source is not None:
                posted.popleft().wait()
                came = True
                post()
                send(piece)
        for future in local.values():
            future.result()
        return began_s

    def _pieces(self, job: int, view: memoryview, spans: Sequence[Span]) -> list[_Piece]:
        found = []
        data = bytes_tensor(view)
        for number, span in enumerate(spans):
            route = broadcast_route(self._cluster, self._channel.rank, span.owner, span.unit)
            if route.source is None and not route.targets:
                continue  # nothing of it comes by here
            for chunk, start in enumerate(range(span.start, span.stop, CHUNK_BYTES)):
                piece = data[start : min(start + CHUNK_BYTES, span.stop)]
                found.append(_Piece(piece, route, tag(job, number, chunk), span.unit, number))
        return found
