"""How many bytes a block takes: in a slab, in records, as gradients; with room for every version that it may have."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass

from weightstream.blocks import Block, Unit, cut
from weightstream.sparse.codec import Places, decoding_steps
from weightstream.sparse.grid import Grid
from weightstream.store.images import owned_gradients, slab_image
from weightstream.store.layout import MASK, Precision, RecordLayout, record_layout
from weightstream.store.masks import grid_of
from weightstream.store.optimizers import Optimizer
from weightstream.store.sparsity import DENSE, Sparsity


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """Bytes of a block. `streamed` is all of it, as it lies in a slab; the others are of the units that are owned.

    `loaded` and `written` are what an update reads and writes, `gradients` what it is given: only units with trained
    parameters have updates. `stored` are the images of all, `fetched` what is moved of the whole block for a slab: less
    than it where it is sparse. `places` is what the numbers of the non-zeros of its sparse tensors take, `decoding` how many
    steps it takes to find them from their masks, and `sparse` says whether it has any.
    """

    streamed: int
    loaded: int
    written: int
    gradients: int
    stored: int
    fetched: int
    places: int = 0
    decoding: int = 0
    sparse: bool = False


@dataclass(frozen=True, slots=True)
class Largest:
    """How sparse the versions of units may be, for room that is enough for each of them.

    `records` has for each unit that may be sparse some that need most room, of one kind or another; `gradients` how sparse
    its gradients always are. In units of `mixed` any piece may be whole while others are not: beside the values of the
    largest there is room for all masks.
    """

    records: Mapping[int, Sequence[Sparsity]]
    gradients: Mapping[int, Sparsity]
    mixed: frozenset[int] = frozenset()


NEVER_SPARSE = Largest({}, {})


def largest(parts: Sequence[BlockBytes]) -> BlockBytes:
    """The most that any of these is, kind by kind: of one block, of what several ranks own of it."""
    return BlockBytes(*(max(values) for values in zip(*map(astuple, parts), strict=True)))


def block_bytes(
    units: Sequence[Unit],
    layout_of: Callable[[Unit, Sparsity], RecordLayout],
    owned: Collection[int] | None = None,
    largest: Largest = NEVER_SPARSE,
    driven: Collection[str] = (),
) -> BlockBytes:
    """Of a block that has these units; of a frozen one, as if it were updated as a whole.

    Args:
        owned: indices of units; all by default.
        largest: how sparse they may be; there is room for each version.
        driven: parameters that are not expanded: a slab has their non-zeros, and nobody asks for the places of these.
    """
    trainable = any(unit.trainable for unit in units)
    choices = [[layout_of(unit, sparsity) for sparsity in largest.records.get(unit.index, (DENSE,))] for unit in units]
    slab = [layout_of(unit, only(found[0].sparsity, driven)) for unit, found in zip(units, choices, strict=True)]
    beside = [
        _masks_beside(each) if unit.index in largest.mixed else 0 for unit, each in zip(units, choices, strict=True)
    ]
    every = list(zip(units, choices, beside, strict=True))
    held = [each for each in every if owned is None or each[0].index in owned]
    updated = [each for each in held if each[0].trainable or not trainable]
    masks = [[_masks(layout, driven) for layout in found] for found in choices]
    return BlockBytes(
        streamed=slab_image(slab).nbytes,
        loaded=sum(
            max(sum(part.nbytes for part in layout.states) for layout in found) + more for _, found, more in updated
        ),
        written=sum(max(layout.image_nbytes for layout in found) + more for _, found, more in updated),
        gradients=owned_gradients([unit for unit, *_ in held], largest.gradients).nbytes,
        stored=sum(max(layout.image_nbytes for layout in found) + more for _, found, more in held),
        fetched=sum(max(layout.fetched_nbytes for layout in found) + more for _, found, more in every),
        places=sum(max(sum(Places.nbytes_of(*mask) for mask in each) for each in found) for found in masks),
        decoding=sum(
            max(sum(decoding_steps(g.cells, count) for g, count in each) for each in found) for found in masks
        ),
        sparse=any(layout.sparsity for found in choices for layout in found),
    )


def only(sparsity: Sparsity, driven: Collection[str]) -> Sparsity:
    """How sparse a slab is: only what is not expanded, of which all versions have equally many non-zeros."""
    return tuple(piece for piece in sparsity if piece.name in driven)


def _masks_beside(choices: Sequence[RecordLayout]) -> int:
    """What masks take in a record, in its parts and its header."""
    masks = max((layout.part(MASK).nbytes for layout in choices if layout.has(MASK)), default=0)
    headers = [layout.header_nbytes for layout in choices]
    return masks + max(headers) - min(headers)


def _masks(layout: RecordLayout, driven: Collection[str]) -> list[tuple[Grid, int]]:
    """The masks of a record that are expanded: their cells, and how many exist."""
    tensors = layout.part(MASK).tensors if layout.has(MASK) else ()
    return [(grid_of(spec), spec.sparse[0].ones) for spec in tensors if spec.name not in driven]


def bytes_of_blocks(
    blocks: Sequence[Block],
    *,
    precision: Precision,
    optimizer: Optimizer,
    panel_elements: int,
    largest_of: Callable[[Sequence[Unit]], Largest] = lambda units: NEVER_SPARSE,
    driven: Collection[str] = (),
) -> list[BlockBytes]:
    """Bytes of each block in a store that is not there yet."""
    units: list[list[Unit]] = [[] for _ in blocks]
    every = cut(blocks, panel_elements=panel_elements, panels=optimizer.elementwise)
    for unit in every:
        units[unit.block].append(unit)
    largest = largest_of(every)

    def layout_of(unit: Unit, sparsity: Sparsity) -> RecordLayout:
        return record_layout(unit, precision, optimizer, sparsity)

    return [block_bytes(own, layout_of, largest=largest, driven=driven) for own in units]
