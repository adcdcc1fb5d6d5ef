"""Ranks that are processes and do one job after another, since every start of one costs time.

They are forked from a server that has imported everything. Where the ranks meet outlives them, as under torchrun.
"""

import gc
import os
import time
from collections.abc import Callable, Collection, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from tests.forks import CONTEXT

from weightstream import errors
from weightstream.cluster import Cluster
from weightstream.fabric.distributed import compare, connect

LOST = ("Lost", "no answer")


class Processes:
    """The ranks of a cluster.

    Args:
        facts: by rank, what it compares with the others.
        world: how many ranks there are said to be.
        leave_out: ranks that never come.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        timeout_s: float = 30.0,
        facts: Mapping[int, Mapping[str, Any]] | None = None,
        world: int | None = None,
        leave_out: Collection[int] = (),
    ) -> None:
        # the store stays with the ranks' parent, whatever becomes of them
        self._meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for rank in range(cluster.size):
            ours, theirs = CONTEXT.Pipe()
            environment = {
                "RANK": f"{rank}", "WORLD_SIZE": f"{cluster.size if world is None else world}", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": f"{self._meeting.port}", "TORCHELASTIC_USE_AGENT_STORE": "True",
            }  # fmt: skip
            arguments = (theirs, environment, cluster, dict((facts or {}).get(rank, {})), timeout_s)
            process = CONTEXT.Process(target=_rank, args=arguments)
            if rank in leave_out:
                theirs.close()
                self.pipes.append(ours)
                continue
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.started = [self.answer(rank, timeout_s + 60) for rank in range(cluster.size)]

    def ask(self, work: Callable[..., Any], *arguments: Any, within_s: float = 60.0) -> list[tuple[str, Any]]:
        """By rank, ("done", result), (class of the error, message), or `LOST`."""
        for pipe in self.pipes:
            pipe.send((work, arguments))
        until = time.monotonic() + within_s
        return [self.answer(rank, until - time.monotonic()) for rank in range(len(self.pipes))]

    def run(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results in order of rank, or the first error."""
        answers = self.ask(work, *arguments)
        for kind, value in answers:
            if kind != "done":
                raise getattr(errors, kind, AssertionError)(value)
        return [value for _, value in answers]

    def answer(self, rank: int, within_s: float) -> tuple[str, Any]:
        """What one rank says to the last question."""
        try:
            return self.pipes[rank].recv() if self.pipes[rank].poll(max(within_s, 0)) else LOST
        except EOFError:
            return LOST

    def kill(self, rank: int) -> None:
        """Ends a process that may be stopped."""
        self.processes[rank].kill()

    def end(self, within_s: float = 30.0) -> list[int | None]:
        """Lets all go; their exit codes, None for one that had to be killed."""
        for pipe in self.pipes:
            pipe.close()
        until = time.monotonic() + within_s
        for process in self.processes:
            process.join(max(until - time.monotonic(), 0))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
                process.join()
        return codes


def _rank(pipe: Connection, environment: dict[str, str], cluster: Cluster, facts: Any, timeout_s: float) -> None:
    os.environ |= environment
    gc.freeze()  # what was imported is never garbage: collections need not look through it
    torch.set_num_threads(1)
    try:
        links = connect(timeout_s=timeout_s)
        try:
            links.divide(cluster)
            compare(links, facts)
        except BaseException:
            links.close()
            raise
    except BaseException as error:
        pipe.send((type(error).__name__, str(error)))
        return
    pipe.send(("done", None))
    while True:
        try:
            work, arguments = pipe.recv()
        except EOFError:
            break
        try:
            answer = "done", work(links, *arguments)
        except BaseException as error:
            answer = type(error).__name__, str(error)
        pipe.send(answer)
    links.close()
