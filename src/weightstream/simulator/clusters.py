"""Clusters as a few numbers, with their sources; what is unverified says so, and goes with every figure that rests on it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from weightstream.cluster import Cluster
from weightstream.errors import PlanError
from weightstream.schedule.allotment import Activations
from weightstream.simulator.hardware import Disk, Hardware, Link
from weightstream.simulator.models import known
from weightstream.units import format_bytes

GPT_J_EFFICIENCY = 0.2724
"""Share of dense peak that a CS-2 reaches inside a layer, everything that it computes counted, recomputation too.

Calibrated on one published row alone, GPT-J 6B on one CS-2 (`validation.calibrate_efficiency` finds it again, and a test
holds this number to it). Without recomputation it is three quarters of that, the 21% of the published 1.59 PFLOP/s.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPreset:
    """Equal systems that compute, and where the records are.

    Args:
        apart: records and updates are with a rank of their own (MemoryX); otherwise with the ranks that compute, all
            on one host.
        device_memory: bytes of one system that computes.
        memory_bytes: bytes that the records have, RAM only.
        disk_bytes: of the disk behind them.
        peak_flops: dense, of one system, in the precision that streams.
        efficiency: the share of it that is reached inside a layer.
        memory_bytes_per_s: between a system that computes and the host memory that activations are spilled to, or from
            which its copies come.
        update_bytes_per_s: at which records are read and written in memory for the optimizer, all owners together.
        watts: of one system.
        host_watts: of what there is besides, once.
        updates_beside: whether records are updated by processors that do not compute.
        io_compute_s_per_byte: what a byte that is read or written takes from compute.
        crowded: by number of systems, how many times slower each of them computes because all share memory and caches.
    """

    name: str
    most_workers: int
    apart: bool
    device_memory: int
    memory_bytes: int
    peak_flops: float
    efficiency: float
    memory_bytes_per_s: float
    update_bytes_per_s: float
    watts: float
    host_watts: float = 0.0
    updates_beside: bool = True
    io_compute_s_per_byte: float = 0.0
    crowded: Mapping[int, float] = field(default_factory=dict)
    link: Link | None = None
    disk: Disk | None = None
    disk_bytes: int = 0
    activations: Activations = "recompute"
    sources: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    system: str = "system"

    def check(self, workers: int) -> None:
        """Refuse a number of systems that it cannot have.

        Raises:
            PlanError: more than there can be, or fewer than one.
        """
        if not 1 <= workers <= self.most_workers:
            raise PlanError(
                f"cluster {self.name} has 1 to {self.most_workers} {self.system}s, --workers is {workers}; "
                f"give a number in between"
            )
        if workers > 1 and self.link is None:
            raise PlanError(
                f"cluster {self.name} has no link between its {self.system}s, --workers is {workers}: they could not work "
                f"together; give --workers 1, or measure a link with `weightstream calibrate`"
            )

    def ranks(self, workers: int) -> Cluster:
        """Who computes and who owns records."""
        return Cluster(workers, 1 if self.apart else "colocated")

    def hardware(self, workers: int, slowdown: Mapping[int, float] | None = None) -> Hardware:
        """The resources of so many systems.

        Args:
            slowdown: by number of the system, how many times slower than the others it computes.

        Raises:
            PlanError: it cannot have so many.
        """
        self.check(workers)
        ranks = self.ranks(workers)
        first, crowd = ranks.compute_ranks.start, self.crowded.get(workers, 1.0)
        factors = slowdown or {}
        return Hardware(
            cluster=ranks, hosts=tuple(range(ranks.size)) if self.apart else (0,) * ranks.size,
            # a system computes with processors of its own: nothing on its host slows it down
            cores_per_host=1.0 if self.apart else float(ranks.size), cores_per_rank=1.0, disk=self.disk,
            link=self.link if ranks.size > 1 else None, memory_bytes_per_s=self.memory_bytes_per_s,
            memory_of={0: self.update_bytes_per_s} if self.apart else {},
            updates_beside=self.updates_beside, io_compute_s_per_byte=self.io_compute_s_per_byte,
            slowdown={
                first + worker: crowd * factors.get(worker, 1.0)
                for worker in (range(workers) if crowd > 1 else factors)
            },
        )  # fmt: skip

    def describe(self) -> str:
        """One line: what one system is."""
        return (
            f"{self.name}: {self.peak_flops / 1e15:.3g} PFLOP/s dense at {self.efficiency:.1%} inside a layer, "
            f"{format_bytes(self.device_memory)}, {self.watts / 1e3:.3g} kW a {self.system}"
        )


_WAFER_SOURCES = (
    "I/O 1.2 Tb/s = 150 GB/s, 40 GB of SRAM, 15 kW: CS-2 data sheet",
    "dense FP16 peak 7.5 PFLOP/s: 120 for 16 systems, Tom's Hardware on Andromeda, 2022-11",
    "MemoryX to 2.4 PB, SwarmX nodes of 1:4, to 192 systems: vendor's glossary",
)
_WAFER_UNVERIFIED = (
    "MemoryX's 4 TB/s, and that one unit feeds any number of systems: only as quoted by others",
    "2 µs a hop of SwarmX: ours",
    "activations that do not fit go to host memory at the rate of the system's I/O, which they have to themselves: ours "
    "(the vendor keeps all of them on the wafer)",
    "everything but a layer's input is computed again on the way back: ours, the vendor does not say",
    "15 kW is the system alone; MemoryX, SwarmX and cooling come on top",
)
# nodes of 1:4 with 100 Gb/s ports, cut through (vendor's glossary); every system has 12 such ports, 1.2 Tb/s
SWARMX = Link(bytes_per_s=150e9, latency_s=2e-6, chunk_bytes=2 << 20, fan_out=4)

_CLUSTERS = (
    ClusterPreset(
        name="cs-2",
        most_workers=192,  # vendor's glossary; press text of August 2021
        apart=True,
        device_memory=40 * 10**9,  # SRAM: CS-2 data sheet
        memory_bytes=2400 * 10**12,  # MemoryX at most: vendor's glossary
        peak_flops=7.5e15,  # 120 PF dense for 16: Tom's Hardware, 2022-11
        efficiency=GPT_J_EFFICIENCY,
        memory_bytes_per_s=150e9,  # spilled activations use the I/O; unverified
        update_bytes_per_s=4e12,  # model-memory bandwidth: quoted by others
        watts=15e3,  # reference, section 1
        link=SWARMX,
        sources=_WAFER_SOURCES,
        unverified=_WAFER_UNVERIFIED,
        system="wafer",
    ),
    ClusterPreset(
        name="cs-3",
        most_workers=2048,  # Tom's Hardware, 2024-03-13: clusters of up to 2,048
        apart=True,
        device_memory=44 * 10**9,  # SRAM: the same
        memory_bytes=1200 * 10**12,  # 1.5 TB, 12 TB or 1.2 PB: the same
        peak_flops=15e15,  # twice the CS-2's (125 against 62.5 "AI" PFLOP/s): the same, and The Next Platform, 2024-03-14
        efficiency=GPT_J_EFFICIENCY,
        memory_bytes_per_s=150e9,
        update_bytes_per_s=4e12,
        watts=15e3,  # "the same power": Tom's Hardware, 2024-03-13; others say 23 kW
        link=SWARMX,  # 12 × 100 GbE as before: the CS-3 specification, as quoted by others
        sources=("44 GB, twice the compute at the same power, up to 2,048 systems: Tom's Hardware, 2024-03-13",),
        unverified=(
            "dense peak 15 PFLOP/s: twice the CS-2's", "the same efficiency inside a layer as calibrated on a CS-2",
            "I/O of 1.2 Tb/s as before: only as quoted by others", "15 kW: the same power as before, others say 23",
            *_WAFER_UNVERIFIED[:4],
        ),
        system="wafer",
    ),
    ClusterPreset(
        name="h100",
        most_workers=1,
        apart=False,
        device_memory=80 * 10**9,  # H100 SXM data sheet: 80 GB HBM3
        memory_bytes=240 * 10**9,  # an eighth of what a DGX H100 has
        peak_flops=989e12,  # bf16 dense: H100 SXM data sheet
        efficiency=0.53,
        memory_bytes_per_s=55e9,  # PCIe 5.0 x16, 64 GB/s before its overhead
        update_bytes_per_s=300e9,
        watts=700,  # H100 SXM data sheet, at most
        host_watts=575,
        disk=Disk(read_bytes_per_s=7e9, write_bytes_per_s=4e9, together=1.5, latency_s=100e-6),
        disk_bytes=3840 * 10**9,
        activations="auto",
        sources=("989 TFLOP/s bf16 dense, 80 GB, 700 W: H100 SXM data sheet",),
        unverified=(
            "53% of peak inside a layer, with recomputation; 40% without it, as Llama 3 405B reached on 8,192 to 16,384 "
            "H100 (arXiv:2407.21783, table 4: 38% to 43%)",
            "55 GB/s over PCIe 5.0 x16", "updates at 300 GB/s of host memory", "one NVMe of 3.84 TB: 7 GB/s read, 4 written",
            "an eighth of a DGX's host and its power",
        ),
        system="GPU",
    ),
    ClusterPreset(
        name="8xh100",
        most_workers=8,
        apart=False,
        device_memory=80 * 10**9,  # H100 SXM data sheet
        memory_bytes=2 * 10**12,  # DGX H100 data sheet: 2 TB
        peak_flops=989e12,  # H100 SXM data sheet
        efficiency=0.53,
        memory_bytes_per_s=8 * 55e9,  # a PCIe 5.0 x16 link each; this is of the host
        update_bytes_per_s=600e9,  # two sockets
        watts=700,  # H100 SXM data sheet
        host_watts=10_200 - 8 * 700,  # DGX H100 data sheet: 10.2 kW in all
        link=Link(bytes_per_s=450e9, latency_s=5e-6, fan_out=1),  # NVLink: 900 GB/s, both directions together
        disk=Disk(read_bytes_per_s=50e9, write_bytes_per_s=25e9, together=1.5, latency_s=100e-6),
        disk_bytes=30_720 * 10**9,  # DGX H100 data sheet: 8 × 3.84 TB
        activations="auto",
        sources=(
            "989 TFLOP/s bf16 dense, 80 GB, 900 GB/s of NVLink in both directions together: H100 SXM data sheet",
            "2 TB, 8 × 3.84 TB NVMe, 10.2 kW: DGX H100 data sheet",
        ),
        unverified=(
            "53% of peak inside a layer, with recomputation; 40% without it, as Llama 3 405B reached (arXiv:2407.21783)",
            "55 GB/s over each PCIe 5.0 x16", "updates at 600 GB/s of host memory", "eight NVMe: 50 GB/s read, 25 written",
        ),
        system="GPU",
    ),
    ClusterPreset(
        name="rtx-4090",
        most_workers=1,
        apart=False,
        device_memory=24 * 10**9,  # Ada whitepaper
        memory_bytes=56 * 10**9,  # of 64 GB, less what the system itself needs
        peak_flops=165.2e12,  # bf16 dense with fp32 sums: Ada whitepaper
        efficiency=0.7,
        memory_bytes_per_s=25e9,  # PCIe 4.0 x16, 32 GB/s before its overhead
        update_bytes_per_s=50e9,
        watts=450,  # board power: Ada whitepaper
        host_watts=150,
        disk=Disk(read_bytes_per_s=7e9, write_bytes_per_s=5e9, together=1.3, latency_s=100e-6),
        disk_bytes=2 * 10**12,
        activations="auto",
        sources=("24 GB, 165 TFLOP/s bf16 dense, 450 W: NVIDIA's Ada whitepaper",),
        unverified=(
            "70% of peak inside a layer", "25 GB/s over PCIe 4.0 x16", "updates at 50 GB/s of two channels of DDR5",
            "one NVMe of 2 TB: 7 GB/s read, 5 written", "150 W for the rest of the machine",
        ),
        system="GPU",
    ),
)  # fmt: skip
CLUSTERS: Mapping[str, ClusterPreset] = {cluster.name: cluster for cluster in _CLUSTERS}
THIS_MACHINE = "this-machine"


def cluster_named(name: str) -> ClusterPreset:
    """The preset of that name.

    Raises:
        ConfigError: there is none; the nearest is named.
    """
    return known(name, {**CLUSTERS}, "--cluster")
