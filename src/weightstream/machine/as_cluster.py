"""The machine that was measured as a cluster for `simulate`: each of its cores a system that computes with one thread."""

from itertools import chain

from weightstream.cluster import Cluster
from weightstream.machine.profile import Profile
from weightstream.prediction.costing import hardware_of, slowdown_of
from weightstream.simulator.clusters import THIS_MACHINE, ClusterPreset
from weightstream.simulator.jobs import UPDATE_BYTES

_LAYOUTS = ("nt", "nn", "tn")  # forward, and backward for inputs and for weights


def cluster_of(
    profile: Profile, *, disk_bytes: int, device_memory: int | None = None, host_memory: int | None = None
) -> ClusterPreset:
    """The cluster that a profile describes.

    Args:
        disk_bytes: free on the disk.
        device_memory, host_memory: of one rank; by default half of the machine's memory for each, in equal parts.
    """
    cores, compute = profile.machine.cores, profile.with_threads(1)
    share = profile.machine.memory_bytes // (2 * cores)
    rates = [compute.products[f"{layout} bfloat16"] for layout in _LAYOUTS]
    peak = max(chain(*rates))
    largest = len(rates) / sum(
        1 / row[-1] for row in rates
    )  # all three operands of the largest size, one after another
    hardware = hardware_of(profile, Cluster(cores), threads=1) if profile.link else None
    alone = hardware_of(profile, Cluster(), threads=1)
    return ClusterPreset(
        name=THIS_MACHINE, most_workers=cores, apart=False, device_memory=device_memory or share,
        memory_bytes=cores * (host_memory or share), peak_flops=peak, efficiency=largest / peak,
        memory_bytes_per_s=profile.memory_bytes_per_s,
        update_bytes_per_s=UPDATE_BYTES / (compute.optimizer["AdamW"] + compute.cast_s["bfloat16"]), watts=0.0,
        link=hardware.link if hardware else None, disk=alone.disk, disk_bytes=disk_bytes, activations="auto",
        updates_beside=False, io_compute_s_per_byte=profile.contention.io_compute_s_per_byte,
        crowded={count: slowdown_of(profile, count, 1) for count in range(1, cores + 1)},
        sources=(f"{profile.machine.processor}, {cores} cores: measured by `weightstream calibrate`, {profile.measured_at}",),
        unverified=(
            "a layer is its matrix products at the rate of the largest that was measured: what else it computes, and what "
            "Python adds, is in `weightstream plan` alone",
            "updates go at the rate of one core, however many ranks there are",
            "power was not measured: energy is given as 0",
        ),
        system="core",
    )  # fmt: skip
