"""From a machine's profile to seconds: of a kernel, of a visit, of an update; what the simulator starts from.

Between measured sizes rates are interpolated on logarithmic scales; beyond them the nearest rate holds. A kernel that was
not measured counts as a multiplication of as many bytes.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightstream.cluster import Cluster
from weightstream.errors import PlanError
from weightstream.machine.profile import CodecRates, Compute, Executor, Profile
from weightstream.prediction.census import Census, Kernel, Kernels, VisitCensus
from weightstream.schedule.allotment import Allotment, Facts
from weightstream.schedule.cost import BlockFacts
from weightstream.simulator.durations import Durations
from weightstream.simulator.hardware import Disk, Hardware, Link

_SAME = {
    "sub": "add", "mul_": "mul", "div_": "div", "sub_": "add", "rsub": "add",
    "zeros": "new_zeros", "zeros_like": "new_zeros", "new_ones": "new_zeros", "ones_like": "new_zeros", "full": "new_zeros",
    "fill_": "new_zeros", "zero_": "new_zeros", "new_empty": "", "empty_like": "", "empty": "", "exp": "rsqrt",
    "cos": "tanh", "sin": "tanh", "sigmoid": "tanh", "sqrt": "rsqrt", "copy_": "clone", "tanh_backward": "mul",
    "threshold_backward": "mul", "index_put_": "index_put", "index_add": "index_put", "index_add_": "index_put",
    "index_select": "index", "gather": "index", "scatter": "index_put", "native_dropout_backward": "mul", "where": "mul",
    "constant_pad_nd": "clone", "amax": "mean", "var_mean": "mean", "split_with_sizes_copy": "clone",
    "select_backward": "slice_backward",
}  # fmt: skip
"""Kernels that go through memory as a measured one does."""


@dataclass(frozen=True, slots=True)
class Tables:
    """A profile's tables for one number of threads, and how to look into them."""

    compute: Compute
    product_sizes: Sequence[int]
    attention_lengths: Sequence[int]
    attention_width: int
    kernel_elements: Sequence[int]

    @classmethod
    def of(cls, profile: Profile, threads: int) -> "Tables":
        return cls(
            profile.with_threads(threads), profile.product_sizes, profile.attention_lengths, profile.attention_width,
            profile.kernel_elements,
        )  # fmt: skip

    def seconds(self, kernels: Kernels) -> float:
        """Of so many calls, by themselves."""
        return sum(self.kernel_s(kernel) * count for kernel, count in kernels.items())

    def kernel_s(self, kernel: Kernel) -> float:
        """Of one call."""
        if kernel.view or not kernel.elements:
            return 0.0
        if kernel.name.startswith("attention") and kernel.product is not None:
            return self._attention_s(kernel)
        if kernel.flops and kernel.product is not None:
            return self._product_s(kernel)
        return self._other_s(kernel)

    def _product_s(self, kernel: Kernel) -> float:
        assert kernel.product is not None
        rates = self._row(
            self.compute.products, f"{kernel.layout} {kernel.dtype}", f"nn {_half_or_whole(kernel.dtype)}"
        )
        batch, m, n, k = kernel.product
        small = batch > 1 and m * n * k < self.product_sizes[0] ** 3
        rate = _between(self.product_sizes, rates, [max(m, 1), max(n, 1), max(k, 1)])
        if small:  # many small ones in one call go faster than one alone
            rate = max(rate, _between(self.product_sizes, rates, [self.product_sizes[1]] * 3) / 2)
        return kernel.flops / rate

    def _attention_s(self, kernel: Kernel) -> float:
        assert kernel.product is not None
        batch, queries, keys, width = kernel.product
        key = f"{kernel.name} {kernel.layout} {kernel.dtype}"
        rates = self._row(self.compute.attention, key, f"{kernel.name} full {_half_or_whole(kernel.dtype)}")
        rate = _between(self.attention_lengths, rates, [max(keys, 1)])
        work = 4.0 * batch * queries * keys * width
        return (2.5 if kernel.name == "attention_backward" else 1.0) * work / rate

    def _other_s(self, kernel: Kernel) -> float:
        name = _SAME.get(kernel.name, kernel.name)
        if not name:
            return 0.0
        row = self.compute.kernels.get(f"{name} {kernel.dtype}")
        elements = kernel.elements
        if row is None:
            row = self.compute.kernels["mul float32"]
            elements = max(1, kernel.nbytes // 12)
        first, last = self.kernel_elements[0], self.kernel_elements[-1]
        if elements <= first:
            return row[0]
        if elements >= last:
            return row[-1] * elements / last
        return math.exp(_interpolated(self.kernel_elements, [math.log(value) for value in row], elements))

    def _row(self, table: Mapping[str, Sequence[float]], key: str, instead: str) -> Sequence[float]:
        return table[key] if key in table else table[instead]


def _half_or_whole(dtype: str) -> str:
    return "bfloat16" if dtype in ("bfloat16", "float16") else "float32"


def _place(sizes: Sequence[int], value: float) -> tuple[int, float]:
    """The sizes that a value lies between, and how far along, on a logarithmic scale; clamped."""
    if value <= sizes[0] or len(sizes) == 1:
        return 0, 0.0
    if value >= sizes[-1]:
        return len(sizes) - 2, 1.0
    low = bisect_right(sizes, value) - 1
    return low, math.log(value / sizes[low]) / math.log(sizes[low + 1] / sizes[low])


def _interpolated(sizes: Sequence[int], values: Sequence[float], value: float) -> float:
    low, along = _place(sizes, value)
    return values[low] if along == 0.0 else values[low] * (1 - along) + values[low + 1] * along


def _between(sizes: Sequence[int], rates: Sequence[float], point: Sequence[float]) -> float:
    """The rate at a point of a grid over every dimension's sizes (last fastest): means of seconds per operation."""
    corners: list[tuple[int, float]] = [(0, 1.0)]
    for value in point:
        low, along = _place(sizes, value)
        ways = [(low, 1 - along)] + ([(low + 1, along)] if along else [])
        corners = [(index * len(sizes) + at, share * part) for index, share in corners for at, part in ways if part]
    return math.exp(sum(share * math.log(rates[index]) for index, share in corners))


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A linear layer that a kernel multiplies by the non-zeros of its weight, `shape` (out, in), so many times as fast."""

    shape: tuple[int, int]
    speedup: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse:
    """What of a block is sparse.

    Args:
        nonzeros: that are expanded into its slab, by the width of the blocks that they come in.
        elements: of the tensors that are expanded.
        decoding_steps: bits or gaps of the masks that are gone through at each fetch.
        prepared: blocks or single elements of which kernels ask in what rows and columns they are, where that is found at each
            fetch.
        parameters: of all of the block's trained parameters, as many as they would be if none were sparse.
        products: what is not expanded, but multiplied by kernels.
    """

    nonzeros: Mapping[int, int]
    elements: int
    decoding_steps: int
    parameters: int
    products: Sequence[Product] = ()
    prepared: int = 0


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds on one rank of a machine that was measured.

    Args:
        ranks: how many there are; with several, what goes between them takes processor time of each.
        slowdown: how many times slower this rank computes because others share what all need (memory, caches).
    """

    profile: Profile
    threads: int
    optimizer: str = "AdamW"
    slowdown: float = 1.0
    ranks: int = 1

    @property
    def tables(self) -> Tables:
        return Tables.of(self.profile, self.threads)

    @property
    def executor(self) -> Executor:
        return self.profile.executor

    def durations(
        self,
        census: Census,
        facts: Facts,
        allotment: Allotment,
        *,
        tensors: Sequence[int],
        clipped: bool,
        dtype: str,
        owners: int = 1,
        sparse: Mapping[int, Sparse] | None = None,
    ) -> Durations:
        """What the simulator needs of one rank.

        Args:
            census: of one micro-batch.
            tensors: how many trained parameters each block has.
            clipped: whether gradients are scaled before the update.
            dtype: of the copy that streams.
            owners: how many ranks own records; each has an equal part of every block.
            sparse: by block, where anything of it is.
        """
        tables, sparse = self.tables, sparse or {}
        at_reduce = self._sums_at_reduce(facts, allotment)
        forward, recompute, backward = [], [], []
        link = self.profile.link if self.ranks > 1 else None
        down_s = link.broadcast_cpu_s_per_byte if link else 0.0
        for number, (place, visit) in enumerate(zip(facts.visits, census.visits, strict=True)):
            kept = number in allotment.keep
            received = down_s * facts.blocks[place.block].fetched_bytes / facts.present
            own, block = sparse.get(place.block), facts.blocks[place.block]
            forward.append(self._run(tables, visit.forward, "forward", own, kept=kept) + received)
            recompute.append(self._run(tables, visit.recompute, "forward", own))
            formed = _formed(block, own)
            arriving = 0.0 if at_reduce else self._arriving(tables, visit, formed)
            behind = self._run(tables, visit.backward, "backward", own, kept=kept)
            backward.append(behind + arriving + self._gathered(own))
        counts = [self._gradients(census, facts, block, sparse.get(block.index)) for block in facts.blocks]
        reduce = tuple(
            self._reduce(tables, block, counts[block.index], tensors[block.index], facts.present if at_reduce else 0)
            for block in facts.blocks
        )
        update = tuple(
            owners * self._update(tables, block, allotment, tensors[block.index], clipped, dtype)
            for block in facts.blocks
        )
        begin = self.executor.operation_s.get("begin", 0.0) + self._run(tables, census.begin, "forward")
        agreed = 2 * link.gather_s if link else 0.0  # what is asked, and what was found
        return Durations(
            forward=tuple(forward), recompute=tuple(recompute), backward=tuple(backward),
            turn=self._run(tables, census.turn, "backward"), update=update, reduce=reduce,
            expand=tuple(self._expanded(sparse.get(block.index)) for block in facts.blocks) if sparse else (),
            overhead={kind: value for kind, value in self.executor.operation_s.items() if kind != "begin"},
            between_steps=self.executor.between_steps_s + facts.present * begin + agreed,
        )  # fmt: skip

    def _run(
        self, tables: Tables, kernels: Kernels, direction: str, sparse: Sparse | None = None, *, kept: bool = False
    ) -> float:
        own = tables.seconds(kernels) + self.executor.kernel_s.get(direction, 0.0) * sum(kernels.values())
        own -= sum(_saved(tables, kernels, product) for product in (sparse.products if sparse else ()))
        longer = self.executor.in_a_step.get(direction, 1.0)
        if kept:
            longer = self.executor.in_a_step.get(f"{direction} kept", longer)
        return own * longer * self.slowdown

    def _sums_at_reduce(self, facts: Facts, allotment: Allotment) -> bool:
        """Whether all gradients of a block are held until its sum is closed."""
        return facts.present == 1 or allotment.held_gradients >= facts.present

    def _gradients(self, census: Census, facts: Facts, block: BlockFacts, sparse: Sparse | None) -> Counter[str]:
        """Elements of a block's gradients from one micro-batch, by dtype; of a parameter used twice, twice."""
        found: Counter[str] = Counter()
        for visit, counted in zip(facts.visits, census.visits, strict=True):
            if visit.block == block.index:
                found.update(counted.gradients)
        formed = _formed(block, sparse)
        return Counter({dtype: round(count * formed) for dtype, count in found.items()})

    def _expanded(self, sparse: Sparse | None) -> float:
        """Filling a slab with what has arrived, by one thread: masks decoded, what kernels ask of them found, zeros written,
        non-zeros put in their places."""
        if sparse is None:
            return 0.0
        codec = self._codec
        clear_s = 2 * sparse.elements / codec.clear_bytes_per_s
        found_s = codec.decode_s * sparse.decoding_steps + (codec.prepare_s or 0.0) * sparse.prepared
        return (
            clear_s
            + found_s
            + sum(_by_width(codec.expand_s, width) * count for width, count in sparse.nonzeros.items())
        )

    def _gathered(self, sparse: Sparse | None) -> float:
        """One micro-batch's gradients at the non-zeros of what was expanded."""
        nonzeros = sparse.nonzeros if sparse else {}
        each = sum(_by_width(self._codec.gather_s, width) * count for width, count in nonzeros.items())
        return each * self.slowdown

    @property
    def _codec(self) -> CodecRates:
        rate = self.profile.memory_bytes_per_s
        assumed = CodecRates(clear_bytes_per_s=rate, expand_s={1: 4 / rate}, gather_s={1: 4 / rate}, decode_s=1 / rate)
        return self.profile.codec or assumed

    def _arriving(self, tables: Tables, visit: VisitCensus, formed: float) -> float:
        """One micro-batch's gradients of a visit, of which this part is summed, are added at once to what is there."""
        sums = tables.compute.sums
        each = formed * sum(sums[f"add {_half_or_whole(dtype)}"] * count for dtype, count in visit.gradients.items())
        return (each + self.executor.tensor_s.get("reduce", 0.0) * visit.parameters / 2) * self.slowdown

    def _reduce(self, tables: Tables, block: BlockFacts, gradients: Counter[str], tensors: int, present: int) -> float:
        """The squares, and the sum itself where it waits until here."""
        if not block.trainable:
            return 0.0
        sums = tables.compute.sums
        own = sums["squares"] * block.gradient_bytes / 4
        if self.ranks > 1 and self.profile.link is not None:
            own += self.profile.link.reduce_cpu_s_per_byte * block.gradient_bytes
        if present:
            for dtype, count in gradients.items():
                kind = _half_or_whole(dtype)
                own += count * (sums[f"copy {kind}"] + (present - 1) * sums[f"add {kind}"])
        return (own + self.executor.tensor_s.get("reduce", 0.0) * tensors) * self.slowdown

    def experts_s(
        self,
        touched: float,
        summed: float,
        numel: int,
        *,
        load_bytes: int,
        record_bytes: int,
        clipped: bool,
        dtype: str,
    ) -> float:
        """Seconds of one rank for experts at the end of a step: their gradients are added up, with their squares, and they
        are updated. What one record costs besides its bytes is not in a profile.

        Args:
            touched: those that it updates.
            summed: those of its micro-batches, each counted once for each of these.
            numel: parameters of one.
        """
        tables, parameters = self.tables, round(touched * numel)
        if not parameters:
            return 0.0
        block = BlockFacts(0, "experts", 0, load_bytes, record_bytes, 4 * parameters)
        own = update_alone_s(
            tables.compute, block, self.optimizer, dtype=dtype, clipped=clipped, memory_bytes_per_s=None
        )
        own *= self.executor.in_a_step.get("update", 1.0)
        return own + numel * (tables.compute.sums["add float32"] * summed + tables.compute.sums["squares"] * touched)

    def _update(
        self, tables: Tables, block: BlockFacts, allotment: Allotment, tensors: int, clipped: bool, dtype: str
    ) -> float:
        """One owner's part: read from disk it is checked; scaled, stepped, cast; what will be written gets its checksums."""
        if not block.trainable or not block.staged_bytes:
            return 0.0
        in_ram = block.index in allotment.pinned_states
        own = update_alone_s(
            tables.compute, block, self.optimizer, dtype=dtype, clipped=clipped,
            memory_bytes_per_s=self.profile.memory_bytes_per_s if in_ram else None,
        )  # fmt: skip
        own *= self.executor.in_a_step.get("update in RAM" if in_ram else "update", 1.0)
        return (own + self.executor.tensor_s.get("update", 0.0) * tensors) * self.slowdown


def update_alone_s(
    compute: Compute, block: BlockFacts, optimizer: str, *, dtype: str, clipped: bool, memory_bytes_per_s: float | None
) -> float:
    """Seconds of a block's update by themselves, one after another: checked, scaled, stepped, cast, checksums made.

    Args:
        dtype: of the copy that streams.
        memory_bytes_per_s: of copies in memory, where the RAM tier has its states; None where they come from disk.
    """
    parameters = block.staged_bytes / 4
    each = compute.optimizer.get(optimizer) or compute.optimizer["AdamW"] * block.load_bytes / (12 * parameters)
    own = parameters * (each + (compute.scale_s if clipped else 0.0))
    if dtype != "float32":
        own += parameters * compute.cast_s[_half_or_whole(dtype)]
    own += (block.record_bytes + (0 if memory_bytes_per_s else block.load_bytes)) / compute.checksum_bytes_per_s
    if memory_bytes_per_s:  # the RAM tier's threads copy states out of it and back, on cores that compute then lacks
        own += 2 * block.load_bytes / memory_bytes_per_s
    return own


def _formed(block: BlockFacts, sparse: Sparse | None) -> float:
    """The part of a block's gradients that is summed: all of it, or what there is at non-zeros."""
    return 1.0 if sparse is None else min(1.0, block.gradient_bytes / max(1, 4 * sparse.parameters))


def _by_width(rates: Mapping[int, float], width: int) -> float:
    """The rate of the widest blocks that were measured and are no wider."""
    return rates[max((known for known in rates if known <= width), default=min(rates))]


def _saved(tables: Tables, kernels: Kernels, product: Product) -> float:
    """Seconds that a kernel saves where a dense product of this layer was counted; negative if it is slower."""
    found = [
        kernel for kernel in kernels if kernel.flops and kernel.product is not None and _is_of(kernel, product.shape)
    ]
    return sum(map(tables.kernel_s, found)) * (1 - 1 / product.speedup)


def _is_of(kernel: Kernel, shape: tuple[int, int]) -> bool:
    """Whether this is the product of a linear layer: its output, its input's gradient, its weight's."""
    assert kernel.product is not None
    out, into = shape
    _, m, n, k = kernel.product
    return {"nt": (n, k) == (out, into), "nn": (n, k) == (into, out), "tn": (m, n) == (out, into)}[kernel.layout]


def slowdown_of(profile: Profile, ranks: int, threads: int) -> float:
    """How many times slower a rank computes among so many of its host, beyond what sharing cores explains."""
    cores = profile.machine.cores
    alike = {
        int(key.split("x")[0]): value for key, value in profile.contention.ranks.items() if key.endswith(f"x{threads}")
    }
    if ranks == 1 or not alike:
        return 1.0
    nearest = min(alike, key=lambda count: (abs(count - ranks), count))
    return max(1.0, alike[nearest] / max(1.0, nearest * threads / cores))


def hardware_of(
    profile: Profile, cluster: Cluster, *, threads: int, on_disk: bool = True, hosts: Sequence[int] | None = None
) -> Hardware:
    """The resources of a cluster whose hosts are all like the machine that was measured; one host by default.

    Raises:
        PlanError: a cluster of several ranks, and the profile has no link.
    """
    disk, link = profile.disk, profile.link
    if link is None and cluster.size > 1:
        raise PlanError(
            f"the profile has no link between processes, and {cluster.size} ranks need one: run `weightstream calibrate` "
            "anew, or take one rank"
        )
    return Hardware(
        cluster=cluster, hosts=tuple(hosts) if hosts is not None else (0,) * cluster.size,
        cores_per_host=profile.machine.cores, cores_per_rank=threads,
        disk=Disk(
            read_bytes_per_s=disk.read_bytes_per_s, write_bytes_per_s=disk.write_bytes_per_s,
            together=disk.together, latency_s=disk.latency_s,
        ) if on_disk else None,
        link=Link(
            bytes_per_s=min(link.broadcast_bytes_per_s, link.reduce_bytes_per_s), latency_s=link.latency_s,
        ) if link is not None and cluster.size > 1 else None,
        memory_bytes_per_s=profile.memory_bytes_per_s, io_compute_s_per_byte=profile.contention.io_compute_s_per_byte,
    )  # fmt: skip
