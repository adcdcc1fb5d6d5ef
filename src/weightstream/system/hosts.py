"""What a host has: its addresses, its processor cores, the memory that is free."""

import fcntl
import os
import socket
import struct
from pathlib import Path

from weightstream.errors import ConfigError

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
_NO_LIMIT = 1 << 60  # what a control group without a limit says, or more


def own_address(text: str) -> str:
    """An address of this host, from an address, a host name, or the name of a network interface.

    Raises:
        ConfigError: this host has no such address.
    """
    interfaces = [name for _, name in socket.if_nameindex()]
    if text in interfaces:
        return _address_of(text)
    try:
        found = socket.getaddrinfo(text, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0], socket.SOCK_STREAM) as trial:
            trial.bind(found[4])
    except OSError:
        raise ConfigError(
            f"cluster.address: {socket.gethostname()} has neither an address nor a network interface {text!r}; give one "
            f"of its addresses, or one of {', '.join(interfaces)}"
        ) from None
    return str(found[4][0])


def require_free_port(address: str, port: int) -> None:
    """Refuse a port on which nothing can listen.

    Raises:
        ConfigError: another process listens there, or ports like it are not for everybody.
    """
    try:
        listener(address, port).close()
    except OSError as error:
        raise ConfigError(
            f"cluster.port={port} cannot be used on {address}: {error.strerror}; give another one, or 0 for a free one"
        ) from None


def listener(address: str, port: int) -> socket.socket:
    """A socket that is bound to an address of this host, and to a free port if `port` is 0."""
    bound = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last start may linger
        bound.bind((address, port))
        bound.listen(512)
    except BaseException:
        bound.close()
        raise
    return bound


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory_bytes() -> int | None:
    """Memory that this host, or the control group that this process is in, can still give; None where nobody tells."""
    free = _meminfo("MemAvailable")
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most, now = _number(limit), _number(used)
        if most is not None and now is not None and most < _NO_LIMIT:
            left = max(0, most - now + _cached())
            free = left if free is None else min(free, left)
    return free


def _address_of(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        try:
            answer = fcntl.ioctl(query.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            raise ConfigError(
                f"cluster.address: network interface {interface!r} has no IPv4 address: {error.strerror}; give an address"
            ) from None
    return socket.inet_ntoa(answer[20:24])


def _meminfo(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _cached() -> int:
    """Pages of files that a control group counts as used, and gives back when asked."""
    for path in ("/sys/fs/cgroup/memory.stat", "/sys/fs/cgroup/memory/memory.stat"):
        try:
            lines = dict(line.split() for line in Path(path).read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):
            continue
        return int(lines.get("inactive_file", lines.get("total_inactive_file", 0)))
    return 0


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
