"""Ranks that are processes, connected by `torch.distributed` (Gloo) as torchrun starts them.

Each channel is a process group of its own, so that a long transfer on one holds up nothing on another, and each is used
by one thread. Bytes move between host memory; on an accelerator slabs are uploaded from there.

Traffic is neither encrypted nor authenticated: see docs/cluster.md for what to put around it.
"""

import fcntl
import ipaddress
import json
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weightstream.cluster import Cluster
from weightstream.errors import ConfigError, FabricError
from weightstream.fabric.links import Channel, Handle, Links

TIMEOUT_S = 120.0
_INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # Linux: the address of an interface


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

    def __init__(self, timeout_s: float, interface: str | None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._timeout_s, self._interface = timeout_s, interface
        every = range(self.size)
        self.down, self.up, self.control = (self._channel(name, every) for name in ("down", "up", "control"))

    def _channel(self, name: str, members: range) -> _GroupChannel:
        try:
            with _listening_on(self._interface):
                group = dist.new_group(list(members), timeout=timedelta(seconds=self._timeout_s), backend="gloo")
        except RuntimeError as error:
            raise FabricError(f"rank {self.rank}, {name}: {_reason(error, self._timeout_s)}") from error
        return _GroupChannel(name, self.rank, members, group, self._timeout_s)

    def divide(self, cluster: Cluster) -> None:
        super().divide(cluster)
        self.commits = self._channel("commits", cluster.memory_ranks)

    def close(self) -> None:
        dist.destroy_process_group()


def connect(*, timeout_s: float = TIMEOUT_S, address: str | None = None) -> GroupLinks:
    """Meets the other ranks, as torchrun's environment says.

    Args:
        timeout_s: after which a rank that says nothing counts as lost.
        address: one of this host's, on which this rank listens; default: loopback where the ranks meet on loopback, else
            the one that the host's name stands for.

    Raises:
        ConfigError: this process is no rank, or has no such address.
        FabricError: not all ranks came within `timeout_s`.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"this process is no rank: {', '.join(missing)} not set; start it with torchrun, or with `weightstream fit … "
            f"cluster.workers=N`, which does so"
        )
    if address is None and _is_loopback(os.environ["MASTER_ADDR"]):
        address = "127.0.0.1"
    interface = None if address is None else _interface_of(address)
    try:
        with _listening_on(interface):
            dist.init_process_group("gloo", init_method="env://", timeout=timedelta(seconds=timeout_s))
        return GroupLinks(timeout_s, interface)
    except (RuntimeError, ValueError) as error:
        raise FabricError(f"rank {os.environ['RANK']}: {_reason(error, timeout_s)}") from error


def compare(links: Links, facts: Mapping[str, Any]) -> None:
    """Refuses ranks that have other facts (JSON) than rank 0; every rank raises the same.

    Raises:
        ConfigError: naming each difference.
    """
    found = links.gather(dict(facts))
    differing = [
        f"{key}: rank 0 has {found[0].get(key)!r}, rank {rank} has {other.get(key)!r}"
        for rank, other in enumerate(found)
        for key in sorted(found[0].keys() | other.keys())
        if other.get(key) != found[0].get(key)
    ]
    if differing:
        raise ConfigError(
            "ranks were not started alike:\n  "
            + "\n  ".join(differing[:8])
            + "\ngive every rank the same package versions "
            "and the same configuration"
        )


@contextmanager
def _listening_on(interface: str | None) -> Iterator[None]:
    """Gloo listens on this network interface and nowhere else. It asks the environment which, and no other way."""
    if interface is None or os.environ.get(_INTERFACE):
        yield
        return
    os.environ[_INTERFACE] = interface
    try:
        yield
    finally:
        del os.environ[_INTERFACE]


def _interface_of(address: str) -> str:
    """The network interface that has an IPv4 address."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
            except OSError:
                continue  # it has none
        if socket.inet_ntoa(found[20:24]) == address:
            return name
    if _is_loopback(address):
        return "lo"  # all of 127.0.0.0/8 is there
    raise ConfigError(f"this host has no network interface with the address {address}; give one of its own")


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
