"""What the processes of the demonstration do: each looks ahead, trains a store, or branches, until it is done or killed.

A function is given `send`, by which it tells what happens, and returns what the demonstration keeps.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental.symbolic_shapes  # which autograd imports in its first backward: here once for all processes
from torch import Tensor

from weightstream.demo_120t.bytewise import (
    CLIP_NORM,
    LEARNING_RATE,
    TEXTS,
    WEIGHT_DECAY,
    Bytewise,
    loss_fn,
    read_text,
    write_text,
)
from weightstream.engine.engine import Engine
from weightstream.schedule.cost import BlockFacts, lower_bound
from weightstream.store.compaction import SHARE
from weightstream.store.layout import record_layout
from weightstream.store.optimizers import AdamW
from weightstream.store.store import Store
from weightstream.training.memory import peak_rss_bytes
from weightstream.training.metrics import MetricsLog

Send = Callable[[str, Mapping[str, Any]], None]
DEVICE_MEMORY, HOST_MEMORY, EXPERTS_MEMORY = "256MiB", "256MiB", "768MiB"
GRADIENT_BYTES = 4


def look_ahead(send: Send, folder: Path, sizes: Mapping[str, int], steps: int) -> dict[str, Any]:
    """Makes the text. By number of steps, from none to `steps`: `different`, the experts that so many will have reached,
    each counted once, and `reached`, counted once for each step. `record_bytes` are those of one expert on disk,
    `compaction_share` is what compaction may write for each byte written."""
    write_text(folder)
    workload = Bytewise(**sizes)
    text = read_text(folder, TEXTS[0])
    seen = [torch.empty(0, dtype=torch.int64)] * workload.layers
    different, reached = [0], [0]
    for layers in workload.reached(text, range(1, steps + 1)):
        seen = [torch.cat([before, now]).unique() for before, now in zip(seen, layers, strict=True)]
        different.append(sum(numbers.numel() for numbers in seen))
        reached.append(reached[-1] + sum(numbers.numel() for numbers in layers))
    expert = workload.experts_of(0).family("experts").block(0, 0)
    layout = record_layout(expert, "fp32", AdamW(lr=LEARNING_RATE))
    return {
        "different": different, "reached": reached, "record_bytes": layout.parts_nbytes, "compaction_share": SHARE,
    }  # fmt: skip


def train(
    send: Send,
    folder: Path,
    name: str,
    *,
    sizes: Mapping[str, int],
    until: int,
    lr: float | None = None,
    snapshot: str | None = None,
    digest: bool = False,
) -> dict[str, Any]:
    """Makes or continues the store `name` until a step, and holds that under the name `snapshot`; with its `digest`, if
    that is wanted."""
    workload, text = Bytewise(**sizes), read_text(folder, TEXTS[0])
    began_s = time.perf_counter()
    with Engine(
        workload.build, folder / name, AdamW(lr=lr or LEARNING_RATE, weight_decay=WEIGHT_DECAY), clip_norm=CLIP_NORM,
        device_memory=DEVICE_MEMORY, host_memory=HOST_MEMORY, experts_memory=EXPERTS_MEMORY,
        log=lambda said: send("note", {"text": said}),
    ) as engine:  # fmt: skip
        opened_s, opened_at, store = time.perf_counter() - began_s, engine.step_count, engine.store
        different = sum(store.manifest.count_living(first, first + f.count) for first, f in store.layouts.families)
        send("opened", {"step": opened_at, "seconds": opened_s, "pid": os.getpid()})
        with MetricsLog(folder, resumed_step=engine.step_count, tensorboard=False, name=f"{name}.jsonl") as log:
            while (before := engine.step_count) < until:
                facts = _step(engine, workload, text) | {"first": before == opened_at}
                different += facts["new"]
                facts["different"] = different
                log.write("train", **facts)  # before anybody is told
                send("step", facts)
        engine.commit()
        if snapshot is not None and snapshot not in engine.snapshots():
            engine.snapshot(snapshot)
        found: dict[str, Any] = {
            "step": engine.step_count, "opened_s": opened_s, "different": different, "rss": peak_rss_bytes(),
            "model": _model(workload), "dense": dense_step(store, workload.tokens),
        }  # fmt: skip
        if digest:
            began_s = time.perf_counter()
            send("note", {"text": f"digest over {different:,} experts and all other parameters"})
            found |= {"digest": store.digest(), "digest_s": time.perf_counter() - began_s}
        return found


def _step(engine: Engine, workload: Bytewise, text: Tensor) -> dict[str, Any]:
    result = engine.step(workload.batches(text, engine.step_count + 1), loss_fn)
    return {
        "step": result.step, "loss": result.loss, "seconds": result.elapsed_s,
        "touched": sum(facts.touched for facts in result.experts.values()),
        "new": sum(facts.new for facts in result.experts.values()),
        "read": result.bytes.read, "written": result.bytes.written, "least": result.bytes.bound, "rss": peak_rss_bytes(),
    }  # fmt: skip


def _model(workload: Bytewise) -> dict[str, int]:
    return {
        "parameters": workload.parameter_count(), "layers": workload.layers, "experts": workload.experts,
        "expert_parameters": workload.expert_parameters, "tokens": workload.tokens,
    }  # fmt: skip


def dense_step(store: Store, tokens: int) -> dict[str, int]:
    """What a step would need in which every expert had a gradient, by the planner's arithmetic for blocks that lie on
    disk: bytes of masters and moments, and those that it would read and write; floating-point operations."""
    blocks: list[BlockFacts] = []
    for first, family in store.layouts.families:
        layout = store.layout(first)
        blocks.append(
            BlockFacts(
                len(blocks), family.name, family.count * layout.fetched_nbytes,
                family.count * sum(part.nbytes for part in layout.states), family.count * layout.parts_nbytes,
                family.count * GRADIENT_BYTES * family.numel,
            )
        )  # fmt: skip
    least = lower_bound(blocks, deferred=True, staged_on_disk=frozenset(block.index for block in blocks))
    parameters = sum(family.count * family.numel for _, family in store.layouts.families)
    return {
        "state_bytes": sum(block.load_bytes for block in blocks), "read_bytes": least.read,
        "written_bytes": least.written, "flop": 6 * parameters * tokens,
    }  # fmt: skip


def branch(send: Send, folder: Path, name: str, snapshot: str, new: Sequence[str]) -> dict[str, Any]:
    """Branches a snapshot, as often as there are names; those that are there stay."""
    began_s = time.perf_counter()
    with Store.open(folder / name, writable=False) as store:
        for each in new:
            if not Store.exists(folder / each):
                store.branch(snapshot, folder / each)
    return {"seconds": time.perf_counter() - began_s}


def let_go(send: Send, folder: Path, name: str, snapshot: str) -> dict[str, Any]:
    """Gives up a snapshot, if it is there."""
    with Store.open(folder / name) as store:
        held = snapshot in store.snapshots()
        return {"freed_bytes": store.remove_snapshot(snapshot) if held else 0}
