"""What every kind of link promises, on ranks of one process and on ranks that are processes."""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.distributed.processes import Processes
from torch import Tensor

from weightstream.cluster import Cluster
from weightstream.fabric.links import Channel, Links
from weightstream.fabric.local import run_ranks

CLUSTER = Cluster(2, 2)  # ranks 0 and 1 own records
SIZES = (0, 1, 4096, 3_000_001, 8 << 20)
Run = Callable[..., list[Any]]


def content(source: int, tag: int, nbytes: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * source + tag)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def every_message(channel: Channel, sizes: tuple[int, ...], seed: int) -> int:
    """Everyone to everyone, posted and awaited in an order of its own; the number of wrong messages."""
    draw = random.Random(1000 * seed + channel.rank)
    others = [rank for rank in channel.members if rank != channel.rank]
    todo = [(other, tag, sends) for other in others for tag in range(len(sizes)) for sends in (True, False)]
    draw.shuffle(todo)
    wanted, handles = [], []
    for other, tag, sends in todo:
        if sends:
            handles.append(channel.send(content(channel.rank, tag, sizes[tag]), other, tag, f"message {tag}"))
        else:
            data = torch.empty(sizes[tag], dtype=torch.uint8)
            wanted.append((data, other, tag))
            handles.append(channel.receive(data, other, tag, f"message {tag}"))
    draw.shuffle(handles)
    for handle in handles:
        handle.wait()
    return sum(not torch.equal(data, content(source, tag, sizes[tag])) for data, source, tag in wanted)


def in_any_order(links: Links, seed: int) -> int:
    return every_message(links.down, SIZES, seed)


def many_outstanding(links: Links) -> int:
    return every_message(links.up, (1024,) * 300, 7)


def tells(channel: Channel, turns: int) -> list[list[Any]]:
    return [channel.gather(said(channel.rank, turn)) for turn in range(turns)]


def said(rank: int, turn: int) -> Any:
    return [None, rank, "ä" * 5000 * rank, {"rank": [rank] * turn}, [], 1e-300 * rank][(rank + turn) % 6]


def gathers(links: Links) -> list[list[Any]]:
    return tells(links.control, 12)


def all_at_once(links: Links) -> list[Any]:
    """Every channel in a thread of its own."""
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(every_message, channel, SIZES[:3] * 20, 3) for channel in (links.down, links.up)]
        futures.append(pool.submit(tells, links.control, 20))
        if links.rank in links.commits.members:
            futures.append(pool.submit(tells, links.commits, 20))
        return [future.result() for future in futures]


def traffic(links: Links) -> tuple[dict[int, int], dict[int, int], int]:
    """What was counted for two messages to the next rank."""
    channel, size = links.up, links.size
    before = dict(channel.traffic.sent), dict(channel.traffic.received)
    handles = [channel.send(torch.zeros(25), (links.rank + 1) % size, tag, "sent") for tag in range(2)]
    for tag in range(2):
        handles.append(channel.receive(torch.empty(25), (links.rank - 1) % size, tag, "received"))
    for handle in handles:
        handle.wait()
    after = dict(channel.traffic.sent), dict(channel.traffic.received)
    sent, received = (
        {rank: now[rank] - was.get(rank, 0) for rank in now} for was, now in zip(before, after, strict=True)
    )
    return sent, received, links.control.traffic.sent.total() - links.control.traffic.received.total()


class LinksContract:
    @pytest.mark.parametrize("seed", range(2))
    def test_messages_come_whole_in_any_order(self, run: Run, seed: int) -> None:
        assert run(in_any_order, seed) == [0] * CLUSTER.size

    def test_many_may_be_under_way(self, run: Run) -> None:
        assert run(many_outstanding) == [0] * CLUSTER.size

    def test_values_of_any_size_are_gathered_in_order_of_rank(self, run: Run) -> None:
        expected = [[said(rank, turn) for rank in range(CLUSTER.size)] for turn in range(12)]
        assert run(gathers) == [expected] * CLUSTER.size

    def test_channels_do_not_wait_for_one_another(self, run: Run) -> None:
        every = [[said(rank, turn) for rank in range(CLUSTER.size)] for turn in range(20)]
        some = [[said(rank, turn) for rank in CLUSTER.memory_ranks] for turn in range(20)]
        assert run(all_at_once) == [[0, 0, every, some]] * 2 + [[0, 0, every]] * 2

    def test_bytes_are_counted_by_peer(self, run: Run) -> None:
        for rank, (sent, received, _) in enumerate(run(traffic)):
            assert {peer: nbytes for peer, nbytes in sent.items() if nbytes} == {(rank + 1) % CLUSTER.size: 200}
            assert {peer: nbytes for peer, nbytes in received.items() if nbytes} == {(rank - 1) % CLUSTER.size: 200}


class TestLocal(LinksContract):
    @pytest.fixture
    def run(self) -> Run:
        return lambda work, *arguments: run_ranks(CLUSTER, lambda links: work(links, *arguments), timeout_s=30)


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    processes = Processes(CLUSTER)
    assert processes.started == [("done", None)] * CLUSTER.size
    yield processes
    assert processes.end() == [0] * CLUSTER.size


class TestProcesses(LinksContract):
    @pytest.fixture
    def run(self, processes: Processes) -> Run:
        return processes.run
