"""The control: the same training with everything in memory, in plain PyTorch, as fast as we know how to make it.

bf16 weights, fp32 masters, fp32 gradient sums over micro-batches, global-norm clipping, fused AdamW on the masters.
What makes it fast (`LOG.md` has what was tried):
- a gradient is added to its fp32 sum by a hook as soon as autograd has made it, while it is in cache, then freed;
- clipping costs one pass, the norm: the coefficient goes into the fused AdamW kernel as its `grad_scale`;
- recomputation is `torch.utils.checkpoint`, non-reentrant, per layer; it stops when it has what backward needs;
- freed memory is kept for reuse, as on the streamed side (`allocator.py`; worth little here).
Imports nothing of weightstream. Runs as a side of a benchmark (`turns.py`), or alone to print seconds per phase:

    python benchmarks/resident.py --tokens 2048 --micro-batches 4 --activations recompute
"""

import argparse
import time
from collections import defaultdict

import torch
from allocator import keep_large_blocks
from turns import serve
from workload import BETAS, CLIP_NORM, EPSILON, LEARNING_RATE, WEIGHT_DECAY, Workload, decays, loss_fn


class Resident:
    """Model, masters, moments and gradient sums in memory; `step(micro_batches)` trains once and returns the loss."""

    def __init__(
        self, workload: Workload, *, activations: str, clip_norm: float | None = CLIP_NORM, device: str = "cpu"
    ) -> None:
        torch.manual_seed(0)
        # Built as bf16 from the start: with an fp32 model first, its peak memory would be that of the construction.
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        self.model = workload.build()
        torch.set_default_dtype(default)
        self.device = torch.device(device)
        self.model.to(self.device).train()
        if activations == "recompute":
            self.model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        self.clip_norm = clip_norm
        self.weights = list(self.model.parameters())
        self.masters = [weight.detach().float() for weight in self.weights]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        groups = [
            {"params": [m for m in self.masters if decays(m)], "weight_decay": WEIGHT_DECAY},
            {"params": [m for m in self.masters if not decays(m)], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)
        self.first = True
        self.seconds: dict[str, float] = defaultdict(float)
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.register_post_accumulate_grad_hook(self._gatherer(master))

    def _gatherer(self, master: torch.Tensor):
        total = master.grad

        def gather(weight: torch.Tensor) -> None:
            started = time.perf_counter()
            if self.first:
                total.copy_(weight.grad)
            else:
                total.add_(weight.grad)
            weight.grad = None
            self.seconds["gather"] += time.perf_counter() - started

        return gather

    def step(self, micro_batches: list[dict[str, torch.Tensor]]) -> float:
        """One optimizer step; the seconds of each phase are added to `seconds`."""
        seconds, losses = self.seconds, []
        for index, micro_batch in enumerate(micro_batches):
            self.first = index == 0
            started = time.perf_counter()
            micro_batch = {name: tensor.to(self.device) for name, tensor in micro_batch.items()}
            loss = loss_fn(self.model, micro_batch) * (1 / len(micro_batches))
            forwarded = time.perf_counter()
            gathered = seconds["gather"]
            loss.backward()
            losses.append(loss.detach())
            seconds["forward"] += forwarded - started
            seconds["backward"] += time.perf_counter() - forwarded - (seconds["gather"] - gathered)
        started = time.perf_counter()
        if self.clip_norm is not None:
            norm = torch.nn.utils.get_total_norm([master.grad for master in self.masters])
            # The kernel divides gradients by `grad_scale`; found_inf skips the update, as an AMP scaler would.
            self.optimizer.grad_scale = ((norm + 1e-6) / self.clip_norm).clamp(min=1.0)
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()
        clipped = time.perf_counter()
        self.optimizer.step()
        updated = time.perf_counter()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)
        seconds["clip"] += clipped - started
        seconds["optimizer"] += updated - clipped
        seconds["cast"] += time.perf_counter() - updated
        return float(sum(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Workload.add_arguments(parser)
    parser.add_argument("--activations", choices=["keep", "recompute"], default="recompute")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-clip", action="store_true")
    parser.add_argument("--allocator", choices=["reuse", "glibc"], default="reuse")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help="answer commands on standard input (see turns.py)")
    arguments = parser.parse_args()
    if arguments.allocator == "reuse":
        keep_large_blocks()
    torch.set_num_threads(arguments.threads)
    workload = Workload.of(arguments)

    def start() -> Resident:
        clip_norm = None if arguments.no_clip else CLIP_NORM
        return Resident(workload, activations=arguments.activations, clip_norm=clip_norm, device=arguments.device)

    if arguments.serve:
        serve(lambda: ResidentSide(start(), workload))
        return
    resident = start()
    for number in range(arguments.steps + 1):
        resident.seconds.clear()
        batches = workload.batches(number)
        started = time.perf_counter()
        loss = resident.step(batches)
        phases = "  ".join(f"{name} {value:.3f}" for name, value in resident.seconds.items())
        print(
            f"{'warm-up' if number == 0 else 'step'} {time.perf_counter() - started:.3f} s  loss {loss:.4f}  {phases}"
        )


class ResidentSide:
    """The control as a side of a comparison (`turns.serve`)."""

    def __init__(self, resident: Resident, workload: Workload) -> None:
        self.resident, self.workload, self.number = resident, workload, 0

    def step(self) -> dict:
        self.number += 1
        loss = self.resident.step(self.workload.batches(self.number))
        return {"loss": loss, "phases": dict(self.resident.seconds)}

    def close(self) -> dict:
        return {}


if __name__ == "__main__":
    main()
