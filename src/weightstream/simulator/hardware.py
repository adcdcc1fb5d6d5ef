"""What a schedule runs on: processors, disks and links, as the few numbers that decide how long a step takes.

Facts only. They come from a machine that was measured (`weightstream calibrate`) or from a preset with its sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from weightstream.cluster import Cluster
from weightstream.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk, or what stands in its place; alone each direction has its full rate.

    `together` is how much of both rates a mixture reaches: 1.0, as if one went after the other; 2.0, as if each were alone.
    `urgent_share` of what is read is streamed copies, gradients and activations, while records are read too: the store
    has 3 requests of the first kind under way, and 6 of the second. `latency_s` passes before a transfer is over, while
    the next one goes on.
    """

    read_bytes_per_s: float
    write_bytes_per_s: float
    together: float = 1.0
    latency_s: float = 0.0
    urgent_share: float = 1 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What connects ranks: every rank's own rate in each direction, and the tree along which bytes go.

    `fan_out` 1 is a chain. A node passes a chunk on as soon as it has it; `latency_s` is of one hop.
    """

    bytes_per_s: float
    latency_s: float = 0.0
    chunk_bytes: int = 2 << 20
    fan_out: int = 1

    def fill_s(self, ranks: int, nbytes: float = float("inf")) -> float:
        """From the moment the first byte leaves to the moment the last of `ranks` receivers begins to have a whole chunk,
        or all of so many bytes if that is less."""
        hops = 0
        reached, width = 0, 1
        while reached < ranks:
            width = width * self.fan_out
            reached += width if self.fan_out > 1 else 1
            hops += 1
        return hops * self.latency_s + max(0, hops - 1) * min(self.chunk_bytes, nbytes) / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A cluster's resources.

    Args:
        hosts: the host of each rank; ranks of one host share its cores, its memory and its disk.
        cores_per_host, cores_per_rank: a rank that computes uses so many of its host's; where more are wanted than
            there are, all go slower in proportion.
        disk: of each host that owns records; None if records stay in memory.
        link: None with one rank.
        memory_bytes_per_s: copies within a host's memory, per host.
        memory_of: the same of hosts where it differs.
        updates_beside: whether memory ranks update with processors of their own, while their host computes.
        io_compute_s_per_byte: what a byte that is read or written takes from the compute of the same host, since
            checksums and copies need its cores.
        slowdown: by rank, how many times slower than the others it computes.
        sums_travelling: blocks whose gradient is on its way to its owner while the next one is summed.
    """

    cluster: Cluster
    hosts: tuple[int, ...]
    cores_per_host: float = 1.0
    cores_per_rank: float = 1.0
    disk: Disk | None = None
    link: Link | None = None
    memory_bytes_per_s: float = float("inf")
    memory_of: Mapping[int, float] = field(default_factory=dict)
    updates_beside: bool = False
    io_compute_s_per_byte: float = 0.0
    slowdown: Mapping[int, float] = field(default_factory=dict)
    sums_travelling: int = 2

    def __post_init__(self) -> None:
        if len(self.hosts) != self.cluster.size:
            raise PlanError(f"hardware names hosts of {len(self.hosts)} ranks, the cluster has {self.cluster.size}")
        if self.cluster.size > 1 and self.link is None:
            raise PlanError(
                f"{self.cluster.size} ranks need a link between them, and the cluster has none; give it one, or take one rank"
            )
        for what, rate in (
            ("link.bytes_per_s", self.link.bytes_per_s if self.link else 1.0),
            ("disk.read_bytes_per_s", self.disk.read_bytes_per_s if self.disk else 1.0),
            ("disk.write_bytes_per_s", self.disk.write_bytes_per_s if self.disk else 1.0),
            ("memory_bytes_per_s", min([self.memory_bytes_per_s, *self.memory_of.values()])),
        ):
            if not rate > 0:
                raise PlanError(f"{what}={rate}: expected more than 0; nothing could ever arrive")
