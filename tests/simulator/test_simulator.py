"""Golden simulations, steps by hand, and what the simulator takes from modules that it may not import."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.schedule.examples import KIB, chain
from tests.simulator.examples import among, durations

from weightstream.cluster import Cluster
from weightstream.errors import PlanError
from weightstream.fabric.together import SUMS_TRAVELLING
from weightstream.schedule.allotment import Facts, allot
from weightstream.schedule.cost import StepBytes, lower_bound
from weightstream.simulator.hardware import Disk, Hardware, Link
from weightstream.simulator.simulator import Simulation, simulate
from weightstream.store.tiers import URGENT_DEPTH
from weightstream.store.tiers import Disk as StoreDisk

GOLDEN = Path(__file__).parent / "golden"
MEASURED = {"boundary_bytes": (4 * KIB,) * 4, "kept_bytes": (64 * KIB,) * 4, "activations": "recompute"}
SLOW_DISK = Disk(read_bytes_per_s=8 * KIB, write_bytes_per_s=16 * KIB, together=1.5)


def run(facts: Facts, hardware: Hardware, **changes: object) -> Simulation:
    allotted = allot(facts)
    settings = {"record_buffers": min(3, allotted.record_buffers)} | changes
    return simulate(facts, replace(allotted, **settings), durations(facts), hardware, keep_spans=True)  # type: ignore[arg-type]


def alone(**settings: object) -> Hardware:
    return Hardware(cluster=Cluster(), hosts=(0,), **settings)  # type: ignore[arg-type]


def several(cluster: Cluster, **settings: object) -> Hardware:
    chosen: dict[str, object] = {
        "hosts": tuple(range(cluster.size)),
        "link": Link(bytes_per_s=4 * KIB, latency_s=0.125),
    }
    return Hardware(cluster=cluster, **chosen | settings)  # type: ignore[arg-type]


def text(found: Simulation) -> str:
    """The last step: what it came to, and its spans in order of their beginning."""
    last = max(span.step for span in found.spans)
    spans = sorted((s for s in found.spans if s.step == last), key=lambda s: (s.begin_s, s.end_s, s.rank, s.resource))
    head = [
        f"# step {found.step_s:.4f} s, first {found.first_step_s:.4f} s, waited {found.waited_s:.4f} s, {found.binds} binds",
        f"# read {found.read_bytes} written {found.written_bytes} down {found.down_bytes} up {found.up_bytes}",
        f"# busy {' '.join(f'{name} {seconds:.4f}' for name, seconds in sorted(found.busy_s.items()))}",
    ]
    lines = [
        f"{s.begin_s:9.4f} +{s.waited_s:8.4f} {s.end_s:9.4f}  rank {s.rank} {s.resource:9} {s.what}"
        for s in spans
        if s.end_s > s.begin_s
    ]
    return "\n".join([*head, *lines]) + "\n"


LAYERS = chain(micro_batches=2, ram_tier=False, **MEASURED)
APART, TOGETHER = Cluster(2, 1), Cluster(2)
CASES = {
    "clip": (LAYERS, alone(disk=SLOW_DISK), {"slabs": 3, "staged_in_ram": frozenset({0})}),
    "no_clip": (replace(LAYERS, deferred=False), alone(disk=SLOW_DISK), {"slabs": 3}),
    "spilled": (LAYERS, alone(disk=SLOW_DISK), {"slabs": 3, "boundaries": ("disk", "host", "disk", "device")}),
    "apart": (among(LAYERS, APART), several(APART, updates_beside=True), {"slabs": 3}),
    "colocated": (among(replace(LAYERS, deferred=False), TOGETHER), several(TOGETHER, disk=SLOW_DISK), {"slabs": 3}),
}


@pytest.mark.parametrize("name", CASES)
def test_golden_simulation(name: str, update_golden: bool) -> None:
    facts, hardware, changes = CASES[name]
    found = text(run(facts, hardware, gradient_buffers=2, **changes))
    path = GOLDEN / f"{name}.txt"
    if update_golden:
        path.write_text(found)
    assert path.read_text().splitlines() == found.splitlines(), (
        "if this is meant: pytest tests/simulator --update-golden"
    )


def test_every_golden_file_has_its_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES)


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("slabs", [2, 3, 5])
@pytest.mark.parametrize("pinned", [frozenset(), frozenset({1, 3})])
def test_a_steady_step_moves_the_least_that_it_must(deferred: bool, slabs: int, pinned: frozenset[int]) -> None:
    facts = chain(5, deferred=deferred, ram_tier=False)
    staged = frozenset({0, 2})
    found = run(
        facts, alone(disk=SLOW_DISK), slabs=slabs, pinned_copies=pinned, pinned_states=pinned, staged_in_ram=staged,
        gradient_buffers=2,
    )  # fmt: skip
    recent = [block.index for block in reversed(facts.blocks) if not block.resident]
    bound = lower_bound(
        facts.blocks, deferred=deferred, kept_across_turn=frozenset(recent[:slabs]), pinned_copies=pinned,
        pinned_states=pinned, staged_on_disk=frozenset({1, 3, 4, 5}) if deferred else frozenset(),
    )  # fmt: skip
    assert StepBytes(found.read_bytes, found.written_bytes) == bound


def test_the_disk_binds_where_it_is_slow_and_compute_where_it_is_fast() -> None:
    slow = run(LAYERS, alone(disk=Disk(read_bytes_per_s=KIB, write_bytes_per_s=KIB)))
    fast = run(LAYERS, alone(disk=Disk(read_bytes_per_s=1e9, write_bytes_per_s=1e9)))
    assert slow.binds in {"read", "write"}
    assert fast.binds == "compute"
    # a disk that does one after the other is busy all the time: the step is its bytes
    moved = (slow.read_bytes + slow.written_bytes) / KIB
    assert slow.busy_s["read"] + slow.busy_s["write"] == pytest.approx(moved)
    assert moved <= slow.step_s <= 1.3 * moved


def test_ranks_of_one_host_share_its_cores() -> None:
    facts = among(LAYERS, TOGETHER)
    apart = run(facts, several(TOGETHER, link=Link(bytes_per_s=float("inf"))))
    beside = run(facts, several(TOGETHER, hosts=(0, 0), link=Link(bytes_per_s=float("inf"))))
    wide = run(facts, several(TOGETHER, hosts=(0, 0), cores_per_host=2.0, link=Link(bytes_per_s=float("inf"))))
    assert beside.step_s == pytest.approx(2 * apart.step_s)
    assert wide.step_s == apart.step_s


def test_checksums_take_cores_from_what_computes() -> None:
    """Each byte takes its part of compute, however fast the disk is."""
    disk = Disk(read_bytes_per_s=64 * KIB, write_bytes_per_s=64 * KIB)
    free, costly = (run(LAYERS, alone(disk=disk, io_compute_s_per_byte=cost)) for cost in (0.0, 2.0**-14))
    moved = costly.read_bytes + costly.written_bytes
    assert costly.step_s == pytest.approx(free.busy_s["compute"] + moved * 2.0**-14, rel=0.02)


def test_each_byte_goes_down_and_up_once_however_many_workers_there_are() -> None:
    found = {}
    for workers in (1, 2, 4):
        cluster = Cluster(workers, 1)
        facts = among(chain(micro_batches=4, reduction_groups=4, ram_tier=False, **MEASURED), cluster)
        found[workers] = run(facts, several(cluster), slabs=3)
    assert len({(each.down_bytes, each.up_bytes) for each in found.values()}) == 1
    # four layers, of which three are in slabs at the turn, and a root; 4 KiB each but for the root's 256 bytes
    assert found[1].down_bytes == (4 + 1) * 4 * KIB + 256
    assert found[1].up_bytes == 4 * 4 * KIB + 256


def test_updates_beside_do_not_stop_the_workers() -> None:
    facts = among(LAYERS, APART)
    shared = {"hosts": (0, 0, 1), "link": Link(bytes_per_s=float("inf"))}
    beside, before = (run(facts, several(APART, updates_beside=flag, **shared)) for flag in (True, False))
    assert beside.busy_s["optimizer"] == pytest.approx(5 / 4)
    assert beside.step_s < before.step_s


def test_a_memory_rank_does_not_run_ahead_of_its_slabs() -> None:
    """It computes nothing that would hold it up: a slab is read into once the block before it has left."""
    facts = among(replace(chain(6, micro_batches=2, ram_tier=False), deferred=False), APART)
    found = run(facts, several(APART, disk=Disk(read_bytes_per_s=1e6, write_bytes_per_s=1e6)), slabs=2)
    last = [s for s in found.spans if (s.step, s.rank, s.kind) == (3, 0, "fetch")]
    reads, ways = (
        sorted((s for s in last if s.resource == name), key=lambda s: s.begin_s) for name in ("read", "down")
    )
    occupied: dict[str, float] = {}
    for read, way in zip(reads, ways, strict=True):
        assert read.what == way.what
        slab = read.what.split("->")[1]
        assert read.begin_s >= occupied.get(slab, 0.0), read
        occupied[slab] = way.end_s
    assert len(reads) > 2 * len(occupied)


def test_192_workers_of_1000_blocks_take_seconds() -> None:
    cluster = Cluster(192, 1)
    facts = among(
        chain(
            1000, micro_batches=192, reduction_groups=192, deferred=False, ram_tier=False,
            device_memory=1 << 40, host_memory=1 << 40,
        ),
        cluster,
    )  # fmt: skip
    hardware = several(cluster, link=Link(bytes_per_s=1e9, fan_out=2))
    begin = time.process_time()
    found = simulate(facts, allot(facts), durations(facts), hardware, steps=2)
    assert time.process_time() - begin < 60
    assert found.busy_s["compute"] == pytest.approx(1000 * (1 + 1 + 2) - 1 + 0.5 + 1001 / 8)


@pytest.mark.parametrize(("workers", "memory"), [(12, 1), (12, 3), (5, "colocated")])
def test_one_worker_stands_for_all(workers: int, memory: int) -> None:
    cluster = Cluster(workers, memory)  # type: ignore[arg-type]
    facts = among(chain(6, micro_batches=13, reduction_groups=13, boundary_bytes=(4 * KIB,) * 6), cluster)
    allotment = replace(allot(facts), boundaries=("disk",) * 6, slabs=3)
    hardware = several(cluster, disk=SLOW_DISK)
    few = simulate(facts, allotment, durations(facts), hardware)
    every = simulate(facts, allotment, durations(facts), hardware, every_rank=True)
    assert few.step_s == pytest.approx(every.step_s, rel=1e-12)
    assert few.busy_s == pytest.approx(every.busy_s)


def test_what_it_may_not_import_is_the_same() -> None:
    assert several(TOGETHER).sums_travelling == SUMS_TRAVELLING
    store = StoreDisk()
    try:
        depth = store._readers._max_workers
    finally:
        store.close()
    assert SLOW_DISK.urgent_share == URGENT_DEPTH / (URGENT_DEPTH + depth)


def test_durations_of_another_model_are_refused() -> None:
    with pytest.raises(PlanError, match=r"durations\.forward has 5 entries, the model has 4 visits"):
        simulate(LAYERS, allot(LAYERS), durations(chain(5)), alone())
    with pytest.raises(PlanError, match="workers"):
        simulate(LAYERS, allot(LAYERS), durations(LAYERS), several(Cluster(3, 1)))
