"""Hosts of a small network on one machine: network namespaces, each behind a link of a given rate to one switch.

The switch is a bridge in a namespace of its own, so that nothing is added to the machine's own network, and removing the
namespaces removes everything. Needs root, `ip` and `tc` (package iproute2). The rate is set by token buckets (`tbf`), on
both ends of each link, so that each direction has it.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ranks import Place

BURST = "256kb"
QUEUE = "20ms"
INTERFACE = "eth0"


def missing() -> str | None:
    """Why there can be no such network here; None if there can."""
    tools = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if tools:
        return f"{' and '.join(tools)} not found: install iproute2"
    if os.geteuid() != 0:
        return "not root: network namespaces cannot be made"
    probe = f"ws{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are not permitted here: {made.stderr.strip()}"
    _run("ip", "netns", "del", probe)
    return None


def address(host: int) -> str:
    return f"10.213.7.{host + 1}"


@contextmanager
def hosts(count: int, bits_per_s: float) -> Iterator[list[Place]]:
    """So many hosts; everything is removed at the end."""
    prefix = f"ws{os.getpid()}"
    switch, names = f"{prefix}-switch", [f"{prefix}-{host}" for host in range(count)]
    made: list[str] = []
    try:
        for name in (switch, *names):
            _run("ip", "netns", "add", name)
            made.append(name)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for host, name in enumerate(names):
            port = f"port{host}"
            _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", name, "addr", "add", f"{address(host)}/24", "dev", INTERFACE)
            for link in ("lo", INTERFACE):
                _run("ip", "-n", name, "link", "set", link, "up")
            for where, link in ((switch, port), (name, INTERFACE)):
                bucket = ("rate", f"{bits_per_s:.0f}bit", "burst", BURST, "latency", QUEUE)
                _run("tc", "-n", where, "qdisc", "add", "dev", link, "root", "tbf", *bucket)
        yield [Place(("ip", "netns", "exec", name), {"GLOO_SOCKET_IFNAME": INTERFACE}) for name in names]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


def measured_rate(places: Sequence[Place], seconds: float = 2.0) -> float:
    """Bytes per second of one TCP connection from the second host to the first: what a link carries besides headers."""
    script = [sys.executable, str(Path(__file__).resolve())]
    receiver = subprocess.Popen([*places[0].before, *script, "receive"], stdout=subprocess.PIPE, text=True)
    sender = subprocess.Popen([*places[1].before, *script, "send", str(seconds)])
    out, _ = receiver.communicate(timeout=seconds + 30)
    sender.wait(timeout=30)
    return float(out)


def _receive() -> None:
    with socket.create_server((address(0), 5001)) as server:
        connection, _ = server.accept()
        buffer, total = bytearray(1 << 20), 0
        skipped = time.perf_counter() + 0.5  # while the window opens and the bucket is full
        began = 0.0
        while count := connection.recv_into(buffer):
            now = time.perf_counter()
            if now < skipped:
                continue
            if began:
                total, ended = total + count, now
            else:
                began = now
        print(total / (ended - began))


def _send(seconds: float) -> None:
    until = time.perf_counter() + 10
    while True:
        try:
            connection = socket.create_connection((address(0), 5001))
            break
        except OSError:
            if time.perf_counter() > until:
                raise
            time.sleep(0.1)
    data, until = bytes(1 << 20), time.perf_counter() + seconds
    while time.perf_counter() < until:
        connection.sendall(data)
    connection.close()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")


if __name__ == "__main__":
    _receive() if sys.argv[1] == "receive" else _send(float(sys.argv[2]))
