"""What processes cost one another: ranks that share cores, and the link between two of them."""

import multiprocessing as mp
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from weightstream.cluster import Cluster
from weightstream.errors import ConfigError
from weightstream.fabric.broadcast import Broadcast, Span
from weightstream.fabric.distributed import connect
from weightstream.fabric.heads import Head
from weightstream.fabric.reduce import Reduction
from weightstream.fabric.unit_sums import UnitGradient
from weightstream.machine.kernels import KERNEL_ELEMENTS, product, significant
from weightstream.machine.profile import LinkRates
from weightstream.schedule.reduction import subtrees
from weightstream.store.futures import done
from weightstream.worker.allocator import keep_memory

_CONTEXT = mp.get_context("forkserver")
_WITHIN_S = 60.0


def slowdowns(threads: int, round_s: float = 0.3) -> dict[str, float]:
    """How many times slower each of several processes computes than one alone with as many threads."""
    found: dict[str, float] = {}
    for each in sorted({1, threads}):
        alone = median(_side_by_side(1, each, round_s))
        for processes in (2, 4):
            if processes * each <= 4 * max(threads, 1):
                taken = median(_side_by_side(processes, each, round_s))
                found[f"{processes}x{each}"] = significant(taken / alone)
    return found


def _side_by_side(processes: int, threads: int, round_s: float) -> list[float]:
    """Seconds of a round of each process, all at once."""
    barrier = _CONTEXT.Barrier(processes)
    return _in_processes(processes, _compute, barrier, threads, round_s)


def _compute(rank: int, barrier: Any, threads: int, round_s: float) -> float:
    torch.set_num_threads(threads)
    keep_memory()
    work = product("nt", torch.bfloat16, 256, 1024, 1024)
    wide = torch.rand(KERNEL_ELEMENTS[-2])
    barrier.wait(_WITHIN_S)
    rounds: list[float] = []
    until = time.monotonic() + round_s
    while time.monotonic() < until or len(rounds) < 3:
        started = time.perf_counter()
        for _ in range(4):
            work()
            wide.mul(2.0)
        rounds.append(time.perf_counter() - started)
    return median(rounds)


def link(nbytes: int = 16 << 20, rounds: int = 5) -> LinkRates:
    """A block from one process to another and its gradient back, as the fabric moves them."""
    meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = _in_processes(2, _rank, meeting.port, nbytes, rounds)
    down, down_cpu, up, up_cpu, small, gather = (max(pair) for pair in zip(*found, strict=True))
    return LinkRates(
        broadcast_bytes_per_s=significant(nbytes / down), reduce_bytes_per_s=significant(nbytes / up),
        broadcast_cpu_s_per_byte=significant(down_cpu / nbytes), reduce_cpu_s_per_byte=significant(up_cpu / nbytes),
        latency_s=significant(small), gather_s=significant(gather),
    )  # fmt: skip


def _rank(rank: int, port: int, nbytes: int, rounds: int) -> tuple[float, ...]:
    os.environ |= {
        "RANK": f"{rank}", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    torch.set_num_threads(1)
    cluster = Cluster(1, 1)
    links = connect(timeout_s=_WITHIN_S)
    links.divide(cluster)
    try:
        down, up = Broadcast(links.down, cluster), Reduction(links.up, cluster, 1)
        large, small = (_moves(rank, size, down, up, links.control.gather, cluster) for size in (nbytes, 4096))
        gather = links.control.gather
        moves = (*large, small[0], lambda: None)
        taken = [[_timed(move, gather) for _ in range(rounds + 1)][1:] for move in moves]
        down.close()
        up.close()
        (down_s, down_cpu_s), (up_s, up_cpu_s), (small_s, _), (gather_s, _) = (
            tuple(map(median, zip(*rounds, strict=True))) for rounds in taken
        )
        return down_s, down_cpu_s, up_s, up_cpu_s, small_s, gather_s
    finally:
        links.close()


def _moves(
    rank: int, nbytes: int, down: Broadcast, up: Reduction, gather: Callable[[Any], Any], cluster: Cluster
) -> tuple[Callable[[], None], Callable[[], None]]:
    slab = bytearray(nbytes)
    gradient, total = torch.zeros(nbytes // 4), torch.zeros(nbytes // 4)

    def broadcast() -> None:
        local: dict[int, Future[object]] = {0: done(None)} if rank == 0 else {}
        for future in down.start(memoryview(slab), [Span(0, 0, nbytes, 0)], local):
            future.result()

    def reduce() -> None:
        where = (0, nbytes // 4)
        unit = UnitGradient(0, 0, where, (where,), nbytes // 4)
        nodes = subtrees(1, cluster.groups_of(rank, 1))
        flags = {0: Head(True, {0: bytearray([1])})}
        targets = {0: total} if rank == 0 else {}
        up.start([unit], dict.fromkeys(nodes, flags), {(0, node): gradient for node in nodes}, targets).result()

    return broadcast, reduce


def _timed(move: Callable[[], None], gather: Callable[[Any], Any]) -> tuple[float, float]:
    """Seconds from when both are ready until both are done, and processor time of this one."""
    gather(None)
    started, used = time.perf_counter(), time.process_time()
    move()
    gather(None)
    return time.perf_counter() - started, time.process_time() - used


def _in_processes(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What each process returns. They are forked from a server that has imported everything."""
    _CONTEXT.set_forkserver_preload([__name__])
    pipes: list[Connection] = []
    processes: list[Any] = []
    try:
        for rank in range(count):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_answer, args=(theirs, work, rank, *arguments), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        return [_received(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _received(pipe: Connection) -> Any:
    try:
        kind, value = pipe.recv() if pipe.poll(2 * _WITHIN_S) else ("error", "no answer")
    except EOFError:
        kind, value = "error", "it ended"
    if kind == "error":
        raise ConfigError(f"a process that was to measure what processes cost one another failed: {value}")
    return value


def _answer(pipe: Connection, work: Callable[..., Any], rank: int, *arguments: Any) -> None:
    try:
        pipe.send(("done", work(rank, *arguments)))
    except BaseException as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))
