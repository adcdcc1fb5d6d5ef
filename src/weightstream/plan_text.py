"""A plan as a person reads it: blocks, who has which memory, bytes per step against their bound."""

from typing import TYPE_CHECKING

from weightstream.planning import disk_bytes
from weightstream.units import format_bytes, format_count

if TYPE_CHECKING:
    from weightstream.engine import Engine


def plan_text(engine: "Engine") -> str:
    """The blocks of an engine's model and its present allotment, as a table of plain lines."""
    facts, allotment = engine.runtime.facts, engine.allotment
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
    bound = engine.bytes_bound()
    images, most = disk_bytes(engine.holding.bytes, deferred=facts.deferred)
    staged = f"{len(allotment.staged_in_ram)} of {sum(b.trainable for b in facts.blocks)} blocks in RAM"
    kept = "not measured yet" if facts.kept_bytes is None else f"{len(allotment.keep)} of {len(facts.visits)} visits"
    lines += [
        "",
        f"parameters        {format_count(sum(block.numel for block in engine.store.blocks))}, "
        f"masters and moments {format_bytes(state)}",
        f"device memory     {format_bytes(allotment.device_bytes)} of {format_bytes(facts.device_memory)}: "
        f"{allotment.slabs} slabs of {format_bytes(allotment.slab_bytes)}{_beside(allotment.beside_bytes)}, resident "
        f"{format_bytes(allotment.resident_bytes)}, {allotment.partial_sums} partial gradient sums of "
        f"{format_bytes(allotment.partial_bytes)}, {allotment.held_gradients} gradients of a block held at once",
        f"host memory       {format_bytes(allotment.host_bytes)} of {format_bytes(facts.host_memory)}: "
        f"{allotment.record_buffers} record buffers of {format_bytes(allotment.record_bytes)}, staged gradients of "
        f"{staged}",
        f"RAM tier          copies of {len(allotment.pinned_copies)} blocks, states of {len(allotment.pinned_states)}",
        f"activations kept  {kept}",
        f"bytes per step    read {format_bytes(bound.read)}, written {format_bytes(bound.written)} (lower bound)",
        f"disk              {format_bytes(images)} once all is written, up to {format_bytes(most)} (three versions, and "
        f"{format_bytes(most - 3 * images)} of staged gradients); each snapshot up to {format_bytes(images)} more",
    ]
    if engine.masking is not None:
        nonzeros, elements = engine.nonzeros()
        lines.append(
            f"sparse            {format_count(nonzeros)} of {format_count(elements)} in "
            f"{len(engine.densities())} parameters; figures above are of their largest versions, "
            "bytes per step of the present ones"
        )
        places = [facts.blocks[index].kept_places_bytes for index in allotment.kept_places]
        lines.append(
            f"places kept       where the non-zeros of {len(places)} of {sum(b.kept_places_bytes > 0 for b in facts.blocks)} "
            f"sparse blocks are, {format_bytes(sum(places))} of host memory; of others it is found at each fetch"
        )
    return "\n".join(lines)


def _beside(nbytes: int) -> str:
    return f" and {format_bytes(nbytes)} for what is compressed" if nbytes else ""
