"""Ranks that are processes, connected by `torch.distributed` (Gloo) as torchrun starts them.

Each channel is a process group of its own, so that a long transfer on one holds up nothing on another, and each is used
by one thread. Bytes move between host memory; on an accelerator slabs are uploaded from there.

Traffic is neither encrypted nor authenticated: see docs/cluster.md for what to put around it.
"""

import ipaddress
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weightstream.cluster import Cluster
from weightstream.errors import ConfigError, FabricError
from weightstream.fabric.links import Channel, Handle, Links

TIMEOUT_S = 120.0
_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass(slots=True)
class _Work:
    work: Any
    what: str
    timeout_s: float

    def wait(self) -> None:
        try:
            self.work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise FabricError(f"{self.what}: {_reason(error, self.timeout_s)}") from error


class _GroupChannel(Channel):
    def __init__(self, name: str, rank: int, members: range, group: Any, timeout_s: float) -> None:
        super().__init__(name, rank, members)
        self._group, self._timeout_s = group, timeout_s

    def _send(self, data: Tensor, to: int, tag: int, what: str) -> Handle:
        what = f"{what} from rank {self.rank} to rank {to}"
        try:
            return _Work(self._group.send([data], to - self.members.start, tag), what, self._timeout_s)
        except RuntimeError as error:
            raise FabricError(f"{what}: {_reason(error, self._timeout_s)}") from error

    def _receive(self, data: Tensor, source: int, tag: int, what: str) -> Handle:
        what = f"{what} from rank {source} to rank {self.rank}"
        try:
            return _Work(self._group.recv([data], source - self.members.start, tag), what, self._timeout_s)
        except RuntimeError as error:
            raise FabricError(f"{what}: {_reason(error, self._timeout_s)}") from error

    def gather(self, value: Any) -> list[Any]:
        own = bytearray(json.dumps(value).encode())
        what = f"what ranks {self.members.start} to {self.members.stop - 1} tell each other ({self.name})"
        lengths = self._gather(torch.tensor([len(own)]), what)
        most = max(int(length) for length in lengths)
        own.extend(bytes(most - len(own)))
        texts = self._gather(torch.frombuffer(own, dtype=torch.uint8), what)
        return [json.loads(bytes(text[: int(length)].tolist())) for text, length in zip(texts, lengths, strict=True)]

    def _gather(self, own: Tensor, what: str) -> list[Tensor]:
        found = [torch.empty_like(own) for _ in self.members]
        try:
            work = self._group.allgather([found], [own])
        except RuntimeError as error:
            raise FabricError(f"{what}: {_reason(error, self._timeout_s)}") from error
        _Work(work, what, self._timeout_s).wait()
        return found


class GroupLinks(Links):
    """The channels of this process; made by `connect`."""

    def __init__(self, cluster: Cluster, timeout_s: float) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        timeout = timedelta(seconds=timeout_s)

        def channel(name: str, members: range) -> _GroupChannel:
            group = dist.new_group(list(members), timeout=timeout, backend="gloo")
            return _GroupChannel(name, self.rank, members, group, timeout_s)

        every = range(self.size)
        self.down, self.up, self.control = (channel(name, every) for name in ("down", "up", "control"))
        self.commits = channel("commits", cluster.memory_ranks)

    def close(self) -> None:
        dist.destroy_process_group()


def connect(cluster: Cluster, facts: Mapping[str, Any] | None = None, *, timeout_s: float = TIMEOUT_S) -> GroupLinks:
    """Meets the other ranks, as torchrun's environment says, and compares with them what has to be equal.

    Args:
        facts: JSON that must be the same on every rank, such as the digest of the configuration.
        timeout_s: after which a rank that says nothing counts as lost.

    Raises:
        ConfigError: this process is no rank, there are more or fewer than the cluster needs, or ranks differ.
        FabricError: not all ranks came within `timeout_s`.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"this process is no rank: {', '.join(missing)} not set; start it with torchrun, or with "
            f"`weightstream fit … cluster.workers={cluster.workers}`, which does so"
        )
    world = int(os.environ["WORLD_SIZE"])
    if world != cluster.size:
        raise ConfigError(
            f"cluster.workers={cluster.workers} with cluster.memory={cluster.memory} is {cluster.size} ranks, torchrun "
            f"started {world}; give it --nproc-per-node {cluster.size} in all, or change cluster.workers"
        )
    try:
        with _interface(os.environ["MASTER_ADDR"]):
            dist.init_process_group("gloo", init_method="env://", timeout=timedelta(seconds=timeout_s))
            links = GroupLinks(cluster, timeout_s)
    except (RuntimeError, ValueError) as error:
        raise FabricError(f"rank {os.environ['RANK']}: {_reason(error, timeout_s)}") from error
    versions = {name: metadata.version(name) for name in ("weightstream", "torch")}
    _compare(links.control.gather(versions | dict(facts or {})))
    return links


def _compare(found: list[dict[str, Any]]) -> None:
    """Refuses ranks that differ from rank 0; every rank raises the same."""
    differing = [
        f"{key}: rank 0 has {found[0].get(key)!r}, rank {rank} has {facts.get(key)!r}"
        for rank, facts in enumerate(found)
        for key in sorted(found[0].keys() | facts.keys())
        if facts.get(key) != found[0].get(key)
    ]
    if differing:
        raise ConfigError(
            "ranks were not started alike:\n  "
            + "\n  ".join(differing[:8])
            + "\ngive every rank the same package versions "
            "and the same configuration"
        )


@contextmanager
def _interface(master: str) -> Iterator[None]:
    """Where the ranks meet on loopback, Gloo listens there and nowhere else."""
    if os.environ.get(_INTERFACE) or not _is_loopback(master):
        yield
        return
    os.environ[_INTERFACE] = "lo"
    try:
        yield
    finally:
        del os.environ[_INTERFACE]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        return False


def _reason(error: BaseException, timeout_s: float) -> str:
    """The first line of what Gloo says, in words where it is known."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "imed out" in text or "imeout" in text:
        return f"nothing for {timeout_s:g} s, the other rank hangs or the link is down; the last commit is whole"
    if "onnection" in text or "peer" in text.lower():
        return f"the other rank is gone ({text}); the last commit is whole"
    return text
