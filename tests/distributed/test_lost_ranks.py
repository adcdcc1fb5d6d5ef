"""A rank that is lost, or is not like the others: all others say which one, in time, and end."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.distributed.processes import LOST, Processes

from weightstream.cluster import Cluster
from weightstream.errors import ConfigError, FabricError
from weightstream.fabric.broadcast import Broadcast, Span
from weightstream.fabric.distributed import connect
from weightstream.fabric.links import Handle, Links
from weightstream.fabric.local import run_ranks
from weightstream.fabric.lost import Blame, Lost
from weightstream.store.futures import new_future

CLUSTER = Cluster(2, 2)
TIMEOUT_S = 3.0
SLACK_S = 6.0  # of a busy machine, beyond the timeout and the time it takes to find out who it was
BYTES = 1 << 20
Start = Callable[..., Processes]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts ranks, of which none outlives the test."""
    started: list[Processes] = []

    def one(*arguments: Any, **keywords: Any) -> Processes:
        started.append(Processes(*arguments, **keywords))
        return started[-1]

    yield one
    for ranks in started:
        ranks.end(0)


def falls(how: str) -> None:
    if how == "dies":
        os._exit(1)
    if how == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    raise ConfigError("its disk is full")


def ring(links: Links, turn: int) -> list[Handle]:
    """Everyone waits for the rank before it, in the end for the lost one."""
    came = links.down.receive(torch.empty(BYTES), (links.rank - 1) % links.size, turn, "unit 7")
    return [came, links.down.send(torch.zeros(BYTES), (links.rank + 1) % links.size, turn, "unit 7")]


def to_one(links: Links, victim: int, turn: int) -> list[Handle]:
    others = [rank for rank in range(links.size) if rank != victim]
    if links.rank == victim:
        return [links.up.receive(torch.empty(BYTES), rank, turn, "gradient") for rank in others]
    return [links.up.send(torch.zeros(BYTES), victim, turn, "gradient")]


def until_one_falls(links: Links, pattern: str, victim: int, how: str) -> None:
    """Messages in turns, in the midst of which a rank is lost."""
    for turn in range(1000):
        if turn == 5 and links.rank == victim:
            falls(how)
        handles: list[Handle] = []
        if pattern == "ring":
            handles = ring(links, turn)
        elif pattern == "to one":
            handles = to_one(links, victim, turn)
        else:
            links.control.gather({"turn": turn})
        for handle in handles:
            handle.wait()


@pytest.mark.parametrize("how", ["dies", "stops"])
@pytest.mark.parametrize(("pattern", "victim"), [("ring", 2), ("to one", 1), ("gather", 3), ("gather", 0)])
def test_every_rank_names_the_lost_one(start: Start, pattern: str, victim: int, how: str) -> None:
    ranks = start(CLUSTER, timeout_s=TIMEOUT_S)
    started = time.monotonic()
    for pipe in ranks.pipes:
        pipe.send((until_one_falls, (pattern, victim, how)))
    others = [rank for rank in range(CLUSTER.size) if rank != victim]
    answers = {rank: ranks.answer(rank, 60) for rank in others}
    assert time.monotonic() - started < 2 * TIMEOUT_S + SLACK_S
    assert ranks.answer(victim, 0) == LOST
    for rank, (kind, message) in answers.items():
        assert kind == "FabricError", (rank, message)
        assert f"rank {victim}" in message.split(": ", 1)[1], (rank, message)
        assert "last commit is whole" in message
    ranks.kill(victim)
    codes = ranks.end()
    assert [codes[rank] for rank in others] == [0] * len(others)


def stops_while_its_threads_wait(links: Links) -> float:
    """Rank 0 stops while all others wait for it, or for one that does; after how long its own threads let it go."""
    down = Broadcast(links.down, CLUSTER)
    read: Future[object] = new_future()
    here, _ = down.start(memoryview(bytearray(BYTES)), [Span(0, 0, BYTES, 0)], {} if links.rank else {0: read})
    started = time.monotonic()
    try:
        if links.rank == 0:
            time.sleep(0.5)
            links.down.receive(torch.empty(1), 3, 99, "what never comes")
            links.stop("its disk is full")
        elif links.rank == 1:
            links.control.gather("never complete")
        else:
            here.result()
            raise AssertionError("nothing can have come")
    except FabricError as error:
        links.stop(str(error))
        raise
    finally:
        read.set_result(None)
        down.close()
    return time.monotonic() - started


def test_a_rank_that_stops_says_why_to_all_at_once(start: Start) -> None:
    ranks = start(CLUSTER, timeout_s=60)
    (kind, value), *others = ranks.ask(stops_while_its_threads_wait, within_s=20)
    assert kind == "done", value
    assert value < 5
    for kind, value in others:
        assert kind == "FabricError", value
        assert "rank 0 stopped: its disk is full" in value
    assert ranks.end() == [0] * CLUSTER.size


def test_what_stops_one_local_rank_stops_all() -> None:
    with pytest.raises(ConfigError, match="its disk is full"):
        run_ranks(CLUSTER, lambda links: until_one_falls(links, "ring", 2, "raises"), timeout_s=60)


def test_ranks_with_other_facts_are_refused_by_all_alike(start: Start) -> None:
    facts = {rank: {"configuration": "a1" if rank != 2 else "b2", "seed": 1} for rank in range(CLUSTER.size)}
    ranks = start(CLUSTER, facts=facts, timeout_s=20)
    assert {kind for kind, _ in ranks.started} == {"ConfigError"}
    (message,) = {text for _, text in ranks.started}
    assert "configuration: rank 0 has 'a1', rank 2 has 'b2'" in message
    assert "seed" not in message
    assert ranks.end() == [0] * CLUSTER.size


def test_another_number_of_ranks_is_refused(start: Start) -> None:
    ranks = start(CLUSTER, world=3, timeout_s=20, leave_out={3})
    (answer,) = set(ranks.started[:3])
    assert answer[0] == "ConfigError"
    assert "is 4 ranks, there are 3" in answer[1]
    assert ranks.end() == [0] * 3


def test_ranks_that_do_not_come_are_named(start: Start) -> None:
    ranks = start(CLUSTER, timeout_s=1.5, leave_out={1, 3})
    assert [kind for kind, _ in ranks.started] == ["FabricError", LOST[0], "FabricError", LOST[0]]
    assert "ranks 1, 3 of 4 were not there" in ranks.started[0][1]
    ranks.end()


def test_a_process_that_is_no_rank_says_how_to_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="torchrun"):
        connect()


class OwnBoard:
    """A board that only this process sees."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str, /) -> None:
        self._values[key] = value.encode()

    def get(self, key: str, /) -> bytes:
        return self._values[key]

    def check(self, keys: list[str], /) -> bool:
        return all(key in self._values for key in keys)


@pytest.mark.parametrize(
    ("waits_for", "lost"), [({0: 1, 1: 2, 2: 3, 4: 2}, 3), ({0: 5}, 5), ({1: 0, 0: 1, 2: 0}, None)]
)
def test_the_end_of_the_chain_is_lost(waits_for: dict[int, int], lost: int | None) -> None:
    board = OwnBoard()
    with ThreadPoolExecutor(len(waits_for)) as pool:
        found = {
            rank: pool.submit(Blame(board, rank, 2.0).on, other, closed=False) for rank, other in waits_for.items()
        }
    for rank, future in found.items():
        assert future.result() == Lost(waits_for[rank] if lost is None else lost)


class DeadBoard(OwnBoard):
    def set(self, key: str, value: str, /) -> None:
        raise RuntimeError("connection reset")


class SilentBoard(OwnBoard):
    def set(self, key: str, value: str, /) -> None:
        time.sleep(20)


@pytest.mark.parametrize("board", [DeadBoard, SilentBoard])
def test_without_a_board_the_rank_that_was_waited_for_is_named(board: type[OwnBoard]) -> None:
    started = time.monotonic()
    blame = Blame(board(), 0, 1.0)
    assert [blame.on(3, closed=True), blame.on(4, closed=True)] == [Lost(3), Lost(3)]
    assert time.monotonic() - started < 5


def test_silence_among_local_ranks_ends_in_time() -> None:
    def work(links: Links) -> None:
        if links.rank:
            links.control.gather(1)

    with pytest.raises(FabricError, match="tell each other"):
        run_ranks(CLUSTER, work, timeout_s=0.5)
