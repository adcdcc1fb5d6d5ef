"""Ranks that are processes, connected by `torch.distributed` (Gloo) as torchrun starts them.

Each channel is a process group of its own, so that a long transfer on one holds up nothing on another. Bytes
move between host memory; on an accelerator slabs are uploaded from there.

Traffic is neither encrypted nor authenticated: see docs/cluster.md for what to put around it.
"""

import fcntl
import ipaddress
import json
import os
import re
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
from torch.distributed.rendezvous import rendezvous

from weightstream.cluster import Cluster
from weightstream.errors import ConfigError, FabricError
from weightstream.fabric.links import Channel, Handle, Links
from weightstream.fabric.lost import Blame

TIMEOUT_S = 120.0
_INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # Linux: the address of an interface
_HEAD_BYTES, _HEAD_TAG, _CUT_TAG = 4096, (1 << 31) - 4, (1 << 31) - 2


@dataclass(slots=True)
class _Work:
    work: Any
    failed: "_Failed"
    timeout_s: float

    def wait(self) -> None:
        try:
            self.work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise self.failed(error) from error


@dataclass(frozen=True, slots=True)
class _Failed:
    """What to say of a message that did not come through."""

    what: str
    other: int
    blame: Blame
    timeout_s: float

    def __call__(self, error: RuntimeError) -> FabricError:
        silent = _ran_out(error)
        lost = self.blame.on(self.other, closed=not silent)
        if lost.reason is not None:
            why = f"rank {lost.rank} stopped: {lost.reason}"
        elif lost.rank != self.other:
            why = f"waited for rank {lost.rank}, which is lost"
        elif silent:
            why = f"nothing for {self.timeout_s:g} s: rank {lost.rank} hangs, or the link to it is down"
        else:
            why = f"rank {lost.rank} is gone ({_first_line(error)})"
        return FabricError(f"{self.what}: {why}; the last commit is whole")


class _GroupChannel(Channel):
    def __init__(self, name: str, rank: int, members: range, group: Any, blame: Blame, timeout_s: float) -> None:
        super().__init__(name, rank, members)
        self._group, self._blame, self._timeout_s = group, blame, timeout_s

    def _send(self, data: Tensor, to: int, tag: int, what: str) -> Handle:
        failed = _Failed(f"{what} from rank {self.rank} to rank {to}", to, self._blame, self._timeout_s)
        try:
            return _Work(self._group.send([data], to - self.members.start, tag), failed, self._timeout_s)
        except RuntimeError as error:
            raise failed(error) from error

    def _receive(self, data: Tensor, source: int, tag: int, what: str) -> Handle:
        failed = _Failed(f"{what} from rank {source} to rank {self.rank}", source, self._blame, self._timeout_s)
        try:
            return _Work(self._group.recv([data], source - self.members.start, tag), failed, self._timeout_s)
        except RuntimeError as error:
            raise failed(error) from error

    def gather(self, value: Any) -> list[Any]:
        # by way of the first rank, so that it is known for whom everyone waits; the library's allgather does not say
        own = json.dumps(value).encode()
        first, *others = self.members
        if self.rank != first:
            sent = self._send_text(own, first)
            text = self._receive_text(first, self._post_text(first))
            for handle in sent:
                handle.wait()
            return list(json.loads(text))
        posted = {rank: self._post_text(rank) for rank in others}
        texts = [own] + [self._receive_text(rank, posted[rank]) for rank in others]
        for sent in [self._send_text(b"[" + b",".join(texts) + b"]", rank) for rank in others]:
            for handle in sent:
                handle.wait()
        return [json.loads(text) for text in texts]

    def stop(self, reason: str) -> None:
        self._blame.stop(reason)
        for other in self.members:
            if self.rank not in self.members or other == self.rank:
                continue
            try:
                # Gloo has no call for it; but a wait that runs out of time closes all connections of its group. One on a
                # connection that is closed already ends before.
                never = self._group.recv([torch.empty(1)], other - self.members.start, _CUT_TAG)
                never.wait(timedelta(milliseconds=1))
            except RuntimeError as error:
                if _ran_out(error):
                    return

    def _send_text(self, text: bytes, to: int) -> list[Handle]:
        """In one message that has its length, and another one with what goes beyond it."""
        head = len(text).to_bytes(8, "little") + text[: _HEAD_BYTES - 8]
        parts = [head.ljust(_HEAD_BYTES, b"\0")] + ([text[_HEAD_BYTES - 8 :]] if len(text) > _HEAD_BYTES - 8 else [])
        return [
            self._send(torch.frombuffer(bytearray(part), dtype=torch.uint8), to, _HEAD_TAG + number, self._telling)
            for number, part in enumerate(parts)
        ]

    def _post_text(self, source: int) -> tuple[Tensor, Handle]:
        data = torch.empty(_HEAD_BYTES, dtype=torch.uint8)
        return data, self._receive(data, source, _HEAD_TAG, self._telling)

    def _receive_text(self, source: int, posted: tuple[Tensor, Handle]) -> bytes:
        data, handle = posted
        handle.wait()
        head = bytes(data.numpy())
        length = int.from_bytes(head[:8], "little")
        if length <= _HEAD_BYTES - 8:
            return head[8 : 8 + length]
        rest = torch.empty(length - (_HEAD_BYTES - 8), dtype=torch.uint8)
        self._receive(rest, source, _HEAD_TAG + 1, self._telling).wait()
        return head[8:] + bytes(rest.numpy())

    @property
    def _telling(self) -> str:
        return f"what ranks {self.members.start} to {self.members.stop - 1} tell each other ({self.name})"


class GroupLinks(Links):
    """The channels of this process; made by `connect`."""

    def __init__(self, blame: Blame, timeout_s: float, interface: str | None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._blame, self._timeout_s, self._interface = blame, timeout_s, interface
        every = range(self.size)
        self.down, self.up, self.control = (self.channel(name, every) for name in ("down", "up", "control"))

    def channel(self, name: str, members: range) -> _GroupChannel:
        with _listening_on(self._interface):
            group = dist.new_group(list(members), timeout=timedelta(seconds=self._timeout_s), backend="gloo")
        return _GroupChannel(name, self.rank, members, group, self._blame, self._timeout_s)

    def divide(self, cluster: Cluster) -> None:
        super().divide(cluster)
        self.commits = self.channel("commits", cluster.memory_ranks)

    def close(self) -> None:
        if dist.is_initialized():
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
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=timeout_s)
    try:
        with _listening_on(interface):
            store, _, _ = next(rendezvous("env://", rank, world, timeout=timeout))
            board = dist.PrefixStore("weightstream", store)
            _meet(board, rank, world, timeout)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
        return GroupLinks(Blame(board, rank, timeout_s), timeout_s, interface)
    except (RuntimeError, ValueError) as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        if isinstance(error, FabricError):
            raise
        raise FabricError(f"rank {rank} could not meet the others: {_first_line(error)}") from error


def _meet(board: dist.Store, rank: int, world: int, timeout: timedelta) -> None:
    """Waits until all ranks are there.

    Raises:
        FabricError: naming those that are not.
    """
    keys = [f"here/{other}" for other in range(world)]
    board.set(keys[rank], "")
    try:
        board.wait(keys, timeout)
    except RuntimeError as error:
        missing = [other for other, key in enumerate(keys) if not board.check([key])]
        raise FabricError(
            f"rank {rank}: after {timeout.total_seconds():g} s ranks {', '.join(map(str, missing))} of {world} were not "
            "there; see what they say, and whether every host can reach MASTER_ADDR"
        ) from error


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


def _ran_out(error: RuntimeError) -> bool:
    return "imed out" in str(error) or "imeout" in str(error)


def _first_line(error: BaseException) -> str:
    """What Gloo says, without its place in the source and its advice."""
    lines = str(error).strip().splitlines()
    text = lines[0].split(" This is typically")[0].rstrip(".") if lines else type(error).__name__
    return re.sub(r"^\[[^]]*\.cc:\d+\] ", "", text)
