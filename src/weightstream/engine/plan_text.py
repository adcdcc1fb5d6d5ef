"""A plan as a person reads it: blocks, who has which memory, bytes per step against their bound, how much larger a model
there is room for."""

import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from weightstream.cluster import Cluster
from weightstream.engine.planning import Reach, disk_bytes, reach
from weightstream.experts.reaching import ExpertBytes
from weightstream.schedule.allotment import buffers_text
from weightstream.schedule.flows import Flow, Flows, flows_of
from weightstream.store.block_bytes import bytes_of_blocks
from weightstream.store.shared import FILE_BYTES
from weightstream.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from weightstream.engine.engine import Engine


def plan_text(
    engine: "Engine", *, cluster: Cluster | None = None, micro_batches: int | None = None, step: int | None = None
) -> str:
    """The blocks of an engine's model and who has which memory, as a table of plain lines.

    Args:
        cluster, micro_batches: whose plan is asked for; by default the engine's own.
        step: of training, whose bytes are counted; by default with what is sparse as it is now.
    """
    if cluster is None or micro_batches is None:
        facts, allotment = engine.runtime.facts, engine.allotment
    else:
        facts, allotment = engine.outlook.planned_for(cluster, micro_batches)
    several = cluster is not None and cluster.size > 1
    sparse = engine.masking is not None
    compressed = f"  {'compressed':>10}" if sparse else ""
    lines = [f"{'block':>5}  {'parameters':>10}  {'streamed':>10}{compressed}  {'record':>10}  name"]
    for block, spec in zip(facts.blocks, engine.store.blocks, strict=True):
        marks = [mark for mark, holds in (("resident", block.resident), ("frozen", not block.trainable)) if holds]
        if len(spec.modules) > 1:
            marks.append("modules " + ", ".join(spec.modules))
        note = f"  [{'; '.join(marks)}]" if marks else ""
        moved = f"  {format_bytes(block.compressed_bytes) if block.compressed_bytes else 'dense':>10}" if sparse else ""
        lines.append(
            f"{block.index:>5}  {format_count(spec.numel):>10}  {format_bytes(block.streamed_bytes):>10}{moved}  "
            f"{format_bytes(block.record_bytes):>10}  {spec.name}{note}"
        )
    state = sum(block.load_bytes for block in facts.blocks)
    images, most = disk_bytes(engine.holding.bytes, deferred=facts.deferred)
    staged = f"{len(allotment.staged_in_ram)} of {sum(b.trainable for b in facts.blocks)} blocks in RAM"
    kept = "not measured yet" if facts.kept_bytes is None else f"{len(allotment.keep)} of {len(facts.visits)} visits"
    waiting = ", ".join(
        f"{allotment.boundaries.count(tier)} {where}"
        for tier, where in (("device", "on the device"), ("host", "in host memory"), ("disk", "on disk"))
        if tier in allotment.boundaries
    )
    lines += [
        "",
        f"parameters        {format_count(sum(block.numel for block in engine.store.blocks))}, "
        f"masters and moments {format_bytes(state)}{' of one rank' if several else ''}",
        f"micro-batches     {facts.micro_batches} a step"
        + (f", {facts.present} of one rank at most" if several else "")
        + f"; blocks are fetched {facts.prefetch} ahead",
        f"device memory     {format_bytes(allotment.device_bytes)} of {format_bytes(facts.device_memory)}"
        f"{', on each rank' if several else ''}: "
        f"{allotment.slabs} slabs of {format_bytes(allotment.slab_bytes)}{_beside(allotment.beside_bytes)}, resident "
        f"{format_bytes(allotment.resident_bytes)}, {allotment.partial_sums} partial gradient sums of "
        f"{format_bytes(allotment.partial_bytes)}, {allotment.held_gradients} gradients of a block held at once",
        f"host memory       {format_bytes(allotment.host_bytes)} of {format_bytes(facts.host_memory)}: "
        f"{buffers_text(facts.blocks, allotment.record_buffers)}, staged gradients of "
        f"{staged}",
        f"RAM tier          copies of {len(allotment.pinned_copies)} blocks, states of {len(allotment.pinned_states)}",
        f"activations kept  {kept}" + ("" if facts.kept_bytes is None else f"; inputs of visits wait {waiting}"),
        *_moved(flows_now(engine, cluster, micro_batches, step), several),
        f"disk              {format_bytes(images)} once all is written, up to {format_bytes(most)} (three versions, and "
        f"{format_bytes(most - 3 * images)} of staged gradients); each snapshot up to {format_bytes(images)} more",
    ]
    if engine.masking is not None:
        nonzeros, elements = engine.nonzeros()
        lines.append(
            f"sparse            {format_count(nonzeros)} of {format_count(elements)} in "
            f"{len(engine.densities())} parameters; figures above are of their largest versions, "
            f"bytes per step {'of the present ones' if step is None else f'of those of step {step}'}"
        )
        places = [facts.blocks[index].kept_places_bytes for index in allotment.kept_places]
        by_kernel = Counter(engine.kernels.values())
        expanded = len(engine.densities()) - by_kernel.total()
        products = [f"{count} parameters by {kernel}" for kernel, count in sorted(by_kernel.items())]
        lines += [
            f"places kept       where the non-zeros of {len(places)} of {sum(b.kept_places_bytes > 0 for b in facts.blocks)} "
            f"sparse blocks are, {format_bytes(sum(places))} of host memory; of others it is found at each fetch",
            "products          " + ", ".join([*products, f"{expanded} expanded"]),
        ]
    lines += _experts(engine, cluster or engine.cluster, micro_batches or facts.micro_batches)
    lines.append(_room(*reach_of(engine)))
    return "\n".join(lines)


def _experts(engine: "Engine", cluster: Cluster, micro_batches: int) -> list[str]:
    """What layers of experts move, hold and grow by: by arithmetic before a run, and at the rate that was seen in it."""
    layers = engine.growing.layers
    if not layers or not engine.ranks.owns:
        return []
    live = sum(layer.written * layer.record_bytes for layer in layers.values())
    times = 1 + 1 / engine.store.compaction_share
    lines = [
        f"experts           {sum(layer.written for layer in layers.values()):,} of "
        f"{format_count(sum(layer.experts for layer in layers.values()))} in {len(layers)} layers exist, "
        f"{format_bytes(live)}; their files take at most {times:g} times that, {format_bytes(FILE_BYTES)} and a commit"
    ]
    reached = [(layer.most_per_step, layer) for layer in layers.values() if layer.most_per_step is not None]
    if reached:
        held = " and ".join(sorted({f"{layer.held:,}" for layer in layers.values()}))
        memory = len(layers) * max(most * layer.slot_bytes for most, layer in reached)  # it is divided alike
        read = sum(most * layer.loaded_bytes for most, layer in reached)
        written = sum(most * layer.record_bytes for most, layer in reached)
        sums = engine.runtime.facts.sums_at_once
        gradients = sum(layer.gradients_at_most(sums) or 0 for _, layer in reached)
        lines.append(
            f"experts per step  at most {sum(most for most, _ in reached):,}, which take {format_bytes(memory)} of "
            f"experts_memory; {format_bytes(engine.experts.memory_bytes)} are given, for {held} of each layer; read up to "
            f"{format_bytes(read)}, written and grown by up to {format_bytes(written)}; gradients take up to "
            f"{format_bytes(gradients)} besides"
        )
        lines += _experts_moved(experts_moved(engine, cluster, micro_batches), several=cluster.size > 1)
    else:
        lines.append("experts per step  not known yet: rehearse a step, or take one")
    return [*lines, *_growth(engine, times)]


@dataclass(frozen=True, slots=True)
class ExpertsMoved:
    """What steps are expected to reach of all layers of experts, and to move; `seen`: as the last steps have shown it."""

    touched: float
    new: float
    seen: bool
    bytes: ExpertBytes

    def to_json(self) -> dict[str, Any]:
        return {"touched": self.touched, "new": self.new, "seen": self.seen} | {
            f"{name}_bytes": value for name, value in asdict(self.bytes).items()
        }


def experts_moved(engine: "Engine", cluster: Cluster, micro_batches: int) -> ExpertsMoved | None:
    """That, of steps of so many micro-batches on a cluster; None without such layers, and before a rehearsal or step."""
    reached = engine.experts.expected(micro_batches, cluster)
    if not reached:
        return None
    seen = all(layer.reached_per_step is not None for layer in engine.growing.layers.values())
    return ExpertsMoved(
        sum(found.touched for found in reached.values()), sum(found.new for found in reached.values()), seen,
        engine.experts.bytes_of(reached),
    )  # fmt: skip


def _experts_moved(found: ExpertsMoved | None, *, several: bool) -> list[str]:
    if found is None:
        return []
    moved, about = found.bytes, f"about {found.touched:,.0f} reached"
    said = f"lately {about}, {found.new:,.1f} of them new" if found.seen else f"by even chance {about}, by text fewer"
    upto = "" if found.seen else "up to "
    links = f"; links: down {format_bytes(moved.down)}, up {format_bytes(moved.up)}" if several else ""
    return [
        f"experts move      {said}: disk: read {upto}{format_bytes(moved.read)}, written {upto}{format_bytes(moved.written)}, "
        f"by compaction up to {format_bytes(moved.compacted)} each way{links}"
        + (", of all ranks together" if several else "")
    ]


def _growth(engine: "Engine", times: float) -> list[str]:
    """At the rate of the last steps, how soon the disk and pools are full; `times` is how much larger files are at most."""
    layers, step_s = engine.growing.layers.values(), engine.store.versions.session.step_s(engine.store.step)

    def after(steps: float) -> str:
        if step_s is None:
            return f"{int(steps):,} steps"
        days = steps * step_s / 86_400
        return f"{int(steps):,} steps, " + (f"{days:,.1f} days" if days > 2 else format_seconds(steps * step_s))

    lines = []
    if any(layer.new_per_step is not None for layer in layers):
        new = sum(layer.new_per_step or 0.0 for layer in layers)
        grown = sum((layer.new_per_step or 0.0) * layer.record_bytes for layer in layers)
        full = ""
        if grown:
            free = shutil.disk_usage(engine.store.path).free
            full = (
                f"; the disk is full after {after(free / grown)}, or {after(free / grown / times)} with all dead bytes"
            )
        lines.append(f"experts grow by   {new:,.1f} a step lately, {format_bytes(grown)}{full}")
    for found in engine.growing.pools:
        limit = f"{found.pool.limit:,} experts" if isinstance(found.pool.limit, int) else format_bytes(found.pool.most)
        used = f"{found.used:,}" if found.pool.counts else format_bytes(found.used)
        state = "; at this rate it is never full"
        if found.closed:
            state = "; it is full: tokens go to experts that exist"
        elif found.steps_left is not None:
            state = f"; full after {after(found.steps_left)} at this rate"
        elif found.unseen:
            state = ""
        lines.append(f"experts pool      {used} of {limit} of {', '.join(found.layers)}{state}")
    return lines


def flows_now(
    engine: "Engine", cluster: Cluster | None = None, micro_batches: int | None = None, step: int | None = None
) -> Flows:
    """What a steady step moves, with what is sparse as it is then; of the engine's own plan by default."""
    if cluster is None or micro_batches is None:
        facts, allotment = engine.runtime.facts, engine.allotment
        return flows_of(
            engine.outlook.facts_at(engine.cluster, facts.micro_batches, step), allotment, ranks=engine.cluster.size
        )
    _, allotment = engine.outlook.planned_for(cluster, micro_batches)
    return flows_of(engine.outlook.facts_at(cluster, micro_batches, step), allotment, ranks=cluster.size)


def reach_of(engine: "Engine") -> tuple[Reach, Reach | None]:
    """How large a model like this one the disk and `host_memory` hold; and, if this one is sparse, how large a dense one."""
    facts, store = engine.runtime.facts, engine.store
    parameters = sum(block.numel for block in store.blocks)
    free_bytes = shutil.disk_usage(store.path).free
    own = reach(
        engine.holding.bytes, parameters, free_bytes=free_bytes, host_memory=facts.host_memory, deferred=facts.deferred
    )
    if engine.masking is None:
        return own, None
    dense = bytes_of_blocks(
        store.blocks, precision=engine.precision, optimizer=engine.optimizer, panel_elements=store.panel_elements
    )
    return own, reach(dense, parameters, free_bytes=free_bytes, host_memory=facts.host_memory, deferred=facts.deferred)


def _room(own: Reach, dense: Reach | None) -> str:
    def against(count: int) -> str:
        return "" if dense is None else f" ({format_count(count)} were it dense)"

    return (
        f"room              the disk holds a model like this of {format_count(own.disk)} parameters"
        f"{against(0 if dense is None else dense.disk)}, host memory all records of one of {format_count(own.ram)}"
        f"{against(0 if dense is None else dense.ram)}"
    )


def _moved(flows: Flows, several: bool) -> list[str]:
    def text(flow: Flow) -> str:
        return f"{format_bytes(flow.planned)} (at least {format_bytes(flow.least)})"

    lines = [
        f"bytes per step    disk: read {text(flows.disk_read)}, written {text(flows.disk_written)}; RAM: read "
        f"{format_bytes(flows.ram_read.planned)}, written {format_bytes(flows.ram_written.planned)}"
        + (" of the rank that moves most" if several else "")
    ]
    if several:
        lines.append(f"links per step    down {text(flows.down)}, up {text(flows.up)}, of all ranks together")
    return lines


def _beside(nbytes: int) -> str:
    return f" and {format_bytes(nbytes)} for what is compressed" if nbytes else ""
