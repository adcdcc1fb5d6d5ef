"""Blocks on their way down: from the ranks that own their units through a chain or tree into every slab.

One thread carries out one rank's part, block by block in order of issue. Bytes go on as soon as they are there, chunk by
chunk, and straight from one slab to the next: nothing is copied on the way.
"""

import time
from collections import Counter, deque
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
AHEAD = 64  # receives that are posted before their bytes come
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


class _Job:
    """A block on its way through this rank."""

    def __init__(self, block: int, pieces: "list[_Piece]", local: "Mapping[int, Future[object]]") -> None:
        self.block, self.pieces, self.local = block, pieces, local
        self.here: Future[None] = new_future()
        self.passed: Future[None] = new_future()
        self.sends: list[Handle] = []
        self._expected = (piece for piece in pieces if piece.route.source is not None)
        self._posted: deque[Handle] = deque()

    def post(self, channel: Channel) -> bool:
        """Asks for the next of what comes; whether there was any more."""
        piece = next(self._expected, None)
        if piece is None:
            return False
        assert piece.route.source is not None
        self._posted.append(channel.receive(piece.data, piece.route.source, piece.tag, f"unit {piece.unit}"))
        return True

    def await_next(self) -> None:
        """Until what was asked for first is here."""
        self._posted.popleft().wait()

    def send(self, piece: _Piece, channel: Channel) -> None:
        for target in piece.route.targets:
            self.sends.append(channel.send(piece.data, target, piece.tag, f"unit {piece.unit}"))

    def nbytes(self) -> int:
        """In the direction in which more of it moves."""
        come = sum(piece.data.nbytes for piece in self.pieces if piece.route.source is not None)
        leave = sum(piece.data.nbytes * len(piece.route.targets) for piece in self.pieces)
        return max(come, leave)


class Broadcast:
    """One rank's part in bringing blocks to slabs."""

    def __init__(self, channel: Channel, cluster: Cluster, log: Log = NO_LOG) -> None:
        self._channel, self._cluster, self._log = channel, cluster, log
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fabric-down")
        self._leaving = ThreadPoolExecutor(1, thread_name_prefix="fabric-passed")
        self._jobs: deque[_Job] = deque()  # issued and not here yet, in order; the first is the one that moves
        self._asked = 0  # receives that are posted and not waited for
        self._count = 0

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
        job = _Job(block, self._pieces(self._count, view, spans), local)
        self._count += 1
        self._jobs.append(job)
        self._thread.submit(self._run, job)
        return job.here, job.passed

    def close(self) -> None:
        """Ends the threads once what was begun is done."""
        self._thread.shutdown(wait=True)
        self._leaving.shutdown(wait=True)

    def _run(self, job: _Job) -> None:
        try:
            began_s = self._move(job)
        except BaseException as error:
            self._channel.stop(str(error))  # others wait for what does not come from here
            job.here.set_exception(error)
            job.passed.set_exception(error)
            return
        finally:
            self._jobs.popleft()
        job.here.set_result(None)

        def left() -> None:
            all_left(job.sends)
            self._log.note("fetch", job.block, "down", began_s, time.perf_counter(), job.nbytes())

        # the next block comes while the rest of this one leaves: else the link would rest for a chunk's way
        self._leaving.submit(settle, job.passed, left)

    def _ask(self) -> None:
        """Posts receives, of this block and of those that were issued since: a sender begins only when it knows that it is
        waited for, so that a link would rest for a message's way between two blocks."""
        for number in range(len(self._jobs)):
            while self._asked < AHEAD and self._jobs[number].post(self._channel):
                self._asked += 1

    def _move(self, job: _Job) -> float:
        """Gives the time at which the first bytes were there to be moved."""
        channel, local, began_s = self._channel, job.local, time.perf_counter()
        self._ask()
        own = deque(piece for piece in job.pieces if piece.route.source is None)
        came = False
        for piece in job.pieces:
            # what is read here leaves as soon as it may, so that links are busy in both directions; waiting for it only
            # in order keeps ranks from waiting for each other
            # (and not so early that a tag passes its earlier use, on a unit that this rank has yet to pass on)
            while own and own[0].number < piece.number + UNITS // 2 and (own[0] is piece or local[own[0].unit].done()):
                local[own[0].unit].result()
                began_s = began_s if job.sends or came else time.perf_counter()
                job.send(own.popleft(), channel)
            if piece.route.source is not None:
                job.await_next()
                came, self._asked = True, self._asked - 1
                self._ask()
                job.send(piece, channel)
        for future in local.values():
            future.result()
        return began_s

    def _pieces(self, job: int, view: memoryview, spans: Sequence[Span]) -> list[_Piece]:
        """What comes by here, in the order in which this rank moves it: as if every chunk took one turn for each link.

        Units take different ways through the ranks. If they came unit by unit, a rank would have what it is the first to
        get long before it comes to pass it on, and links would be idle and crowded in turns. Whoever a chunk comes from
        moves it a turn earlier, so that ranks never wait for each other in a circle. `UNITS // 2` units at a time are
        moved so, and tags tell all apart that are under way.
        """
        found: list[tuple[tuple[int, int], _Piece]] = []
        before: Counter[tuple[int, int, int]] = Counter()  # chunks so far of units that take the same way
        data = bytes_tensor(view)
        for number, span in enumerate(spans):
            route = broadcast_route(self._cluster, self._channel.rank, span.owner, span.unit)
            turn = number // (UNITS // 2)
            way = turn, span.owner, span.unit % self._cluster.workers
            chunks = range(span.start, span.stop, CHUNK_BYTES)
            if route.source is not None or route.targets:
                for chunk, start in enumerate(chunks):
                    piece = data[start : min(start + CHUNK_BYTES, span.stop)]
                    where = turn, before[way] + chunk + route.hops
                    found.append((where, _Piece(piece, route, tag(job, number, chunk), span.unit, number)))
            before[way] += len(chunks)
        return [piece for _, piece in sorted(found, key=lambda item: item[0])]
