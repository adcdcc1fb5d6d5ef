"""Which sparse parameters are multiplied by kernels, by their non-zeros, instead of being expanded."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import nn

from weightstream.blocks import Block
from weightstream.errors import ConfigError
from weightstream.masking import Masking
from weightstream.sparse.driving import drivable
from weightstream.sparse.kernels import KERNELS, Kernel, supports
from weightstream.worker.expanding import Driven

_ENTRY_BYTES = 64  # eight indices


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
    groups = {name: piece.group for (name, _), piece in masking.pieces.items()} if masking else {}
    called = {name for block in blocks for name in block.modules}
    modules = {name: module for name, module in drivable(model).items() if name.rpartition(".")[0] not in called}
    found: dict[str, Driven] = {}
    taken = set()
    for name, group in groups.items():
        pattern = next((pattern for pattern in kernels if fnmatchcase(name, pattern)), None)
        if pattern is None:
            continue
        taken.add(pattern)
        kernel = kernels[pattern]
        assert masking is not None
        nonzeros = masking.constant(name)
        reason = None
        if kernel not in KERNELS:
            reason = f"expected one of {', '.join(KERNELS)}, found {kernel!r}"
        elif name not in modules:
            reason = "it is no weight of an nn.Linear within a block, used there alone"
        elif nonzeros is None:
            reason = "the number of its non-zeros changes"
        elif group.algorithm == "rigl":
            reason = "rigl needs its dense gradient"
        elif not supports(kernel, group.block, dtype, device):
            rows, columns = group.block
            reason = f"'{kernel}' has no product of {dtype} with blocks of {rows}×{columns} on {device.type}"
        if reason is not None:
            raise ConfigError(f"kernels: parameter '{name}': {reason}; leave it out of kernels to have it expanded")
        assert nonzeros is not None
        found[name] = Driven(modules[name], kernel, group.block, nonzeros)
    for pattern in kernels.keys() - taken:
        raise ConfigError(f"kernels: '{pattern}' matches no sparse parameter; correct it or remove it")
    return found


def structure_bytes(blocks: Sequence[Block], driven: Mapping[str, Driven]) -> dict[int, int]:
    """By block, what the structures of its weights take while it is in a slab: row, column, and the orders in which products
    go through the weights' own blocks."""
    found: dict[int, int] = {}
    for block in blocks:
        own = [driven[parameter.name] for parameter in block.parameters if parameter.name in driven]
        found[block.index] = sum(_ENTRY_BYTES * each.nonzeros // prod(each.block) for each in own)
    return found
