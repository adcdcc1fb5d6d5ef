"""Why RigL trains no better than SET here: masked dense training in plain PyTorch, one thing changed at a time.

    python benchmarks/sparse_growth.py --json                          # all runs that are not done yet, then the result
    python benchmarks/sparse_growth.py --only static-0 rigl-0 --json   # these, and a result of these

The setting is that of `sparse_quality.py` (same text, order of batches, model, schedules of learning rate and drop
fraction) in a smaller model, so that many arms can be paid for. Nothing is streamed and nothing of the engine is used:
most of what arms change `sparsity:` has no setting for. That the engine's RigL equals such a reference bit for bit is
tested elsewhere (`tests/sparse/test_training.py`). On one seed all arms begin with the same values and the same masks
and see the same batches, so that they can be told apart by less than what seeds differ by.

Keys: `loss` (by arm: held-out loss at the end, mean and by seed), `above_static` (the same, less that of the mask that
stays, on the same seed), `trained` (by run: `validation`, held-out loss over time; `updates`, at each mask update the part
of what exists that is `new`, of what is new the part that lies in the tenth of the rows (`crowded_rows`) and columns with
most of it, of what was grown by the update before the part that is dropped `again`, of what is grown the part on which
the gradient of as much other text `agreed`; `explored`, the part of all cells that ever existed; `thin`, in the end the
part of rows and of columns with less than half of the mean number of cells).
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from results import SCRATCH, provenance, write
from scratch import lasting
from sparse_quality import (
    BETAS,
    CLIP_NORM,
    WEIGHT_DECAY,
    add_setting,
    asked_for,
    config_of,
    group_of,
    is_layer_matrix,
    require_same_settings,
    setting_of,
)
from torch import Tensor, nn

from weightstream.config.architectures import architecture
from weightstream.data.batches import Batches, in_portions, micro_batch
from weightstream.data.dataset import Dataset, prepare
from weightstream.store.schedules import cosine

NAME = "sparse_growth"
EPS = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to train; an arm that only says what it is, is RigL as `sparse_quality.py` runs it."""

    what: str
    grow: Literal["gradient", "random", "spread", "none"] = "gradient"
    """`spread` divides each |gradient| by the root mean squares of its row and of its column; `none` leaves masks alone."""
    steps_at_updates: bool = False
    """Whether the optimizer's step is made at mask updates, too."""
    batches: int = 1
    """Of how many steps' text the gradient is that cells are grown by; what exceeds one is text that is not trained on."""
    own_age: bool = False
    """Whether what is grown has Adam's bias corrected by its own age instead of the number of steps."""
    drop: float = 1.0
    every: int = 1
    """Factors of the drop fraction, and of the interval of mask updates."""


ARMS = {
    "static": Arm(what="mask that stays", grow="none", steps_at_updates=True),
    "static_without_steps": Arm(what="mask that stays, without the steps at which RigL makes none", grow="none"),
    "set": Arm(what="random growth, no step lost (SET)", grow="random", steps_at_updates=True),
    "rigl": Arm(what="RigL"),
    "rigl_with_steps": Arm(what="RigL that makes these steps, too", steps_at_updates=True),
    "rigl_8_batches": Arm(what="RigL by the gradient of 8 times the text", batches=8),
    "rigl_own_age": Arm(what="RigL, bias of what is grown corrected by its age", own_age=True),
    "rigl_spread": Arm(what="RigL by gradients relative to their row and column", grow="spread"),
    "rigl_drop_third": Arm(what="RigL, a third of the drop fraction", drop=1 / 3),
    "rigl_every_third": Arm(what="RigL, a third of the mask updates", every=3),
}


@dataclass
class Matrix:
    """A parameter with its fp32 master, a mask and Adam's moments; all are zero where the mask is."""

    parameter: nn.Parameter
    weight: Tensor
    mask: Tensor
    sparse: bool
    decay: float
    average: Tensor = field(init=False)
    square: Tensor = field(init=False)
    age: Tensor = field(init=False)
    """Steps since a cell came to exist."""
    ever: Tensor = field(init=False)
    grown: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.weight.mul_(self.mask)
        self.average, self.square, self.age = (torch.zeros_like(self.weight) for _ in range(3))
        self.ever, self.grown = self.mask.clone(), torch.zeros_like(self.mask)
        self.parameter.data.copy_(self.weight)

    def step(self, gradient: Tensor, lr: float, count: int, *, own_age: bool) -> None:
        """AdamW (Loshchilov and Hutter, 2019)."""
        gradient = gradient * self.mask
        self.age += 1
        self.average.lerp_(gradient, 1 - BETAS[0])
        self.square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        bias, square_bias = (1 - beta ** (self.age if own_age else torch.tensor(float(count))) for beta in BETAS)
        self.weight.mul_(1 - lr * self.decay)
        self.weight.sub_(lr * (self.average / bias) / (self.square / square_bias).sqrt_().add_(EPS))
        self.parameter.data.copy_(self.weight)

    def move(self, scores: Tensor, others: Tensor | None, fraction: float) -> dict[str, float]:
        """Drops the smallest and grows as many, those of the largest scores; what that did.

        Args:
            others: scores from other text.
        """
        count = int(self.mask.sum())
        dropped = int(fraction * count)
        kept = _largest(self.weight.abs().masked_fill(~self.mask, -1), count - dropped)
        chosen = _largest(scores.masked_fill(kept, -1), dropped)
        mask = kept | chosen
        new = mask & ~self.mask
        found = {
            "new": int(new.sum()) / count,
            "crowded_rows": _crowded(new.sum(1)),
            "crowded_columns": _crowded(new.sum(0)),
        }
        if self.grown.any():
            found["again"] = float((self.grown & ~mask).sum() / self.grown.sum())
        if others is not None and dropped:
            found["agreed"] = float((chosen & _largest(others.masked_fill(kept, -1), dropped)).sum() / dropped)
        for values in (self.weight, self.average, self.square, self.age):
            values[~mask | new] = 0.0
        self.parameter.data.copy_(self.weight)
        self.mask, self.grown, self.ever = mask, new, self.ever | mask
        return found


def _largest(scores: Tensor, count: int) -> Tensor:
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.reshape(-1).topk(count).indices] = True
    return chosen.view_as(scores)


def _crowded(counts: Tensor) -> float:
    """The part that lies in the tenth of the lines with most of it."""
    return float(counts.sort(descending=True).values[: max(1, len(counts) // 10)].sum() / counts.sum().clamp(min=1))


@dataclass
class Text:
    """What steps train on, what is held out, and what is neither."""

    dataset: Dataset
    seed: int
    steps: int
    sequences: int
    length: int
    held_out: int

    def __post_init__(self) -> None:
        train = self.dataset.train_sequences(self.length, at_least=self.sequences)
        order = self.dataset.order(train, self.seed)
        self._batches = Batches(sequences=train, order=order, count=1, size=self.sequences)
        self._validation = self.dataset.validation_sequences(self.length)

    def batch(self, step: int) -> Tensor:
        ids: Tensor = self._batches.at((step - 1) * self.sequences)[0]["input_ids"]
        return ids

    def further(self, number: int) -> Tensor:
        """Batches that come after those of the last step, in order."""
        return self.batch(self.steps + 1 + number)

    def held_out_loss(self, model: nn.Module) -> float:
        total, targets = 0.0, 0
        with torch.no_grad():
            for indices in in_portions(self._validation, self.held_out, self.sequences):
                ids = micro_batch(self._validation, indices)["input_ids"]
                total += float(loss_of(model, ids)) * ids[:, 1:].numel()
                targets += ids[:, 1:].numel()
        return total / targets


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


class Training:
    """A model that is trained as an arm says."""

    def __init__(self, arm: Arm, model: nn.Module, text: Text, lr: float, dtype: torch.dtype) -> None:
        group = group_of("rigl", text.steps)
        assert group is not None
        self.arm, self.model, self.text, self.dtype = arm, model, text, dtype
        self.sparsity, self.drop = group["sparsity"], group["drop_fraction"] * arm.drop
        self.every, self.end = group["every"] * arm.every, group["end"]
        self.lr = cosine(lr, warmup=text.steps // 20, steps=text.steps, end=lr / 10)
        self.updates: list[dict[str, float]] = []
        self._further = 0
        self._generator = torch.Generator().manual_seed(1000 + text.seed)  # draws the masks first: alike for all arms
        self.matrices = [self._matrix(name, parameter) for name, parameter in model.named_parameters()]

    def _matrix(self, name: str, parameter: nn.Parameter) -> Matrix:
        mask, sparse = torch.ones_like(parameter, dtype=torch.bool), is_layer_matrix(name)
        if sparse:
            order = torch.randperm(mask.numel(), generator=self._generator)
            mask.view(-1)[order[: round(self.sparsity * mask.numel())]] = False
        master = parameter.detach().clone()
        parameter.data = parameter.data.to(self.dtype)
        return Matrix(parameter, master, mask, sparse, WEIGHT_DECAY if parameter.dim() > 1 else 0.0)

    def step(self, step: int) -> None:
        """The optimizer's, or that of the masks, or both."""
        arm = self.arm
        moves = step < self.end and step % self.every == 0
        by_gradient = moves and arm.grow in ("gradient", "spread")
        gradients = self._gradients(self.text.batch(step))
        squares = [
            float((one if by_gradient else one * matrix.mask).double().square().sum())
            for one, matrix in zip(gradients, self.matrices, strict=True)
        ]
        factor = min(1.0, CLIP_NORM / (math.sqrt(sum(squares)) + 1e-6))
        for one, matrix in zip(gradients, self.matrices, strict=True):
            if arm.steps_at_updates or not (moves and matrix.sparse):
                matrix.step(one * factor, self.lr(step), step, own_age=arm.own_age)
        if moves and arm.grow != "none":
            self._move(step, gradients, by_gradient)

    def _gradients(self, ids: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss_of(self.model, ids), [matrix.parameter for matrix in self.matrices])
        return [gradient.float() for gradient in found]

    def _move(self, step: int, gradients: list[Tensor], by_gradient: bool) -> None:
        """New masks; what that did is noted, as the mean over matrices."""
        others: Sequence[Tensor | None] = [None] * len(gradients)
        if by_gradient:
            others = self._gradients(self._more_text())
            for _ in range(1, self.arm.batches):
                further = self._gradients(self._more_text())
                gradients = [one + two for one, two in zip(gradients, further, strict=True)]
        fraction = self.drop * 0.5 * (1 + math.cos(math.pi * step / self.end))
        found = [
            matrix.move(self._scores(one), None if other is None else self._scores(other), fraction)
            for matrix, one, other in zip(self.matrices, gradients, others, strict=True)
            if matrix.sparse
        ]
        keys = dict.fromkeys(key for one in found for key in one)
        self.updates.append({"step": step} | {key: mean(one[key] for one in found if key in one) for key in keys})

    def _more_text(self) -> Tensor:
        self._further += 1
        return self.text.further(self._further - 1)

    def _scores(self, gradient: Tensor) -> Tensor:
        """What cells are grown by; none is below zero."""
        if self.arm.grow == "random":
            return torch.rand(gradient.shape, generator=self._generator)
        size = gradient.abs()
        if self.arm.grow == "spread":
            square = size.square()
            size = size / (square.mean(1, keepdim=True) * square.mean(0)).sqrt().add(1e-30)
        return size

    def thin(self) -> dict[str, float]:
        """The part of lines with less than half of the cells that lines have in the mean, over all sparse matrices."""
        found = {}
        for line, axis in (("rows", 1), ("columns", 0)):
            parts = [matrix.mask.sum(axis) / matrix.mask.shape[axis] for matrix in self.matrices if matrix.sparse]
            thin = [(part < 0.5 * part.mean()).float().mean().item() for part in parts]
            found[line] = mean(thin)
        return found

    def explored(self) -> float:
        sparse = [matrix for matrix in self.matrices if matrix.sparse]
        return sum(int(matrix.ever.sum()) for matrix in sparse) / sum(matrix.ever.numel() for matrix in sparse)


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    names = asked_for(arguments.only, [f"{arm}-{seed}" for seed in range(arguments.seeds) for arm in ARMS])
    with lasting(arguments.scratch, NAME) as folder:
        require_same_settings(folder, settings(arguments))
        for name in names:
            if not (folder / f"{name}.json").exists():
                train(name, arguments, folder)
        runs = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names]
        result = {"benchmark": NAME} | settings(arguments) | findings(runs) | provenance(arguments.seeds)
        write(NAME, result, as_json=arguments.json, record=not arguments.no_record)
        if not arguments.only:
            shutil.rmtree(folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser, layers=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", default=[], metavar="RUN", help="the runs of the result, such as rigl-0")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder for finished runs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="keep nothing under results/")
    return parser.parse_args()


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all runs have in common, and decides what they come to."""
    own = {"precision": arguments.precision, "threads": arguments.threads, "group": group_of("rigl", arguments.steps)}
    return setting_of(arguments) | own


def train(name: str, arguments: argparse.Namespace, folder: Path) -> None:
    """One arm on one seed, from its beginning to its end; what it found is kept."""
    arm, _, seed = name.rpartition("-")
    began_s = time.monotonic()
    config = config_of(f"dense-{seed}", arguments, folder)
    dataset = prepare(config.data, folder / "data", base=Path.cwd())
    tokenizer = dataset.tokenizer
    _, build = architecture(config.model, vocabulary=tokenizer.size, end_of_text=tokenizer.end_of_text)
    torch.manual_seed(int(seed))
    model = build()
    text = Text(dataset, int(seed), arguments.steps, arguments.sequences, arguments.length, arguments.held_out)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
    run = Training(ARMS[arm], model, text, arguments.lr, dtype)
    every = max(1, arguments.steps // arguments.evaluations)
    validation = []
    for step in range(1, arguments.steps + 1):
        run.step(step)
        if step % every == 0 or step == arguments.steps:
            validation.append([step, text.held_out_loss(model)])
    found = {
        "arm": arm, "seed": int(seed), "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss": validation[-1][1], "validation": validation, "updates": run.updates, "explored": run.explored(),
        "thin": run.thin(), "commit": provenance(1)["commit"],
    }  # fmt: skip
    unfinished = folder / f"{name}.unfinished"
    unfinished.write_text(json.dumps(found), encoding="utf-8")
    unfinished.replace(folder / f"{name}.json")
    print(f"{name}: {found['loss']:.4f}, {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)


def findings(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Runs, and their losses by arm, with those seeds that there are."""
    losses: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
    for run in runs:
        losses[run["arm"]][run["seed"]] = run["loss"]
    static = losses["static"]
    above = {
        arm: {seed: loss - static[seed] for seed, loss in found.items() if seed in static}
        for arm, found in losses.items()
    }
    return {
        "parameters": runs[0]["parameters"],
        "arms": {arm: facts.what for arm, facts in ARMS.items() if losses[arm]},
        "loss": {arm: _by_seed(found) for arm, found in losses.items() if found},
        "above_static": {arm: _by_seed(found) for arm, found in above.items() if found},
        "trained": list(runs),
    }


def _by_seed(found: dict[int, float]) -> dict[str, Any]:
    return {"mean": mean(found.values()), "by_seed": {str(seed): value for seed, value in sorted(found.items())}}


if __name__ == "__main__":
    main()
