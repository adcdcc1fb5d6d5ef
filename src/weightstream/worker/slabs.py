"""Slabs: the fixed buffers of weight memory, and the parameters that are views of them while a block is present.

On the CPU a slab is the memory that the store reads into. On an accelerator the store reads into pinned host memory and a
copy stream takes it to the device; compute waits for that copy by an event, and the next copy into the slab waits for
the compute that used it before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from weightstream.blocks import Block
from weightstream.store.images import Image
from weightstream.store.segments import AlignedBuffer, bytes_of


class Slab:
    """One buffer of weight memory. `landing` is where the store's bytes arrive; `base` the same bytes on the device.

    What is sparse arrives in `compressed`, and is expanded to `landing`; there is such memory only where a sparse block
    passes through.
    """

    def __init__(self, nbytes: int, device: torch.device, compressed_nbytes: int = 0) -> None:
        self.device = device
        self._compressed = AlignedBuffer(compressed_nbytes) if compressed_nbytes else None
        self.compressed = self._compressed.view if self._compressed else memoryview(b"")
        if device.type == "cpu":
            self._buffer = AlignedBuffer(nbytes)
            self.landing = self._buffer.view
            self.base = self._buffer.tensor(torch.uint8, 0, (nbytes,))
            return
        self._pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self.landing = bytes_of(self._pinned)
        self.base = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._module: Any = torch.get_device_module(device)
        self._copies = self._module.Stream(device)
        self._arrived = self._module.Event()
        self._used = self._module.Event()

    def upload(self) -> None:
        """Starts the copy of `landing` to the device; does nothing where they are the same memory."""
        if self.device.type != "cpu":
            self._copies.wait_event(self._used)
            with self._module.stream(self._copies):
                self.base.copy_(self._pinned, non_blocking=True)
                self._arrived.record(self._copies)

    def ready(self) -> None:
        """Makes the device's compute wait until the copy has arrived."""
        if self.device.type != "cpu":
            self._module.current_stream(self.device).wait_event(self._arrived)

    def released(self) -> None:
        """Marks the end of what compute does with this slab; later copies into it wait for that."""
        if self.device.type != "cpu":
            self._used.record(self._module.current_stream(self.device))
            self._arrived.synchronize()  # the pinned bytes may be overwritten as soon as they have left

    def view(self, offset: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
        """A tensor on this slab's bytes; `offset` in bytes, `stride` in elements."""
        return self.base.view(dtype).as_strided(tuple(shape), tuple(stride), offset // dtype.itemsize)

    def close(self) -> None:
        if self._compressed is not None:
            self.compressed = memoryview(b"")
            self._compressed.close()
        if self.device.type == "cpu":
            del self.base
            self._buffer.close()


@dataclass(slots=True)
class SlabView:
    """A saved tensor that lies in a slab: not the bytes, only where they are in their block."""

    block: int
    offset: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@dataclass(slots=True)
class _Bound:
    parameter: nn.Parameter
    placeholder: Tensor
    name: str


class Slabs:
    """All slabs of a worker, and which block is in which.

    Args:
        streaming: number and bytes of the slabs that blocks pass through.
        residents: bytes of each slab that a resident block keeps.
        compressed: bytes beside each slab in which sparse blocks land: of those that blocks pass through, and of those
            of resident blocks.
    """

    def __init__(
        self,
        device: torch.device,
        streaming: tuple[int, int],
        residents: Sequence[int],
        compressed: tuple[int, Sequence[int]] = (0, ()),
    ) -> None:
        (count, nbytes), (beside, beside_residents) = streaming, compressed
        self._slabs = [Slab(nbytes, device, beside) for _ in range(count)]
        for size, own in zip_longest(residents, beside_residents, fillvalue=0):
            self._slabs.append(Slab(size, device, own))
        self._holds: dict[int, int] = {}
        self._ranges = [(slab.base.data_ptr(), slab.base.data_ptr() + slab.base.numel()) for slab in self._slabs]

    def __getitem__(self, slab: int) -> Slab:
        return self._slabs[slab]

    def slab_of(self, block: int) -> int | None:
        return self._holds.get(block)

    def hold(self, block: int, slab: int) -> None:
        self._holds[block] = slab

    def release(self, block: int) -> None:
        self._slabs[self._holds.pop(block)].released()

    def within(self, tensor: Tensor) -> bool:
        """Whether a tensor's bytes lie in a slab."""
        pointer = tensor.data_ptr() if tensor.numel() else 0
        return any(low <= pointer < high for low, high in self._ranges)

    def pack(self, tensor: Tensor) -> Tensor | SlabView:
        """What autograd keeps of a saved tensor: a reference to the block if it lies in a slab, else the tensor."""
        pointer = tensor.data_ptr() if tensor.numel() else 0
        for block, slab in self._holds.items():
            low, high = self._ranges[slab]
            if low <= pointer < high:
                return SlabView(block, pointer - low, tensor.dtype, tensor.shape, tensor.stride())
        return tensor

    def unpack(self, saved: Tensor | SlabView) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        slab = self._holds[saved.block]
        return self._slabs[slab].view(saved.offset, saved.dtype, saved.shape, saved.stride)

    def close(self) -> None:
        for slab in self._slabs:
            slab.close()


class Parameters:
    """The model's parameters: views of a slab while their block is present, NaN otherwise.

    A placeholder is one NaN expanded to the parameter's shape, so that a use outside the block cannot pass unseen.

    Args:
        nonzeros: of the parameters that are multiplied by kernels: they are (non-zeros, 1) instead of dense.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        device: torch.device,
        dtype: torch.dtype,
        nonzeros: Mapping[str, int] | None = None,
    ) -> None:
        self.blocks = blocks
        self._bound: dict[int, list[_Bound]] = {}
        self.block_of: dict[int, int] = {}
        self._present: set[int] = set()
        nan = torch.full((1,), float("nan"), dtype=dtype, device=device)
        replaced: dict[int, nn.Parameter] = {}
        originals = dict(model.named_parameters())
        for block in blocks:
            bound = []
            for spec in block.parameters:
                count = (nonzeros or {}).get(spec.name)
                shape = spec.shape if count is None else (count, 1)
                placeholder = nan.expand(shape) if shape else nan[0]
                parameter = nn.Parameter(placeholder, requires_grad=spec.trainable)
                replaced[id(originals[spec.name])] = parameter
                self.block_of[id(parameter)] = block.index
                bound.append(_Bound(parameter, placeholder, spec.name))
            self._bound[block.index] = bound
        for module in model.modules():
            for key, original in module._parameters.items():
                if original is not None:
                    module._parameters[key] = replaced[id(original)]

    def of(self, block: int) -> list[tuple[str, nn.Parameter]]:
        return [(bound.name, bound.parameter) for bound in self._bound[block]]

    def name(self, parameter: nn.Parameter) -> str:
        bound = self._bound[self.block_of[id(parameter)]]
        return next(b.name for b in bound if b.parameter is parameter)

    def present(self, block: int) -> bool:
        return block in self._present

    def bind(self, block: int, slab: Slab, image: Image) -> None:
        """Makes a block's parameters views of a slab that holds what is streamed of it."""
        slab.ready()
        places = {spec.name: spec for spec in image.tensors}
        for bound in self._bound[block]:
            spec = places[bound.name]
            shape = bound.placeholder.shape
            bound.parameter.data = slab.view(spec.offset, spec.dtype, shape, _contiguous(shape))
        self._present.add(block)

    def unbind(self, block: int) -> None:
        for bound in self._bound[block]:
            bound.parameter.data = bound.placeholder
        self._present.discard(block)
