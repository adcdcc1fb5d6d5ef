"""What the runtime needs for itself: toy models whose kernels hardly take time are streamed from a toy store.

One has a single product in each block; what its operations take, less the kernels by themselves, is an overhead per
operation. Against it decoder layers give one per tensor, and layers just wide enough for threads to share kernels one per
kernel. Another, of ordinary width, says how much longer kernels and updates take in a step than one by one; it is trained
with states on disk and activations computed again, and with states in RAM and activations kept.
"""

import importlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from weightstream.engine.engine import Engine
from weightstream.errors import ConfigError
from weightstream.machine.kernels import significant
from weightstream.machine.profile import Executor
from weightstream.machine.steady import look
from weightstream.prediction.census import Census, Kernels, take
from weightstream.schedule.cost import BlockFacts
from weightstream.store.optimizers import AdamW
from weightstream.training.memory import peak_rss_bytes, rss_bytes

_WIDTH, _TOKENS, _LAYERS, _MICRO_BATCHES = 32, 16, 4, 4
_LARGE = 256
_SHARED_WIDTH, _SHARED_TOKENS = 192, 192
"""Just enough for threads to share what a kernel does: they have to be woken each time, as in a model of people."""
_ORDINARY_WIDTH, _ORDINARY_TOKENS, _ORDINARY_STEPS = 448, 320, 7
KernelSeconds = Callable[[Kernels], float]
UpdateSeconds = Callable[[BlockFacts, bool], float]
"""Of a block's update by itself, and whether its states are in RAM; bf16, AdamW, clipped."""


class _Bare(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.product = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)  # type: ignore[no-any-return]


class _Layer(nn.Module):
    """A decoder layer as people train it: what its own Python code takes is between its kernels in their runs, too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        llama = importlib.import_module("transformers.models.llama.modeling_llama")
        config = llama.LlamaConfig(
            hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, attn_implementation="sdpa",
        )  # fmt: skip
        self.layer = llama.LlamaDecoderLayer(config, 0)
        self.rotary = llama.LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)[None]
        return self.layer(x, position_embeddings=self.rotary(x, places), position_ids=places)  # type: ignore[no-any-return]


class _Model(nn.Module):
    def __init__(self, layer: Callable[[int], nn.Module], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer(width) for _ in range(_LAYERS)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _loss(model: nn.Module, micro_batch: Tensor) -> Tensor:
    return model(micro_batch).float().square().mean()  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Toy:
    """Medians of one toy's steps: seconds per operation by kind, and what its kernels are."""

    operation_s: Mapping[str, float]
    begin_s: float
    between_s: float
    census: Census
    tensors: int
    blocks: Sequence[BlockFacts]


def _engine(
    layer: Callable[[int], nn.Module], folder: Path, threads: int, width: int, *, in_memory: bool = False
) -> Engine:
    return Engine(
        lambda: _Model(layer, width), folder, AdamW(), clip_norm=1.0, precision="bf16", device_memory="256MiB",
        host_memory="256MiB", activations="keep" if in_memory else "recompute", ram_tier=in_memory, threads_per_worker=threads,
        block_rules={"layers.*": "block"},
    )  # fmt: skip


def _micro_batches(tokens: int, width: int) -> list[Tensor]:
    return [torch.randn(1, tokens, width).to(torch.bfloat16) for _ in range(_MICRO_BATCHES)]


def _measure(
    layer: Callable[[int], nn.Module],
    folder: Path,
    steps: int,
    threads: int,
    *,
    width: int = _WIDTH,
    tokens: int = _TOKENS,
    in_memory: bool = False,
) -> _Toy:
    micro_batches = _micro_batches(tokens, width)
    found: dict[str, list[float]] = {}
    begins, betweens = [], []
    with _engine(layer, folder, threads, width, in_memory=in_memory) as engine:
        for number in range(steps + 3):
            look()
            result = engine.step(micro_batches, _loss)
            if number < 3:
                continue
            counts = engine.runtime.outcome.counts
            for kind, taken in result.seconds.items():
                if counts[kind]:
                    found.setdefault(kind, []).append(taken / counts[kind])
            begins.append(result.seconds["glue"] / _MICRO_BATCHES)
            betweens.append(result.elapsed_s - result.stalled_s - sum(result.seconds.values()))
        census = take(
            engine.model, [visit.module for visit in engine.runtime.facts.visits], _loss, micro_batches[0],
            dtype=torch.bfloat16,
            forwards={visit.module: engine.worker.own_forward(visit.module) for visit in engine.runtime.facts.visits},
        )  # fmt: skip
        tensors = len(list(engine.model.layers[1].parameters()))  # type: ignore[index, union-attr]
        blocks = [block for block in engine.runtime.facts.blocks if block.trainable and block.staged_bytes]
    return _Toy(
        {kind: median(values) for kind, values in found.items()}, median(begins), max(0.0, median(betweens)), census,
        tensors, blocks,
    )  # fmt: skip


def executor(
    folder: Path, kernel_seconds: KernelSeconds, update_seconds: UpdateSeconds, *, steps: int = 15, threads: int
) -> Executor:
    """Overheads, from toys in a folder that is theirs."""
    bare, rich = (_measure(layer, folder / name, steps, threads) for name, layer in (("bare", _Bare), ("rich", _Layer)))
    shared = _measure(_Layer, folder / "shared", steps, threads, width=_SHARED_WIDTH, tokens=_SHARED_TOKENS)
    operation_s = dict(bare.operation_s)
    kernel_s, tensor_s = {}, {}
    for kind in ("forward", "backward"):
        # the last of a toy's visits is not recomputed: seconds are the mean over all visits, and so are kernels
        (few, few_s), (many, many_s) = (_kernels(toy, kind, kernel_seconds) for toy in (bare, shared))
        extra = (shared.operation_s[kind] - many_s) - (bare.operation_s[kind] - few_s)
        kernel_s[kind] = max(0.0, extra / (many - few))
        operation_s[kind] = max(0.0, bare.operation_s[kind] - few_s - few * kernel_s[kind])
    turn = bare.census.turn
    own = kernel_seconds(turn) + kernel_s["backward"] * sum(turn.values())
    operation_s["turn"] = max(0.0, bare.operation_s["turn"] - own)
    for kind in ("reduce", "update"):
        each = (rich.operation_s[kind] - bare.operation_s[kind]) / (rich.tensors - bare.tensors)
        tensor_s[kind] = max(0.0, each)
        operation_s[kind] = max(0.0, bare.operation_s[kind] - tensor_s[kind] * bare.tensors)
    operation_s["begin"] = bare.begin_s
    on_disk, in_memory = (
        _measure(
            _Layer, folder / name, min(steps, _ORDINARY_STEPS), threads, width=_ORDINARY_WIDTH, tokens=_ORDINARY_TOKENS,
            in_memory=name == "in-memory",
        )
        for name in ("on-disk", "in-memory")
    )  # fmt: skip
    in_a_step = _in_a_step(on_disk, kernel_seconds, operation_s, kernel_s)
    in_a_step |= _in_a_step(in_memory, kernel_seconds, operation_s, kernel_s, kept=True)
    for key, toy in (("update", on_disk), ("update in RAM", in_memory)):
        in_a_step[key] = _update_in_a_step(toy, update_seconds, operation_s, tensor_s, in_ram=toy is in_memory)
    return Executor(
        operation_s={kind: significant(value) for kind, value in sorted(operation_s.items())},
        kernel_s={kind: significant(value) for kind, value in kernel_s.items()},
        tensor_s={kind: significant(value) for kind, value in tensor_s.items()},
        in_a_step={kind: significant(value) for kind, value in in_a_step.items()},
        between_steps_s=significant(bare.between_s), process_bytes=_in_a_process(folder / "large", threads),
    )  # fmt: skip


def _in_a_step(
    toy: _Toy,
    kernel_seconds: KernelSeconds,
    operation_s: Mapping[str, float],
    kernel_s: Mapping[str, float],
    *,
    kept: bool = False,
) -> dict[str, float]:
    """How many times longer kernels take in a step of this toy than one by one; at least once.

    Where activations are kept, they come to lie in memory that no cache has, and nothing is computed again.
    """

    def alone_s(runs: Sequence[Kernels], direction: str) -> float:
        own = sum(kernel_seconds(run) + kernel_s[direction] * sum(run.values()) for run in runs)
        return own / len(toy.census.visits)

    visits = toy.census.visits
    first = (toy.operation_s["forward"] - operation_s["forward"]) / alone_s([v.forward for v in visits], "forward")
    forward = max(1.0, first)
    again_s = 0.0 if kept else forward * alone_s([visit.recompute for visit in visits[:-1]], "forward")
    left_s = toy.operation_s["backward"] - operation_s["backward"] - again_s
    backward = max(1.0, left_s / alone_s([v.backward for v in visits], "backward"))
    return dict(
        zip(("forward kept", "backward kept") if kept else ("forward", "backward"), (forward, backward), strict=True)
    )


def _update_in_a_step(
    toy: _Toy,
    update_seconds: UpdateSeconds,
    operation_s: Mapping[str, float],
    tensor_s: Mapping[str, float],
    *,
    in_ram: bool,
) -> float:
    """How many times longer an update takes in a step, of records that just came and beside what still moves; at least once:
    what the RAM tier copies it copies later, on cores that forward then lacks.
    """
    alone_s = sum(update_seconds(block, in_ram) for block in toy.blocks) / len(toy.blocks)
    own_s = toy.operation_s["update"] - operation_s["update"] - tensor_s["update"] * toy.tensors
    return max(1.0, own_s / alone_s)


def _in_a_process(folder: Path, threads: int) -> int:
    """`process_bytes` of a new process: a forked one has memory that it shares and that does not count at first.

    Raises:
        ConfigError: it fails.
    """
    program = f"import sys; from {__name__} import process_bytes as measured; print(measured(*sys.argv[1:]))"
    command = [sys.executable, "-W", "ignore", "-c", program, str(folder), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise ConfigError(f"a process that was to measure its own memory failed: {done.stderr.strip()[-500:]}")
    return int(done.stdout.split()[-1])


def process_bytes(folder: str, count: str) -> int:
    """What this process comes to need beyond its plan, and beyond what it holds before it begins."""
    threads = int(count)
    importlib.import_module("transformers.models.llama.modeling_llama")  # what any model's code has imported
    idle = rss_bytes()
    torch.set_num_threads(threads)
    with _engine(_Layer, Path(folder), threads, _LARGE) as engine:
        micro_batches = _micro_batches(_LARGE, _LARGE)
        for _ in range(5):
            engine.step(micro_batches, _loss)
        facts, allotment = engine.runtime.facts, engine.allotment
        planned = allotment.device_bytes + allotment.host_bytes + 2 * facts.workspace_bytes
        return max(0, peak_rss_bytes() - idle - planned)


def _kernels(toy: _Toy, kind: str, kernel_seconds: KernelSeconds) -> tuple[float, float]:
    """How many a forward or a backward runs, and what they take by themselves; means over the visits."""
    visits = toy.census.visits
    if kind == "forward":
        runs = [visit.forward for visit in visits]
    else:
        runs = [visit.recompute + visit.backward for visit in visits[:-1]] + [visits[-1].backward]
    return sum(sum(run.values()) for run in runs) / len(runs), sum(map(kernel_seconds, runs)) / len(runs)
