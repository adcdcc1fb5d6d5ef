"""Which sparse parameters are multiplied by kernels, by their non-zeros, instead of being expanded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import nn

from weightstream.blocks import Block
from weightstream.errors import ConfigError
from weightstream.masking.masking import Masking
from weightstream.sparse.choosing import DENSE, Curve, Piece, choose
from weightstream.sparse.codec import decoding_steps
from weightstream.sparse.driving import drivable
from weightstream.sparse.kernels import KERNELS, Kernel, obstacle, prepared_bytes
from weightstream.sparse.native.products import as_elements, workspace_bytes
from weightstream.sparse.settings import SparsityGroup
from weightstream.worker.expanding import Driven

_ENTRY_BYTES = 64  # eight indices
_FINDING_BYTES = 24  # for each block that a mask says is there: its number, and what that is found by
_STEPS_PER_ENTRY = (
    4  # its row and column take 2.5 ns at a density of 0.1, a step through a mask 0.65 (benchmarks/LOG.md)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoKernels:
    """Of each sparse parameter: multiplied by the kernel that was measured to be fastest, or expanded where none was faster.

    `tokens` are those of a micro-batch. `curves` is asked when a store is made, never again: the store keeps the choice.
    `unlike` says of a parameter whether it only stands in for one whose non-zeros nobody knows before weights are read: that
    will be expanded.
    """

    tokens: int
    curves: Callable[[], Sequence[Curve]]
    unlike: Callable[[str], bool] = lambda name: False


def driven(
    model: nn.Module,
    blocks: Sequence[Block],
    masking: Masking | None,
    kernels: Mapping[str, Kernel],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Driven]:
    """By name the sparse parameters that one of the patterns takes, the first that matches.

    Raises:
        ConfigError: a pattern takes none, or one that cannot be multiplied so; with the reason.
    """
    if not kernels:
        return {}
    modules = _products(model, blocks)
    found: dict[str, Driven] = {}
    taken = set()
    for name, group in _groups(masking).items():
        pattern = next((pattern for pattern in kernels if fnmatchcase(name, pattern)), None)
        if pattern is None:
            continue
        taken.add(pattern)
        kernel = kernels[pattern]
        assert masking is not None
        nonzeros = masking.constant(name)
        if (reason := _unfit(kernel, modules.get(name), group, nonzeros)) is not None:
            raise ConfigError(
                f"kernels: parameter '{name}', kernel '{kernel}': {reason}; leave it out of kernels to have it expanded"
            )
        if (reason := obstacle(kernel, group.block, dtype, device)) is not None:
            raise ConfigError(
                f"kernels: parameter '{name}', kernel '{kernel}': expected a product with {group.block[0]}×{group.block[1]} "
                f"in {dtype} on this machine's {device.type}, found that {reason}; a store goes on with the kernels that it "
                "was made with, on machines that have them; leave the parameter out of those of a new store to have it "
                "expanded"
            )
        assert nonzeros is not None
        found[name] = Driven(modules[name], kernel, group.block, nonzeros)
    for pattern in kernels.keys() - taken:
        raise ConfigError(f"kernels: '{pattern}' matches no sparse parameter; correct it or remove it")
    return found


def chosen(
    model: nn.Module,
    blocks: Sequence[Block],
    masking: Masking | None,
    auto: AutoKernels,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
    warn: Callable[[str], None],
) -> dict[str, Kernel]:
    """By name the sparse parameters that a kernel multiplies faster than a dense product, by what was measured."""
    groups, modules = _groups(masking), _products(model, blocks)
    curves = auto.curves()
    name_of_dtype = str(dtype).removeprefix("torch.")
    if groups and not any((curve.dtype, curve.device) == (name_of_dtype, device.type) for curve in curves):
        warn(
            f"kernels: auto: products with non-zeros were not measured in {name_of_dtype} on {device.type}: all sparse "
            "weights are expanded and multiplied densely; run `weightstream calibrate` before a store is made"
        )
    found: dict[str, Kernel] = {}
    for name, group in groups.items():
        assert masking is not None
        nonzeros = masking.constant(name)
        possible = [
            one
            for one in curves
            if _unfit(one.kernel, modules.get(name), group, nonzeros) is None
            and obstacle(one.kernel, group.block, dtype, device) is None
        ]
        if nonzeros is None or not possible or auto.unlike(name):
            continue
        piece = Piece(
            block=group.block, density=nonzeros / modules[name].weight.numel(), dtype=name_of_dtype, tokens=auto.tokens,
            threads=threads, device=device.type,
        )  # fmt: skip
        kernel = choose(possible, piece)
        if kernel != DENSE:
            found[name] = kernel
    return found


def _groups(masking: Masking | None) -> dict[str, SparsityGroup]:
    """The group of each sparse parameter."""
    return {name: piece.group for (name, _), piece in masking.pieces.items()} if masking else {}


def _products(model: nn.Module, blocks: Sequence[Block]) -> dict[str, nn.Linear]:
    """The linear layers within blocks, by the names of their weights."""
    called = {name for block in blocks for name in block.modules}
    return {name: module for name, module in drivable(model).items() if name.rpartition(".")[0] not in called}


def _unfit(kernel: str, module: nn.Linear | None, group: SparsityGroup, nonzeros: int | None) -> str | None:
    """Why no machine's kernel can multiply by a parameter; None if one could."""
    if kernel not in KERNELS:
        return f"expected one of {', '.join(KERNELS)}, found {kernel!r}"
    if module is None:
        return "expected the weight of an nn.Linear within a block, used there alone, found that it is none"
    if nonzeros is None:
        return (
            "expected as many non-zeros in every version, found that the number of its non-zeros changes, or all of a panel "
            "of it exists"
        )
    if group.algorithm == "rigl":
        return "expected gradients at non-zeros only, found that rigl needs its dense gradient"
    return None


@dataclass(frozen=True, slots=True)
class Structures:
    """What kernels need to know of the weights of a block that they multiply by.

    `nbytes` are needed while it is in a slab, with what one product at a time packs. `kept_bytes` may be kept from one fetch
    to the next, of kernels for which it is known beforehand what that takes; `steps` is how long it takes to find those anew,
    in steps through the bits or gaps of masks.
    """

    nbytes: int = 0
    kept_bytes: int = 0
    steps: int = 0


def structures(blocks: Sequence[Block], driven: Mapping[str, Driven], threads: int) -> dict[int, Structures]:
    """By block, what kernels need beside its weights: of each weight which blocks there are, and the orders in which products
    go through what they multiply by, be it these blocks or single elements."""
    found: dict[int, Structures] = {}
    for block in blocks:
        own = [driven[parameter.name] for parameter in block.parameters if parameter.name in driven]
        packed = [
            workspace_bytes(_shape(each), each.block, each.nonzeros, threads) for each in own if each.kernel == "native"
        ]
        kept = [(each, nbytes) for each in own if (nbytes := kept_structure_bytes(each)) is not None]
        found[block.index] = Structures(
            sum(_structure_bytes(each) for each in own) + max(packed, default=0),
            sum(nbytes for _, nbytes in kept), sum(_finding_steps(each) for each, _ in kept),
        )  # fmt: skip
    return found


def kept_structure_bytes(each: Driven) -> int | None:
    """What is kept from one fetch to the next of a parameter that a kernel multiplies by; None if nothing is."""
    return prepared_bytes(_shape(each), each.block, each.nonzeros, each.kernel)


def _structure_bytes(each: Driven) -> int:
    elements, cell = prod(_shape(each)), prod(each.block)
    blocks = each.nonzeros // cell
    kept = kept_structure_bytes(each)
    if kept is not None:
        return kept + _FINDING_BYTES * blocks
    if each.kernel == "csr":
        return elements // cell + elements + _ENTRY_BYTES * each.nonzeros
    return elements // cell + _ENTRY_BYTES * blocks


def _finding_steps(each: Driven) -> int:
    cell = prod(each.block)
    decoding = decoding_steps(prod(_shape(each)) // cell, each.nonzeros // cell)
    return decoding + _STEPS_PER_ENTRY * (each.nonzeros if as_elements(each.block) else each.nonzeros // cell)


def _shape(each: Driven) -> tuple[int, int]:
    return each.module.out_features, each.module.in_features
