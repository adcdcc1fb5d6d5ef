"""weightstream as a side of a comparison (`turns.py`): everything on disk, nothing kept in RAM between uses.

python benchmarks/streamed.py --store runs/x --tokens 2048 --steps 3       # alone: seconds and what they went to
"""

import argparse
import shutil
import time
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from turns import serve
from workload import BETAS, CLIP_NORM, EPSILON, LEARNING_RATE, WEIGHT_DECAY, Workload, loss_fn

import weightstream as ws

LAYER_MATRICES = ("*.self_attn.*", "*.mlp.*")


def open_engine(workload: Workload, arguments: argparse.Namespace) -> ws.Engine:
    return ws.Engine(
        model=workload.build,
        store=arguments.store,
        optimizer=ws.AdamW(lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY),
        clip_norm=None if arguments.no_clip else CLIP_NORM,
        precision="bf16",
        device=arguments.device,
        device_memory=arguments.device_memory,
        host_memory=arguments.host_memory,
        activations=arguments.activations,
        threads_per_worker=arguments.threads,
        ram_tier=arguments.ram_tier,
        sparsity=sparsity_of(arguments),
        kernels=dict.fromkeys(LAYER_MATRICES, arguments.kernel) if arguments.kernel else None,
    )


def sparsity_of(arguments: argparse.Namespace) -> ws.Sparsity | None:
    """Static random masks of all matrices of every layer; embedding and head are dense."""
    if not arguments.sparsity:
        return None
    group = ws.SparsityGroup(patterns=LAYER_MATRICES, sparsity=arguments.sparsity, block=tuple(arguments.block))
    return ws.Sparsity((group,))


def layer_bytes(engine: ws.Engine) -> dict[str, int]:
    """Of the matrices of all layers as the store has them at present, masks included: in records, and of what streams."""
    stored = streamed = 0
    for unit in engine.store.units:
        layout = engine.store.layout(unit.index)
        for part in layout.parts:
            own = sum(
                spec.nbytes for spec in part.tensors if any(fnmatchcase(spec.name, one) for one in LAYER_MATRICES)
            )
            stored += own
            streamed += own if part in layout.fetched else 0
    return {"stored": stored, "streamed": streamed}


class StreamedSide:
    """One engine on a new store, which is removed at the end."""

    def __init__(self, workload: Workload, arguments: argparse.Namespace) -> None:
        self.workload, self.store = workload, Path(arguments.store)
        if arguments.replace:
            shutil.rmtree(self.store, ignore_errors=True)
        elif self.store.exists():
            raise SystemExit(f"{self.store} exists; give a new folder, or --replace to remove what is there")
        self.engine = open_engine(workload, arguments)
        self.number = 0

    def step(self) -> dict:
        self.number += 1
        result = self.engine.step(self.workload.batches(self.number), loss_fn)
        return {
            "loss": result.loss,
            "stalled_s": result.stalled_s,
            "read": result.bytes.read,
            "written": result.bytes.written,
            "engine_bound": result.bytes.bound,
            "seconds": dict(result.seconds),
            "layer_updates_s": self.layer_updates_s(),
        }

    def layer_updates_s(self) -> float:
        """What updates of layers took in the last step: gradients scaled, the optimizer, the cast, checksums."""
        layers = {f"Update({block.index})" for block in self.engine.store.blocks if ".layers." in block.name}
        spans = self.engine.recorder.spans()
        return sum(span.busy_s for span in spans if span.kind == "update" and span.what in layers)

    def close(self) -> dict:
        found = {"layer_bytes": layer_bytes(self.engine)}
        self.engine.close()
        disk_bytes = sum(path.stat().st_blocks * 512 for path in self.store.rglob("*") if path.is_file())
        shutil.rmtree(self.store)
        return found | {"disk_bytes": disk_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True)
    Workload.add_arguments(parser)
    parser.add_argument("--activations", choices=["auto", "keep", "recompute"], default="recompute")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--device-memory", default="512MiB")
    parser.add_argument("--host-memory", default="2GiB")
    parser.add_argument("--ram-tier", action="store_true")
    parser.add_argument("--no-clip", action="store_true")
    parser.add_argument("--sparsity", type=float, default=0.0, help="of the matrices of every layer")
    parser.add_argument(
        "--block", type=int, nargs=2, default=[1, 1], help="rows and columns that are zero or not together"
    )
    parser.add_argument(
        "--kernel", help="multiplies by their non-zeros (see the package); by default they are expanded"
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--replace", action="store_true", help="remove what is at --store first")
    parser.add_argument("--serve", action="store_true", help="answer commands on standard input (see turns.py)")
    arguments = parser.parse_args()
    workload = Workload.of(arguments)
    if arguments.serve:
        serve(lambda: StreamedSide(workload, arguments))
        return
    side = StreamedSide(workload, arguments)
    print(side.engine.plan)
    for number in range(arguments.steps + 3):
        started = time.perf_counter()
        facts = side.step()
        spent = "  ".join(f"{name} {value:.3f}" for name, value in facts.pop("seconds").items())
        print(f"{'warm-up' if number < 3 else 'step'} {time.perf_counter() - started:.3f} s  {facts}\n    {spent}")
    print(side.close())


if __name__ == "__main__":
    main()
