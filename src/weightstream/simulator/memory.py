"""What one rank holds in memory while it works, counted as the plan counts it."""

from weightstream.schedule.allotment import Allotment, Facts, buffers_bytes


class Memory:
    """Bytes in use, and the most at any time.

    Buffers are there from the beginning, whether they are full or not. Activations come and go: a micro-batch has either
    the way forward or its gradient's way back (`travelling`), and the inputs that its way back will need again.
    """

    def __init__(self, facts: Facts, allotment: Allotment, present: int) -> None:
        self._facts, self._allotment = facts, allotment
        self._boundary = facts.boundary_bytes or (0,) * len(facts.visits)
        self._kept = facts.kept_bytes or (0,) * len(facts.visits)
        self._device = (
            allotment.slabs * (allotment.slab_bytes + allotment.beside_bytes) + allotment.resident_bytes
            + allotment.partial_sums * allotment.partial_bytes + allotment.tied_bytes + allotment.held_bytes
            + facts.workspace_bytes + present * facts.lasting_bytes
        )  # fmt: skip
        self._host = buffers_bytes(facts, allotment)
        self._travelling: dict[int, int] = {}
        self._in_slabs: set[int] = set()
        self.peak_device_bytes, self.peak_host_bytes = self._device, self._host

    def _change(self, device: int = 0, host: int = 0) -> None:
        self._device += device
        self._host += host
        self.peak_device_bytes = max(self.peak_device_bytes, self._device)
        self.peak_host_bytes = max(self.peak_host_bytes, self._host)

    def _travel(self, micro_batch: int, nbytes: int) -> None:
        before = self._travelling.get(micro_batch, 0)
        self._travelling[micro_batch] = nbytes
        self._change(device=nbytes - before)

    # blocks: that no more are in slabs than there are is a mistake of ours

    def fetch(self, block: int) -> None:
        self._in_slabs.add(block)
        sharing = sum(not self._facts.blocks[index].resident for index in self._in_slabs)
        assert sharing <= self._allotment.slabs, f"block {block} has no slab; they hold {sorted(self._in_slabs)}"

    def evict(self, block: int) -> None:
        self._in_slabs.remove(block)

    def leave_slabs(self) -> None:
        self._in_slabs.clear()

    # activations

    def forward(self, visit: int, micro_batch: int) -> None:
        """The inputs that came are held, outputs are made."""
        self._travel(micro_batch, 0)
        self._change(device=self._boundary[visit])
        following = visit + 1
        self._travel(micro_batch, self._boundary[following] if following < len(self._boundary) else 0)
        if visit in self._allotment.keep:
            self._change(device=self._kept[visit])

    def spill(self, visit: int, micro_batch: int) -> None:
        on_host = self._allotment.boundaries[visit] == "host"
        self._change(device=-self._boundary[visit], host=self._boundary[visit] if on_host else 0)

    def restore(self, visit: int, micro_batch: int) -> None:
        self._change(device=self._boundary[visit])

    def backward(self, visit: int, micro_batch: int) -> None:
        """The gradient of the inputs is made, while that of the outputs is still there."""
        self._change(device=self._boundary[visit])

    def backward_ends(self, visit: int, micro_batch: int) -> None:
        self._change(device=-2 * self._boundary[visit])  # the inputs; and their gradient travels from now on
        self._travel(micro_batch, self._boundary[visit] if visit else 0)
        if visit in self._allotment.keep:
            self._change(device=-self._kept[visit])
        elif self._allotment.boundaries[visit] == "host" and visit != len(self._boundary) - 1:
            self._change(host=-self._boundary[visit])
