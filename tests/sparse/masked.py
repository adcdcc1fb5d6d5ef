"""A small model that is trained sparsely, and what it has to equal: masked dense training in plain PyTorch.

`Reference` uses nothing of weightstream: dense tensors with zeros, autograd on them, one `torch.optim.AdamW` for each
vector of non-zeros, masks changed by sorting.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tests.parity.reference import square_sum, tree_sum
from torch import Tensor, nn

import weightstream as ws

VOCABULARY, WIDTH, INNER = 40, 32, 192
PANEL = 2048  # elements: 64 rows of `up` (192 x 32), and all of what is smaller or has too short rows
SEED, MICRO_BATCHES, LR, DECAY = 5, 3, 3e-3, 0.1
Key = tuple[str, int]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x))[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def micro_batches(step: int, count: int = MICRO_BATCHES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(0, VOCABULARY, (2, 6 + index), generator=generator) for index in range(count)]


def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens)  # type: ignore[no-any-return]


def _initial_values() -> dict[str, Tensor]:
    torch.manual_seed(SEED)
    return {name: value.detach() for name, value in Model().named_parameters()}


INITIAL = _initial_values()  # made once: ranks that are threads share one generator


def initial_values() -> dict[str, Tensor]:
    return {name: value.clone() for name, value in INITIAL.items()}


def is_sparse(name: str) -> bool:
    return ".up.weight" in name or ".down.weight" in name


def pieces_of(name: str, value: Tensor) -> list[Tensor]:
    """What has a mask of its own: panels of 64 rows of `up`, and of 32 (all) of `down`, which cannot be cut."""
    return list(value.split(64)) if ".up.weight" in name else [value]


def random_order(name: str, step: int, first: int, cells: int) -> np.ndarray[Any, Any]:
    """Random words of the elements [first, first + cells): Philox, keyed by seed, name and step, counted by element."""
    digest = hashlib.sha256(f"weightstream sparse masks\0{SEED}\0{name}\0{step}".encode()).digest()
    words = np.random.Philox(counter=0, key=int.from_bytes(digest[:16], "little")).random_raw(first + cells + 4)
    return np.asarray(words[first : first + cells])


def first_by(keys: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """Positions of the `count` smallest, of equal ones the lower."""
    return np.argsort(keys, kind="stable")[:count]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How the reference's masks change; `kept(step, cells)` is how many cells a piece has after a step, `together` how
    many all pieces have, where the largest of all of them stay."""

    algorithm: str = "static"
    kept: Callable[[int, int], int] = lambda step, cells: cells - round(0.8 * cells)
    together: Callable[[int, int], int] | None = None
    begin: int = 0
    end: int = 0
    every: int = 1
    drop: float = 0.3
    relative: bool = False

    def moves(self, step: int) -> bool:
        moving = self.algorithm in ("set", "rigl") and self.begin <= step < self.end
        return moving and (step - self.begin) % self.every == 0

    def fraction(self, step: int) -> float:
        return self.drop * 0.5 * (1.0 + math.cos(math.pi * (step - self.begin) / (self.end - self.begin)))


@dataclass
class Reference:
    """Masked dense training in memory."""

    rules: Rules
    clip_norm: float | None
    dtype: torch.dtype
    masters: dict[str, Tensor] = field(default_factory=initial_values)
    build: Callable[[], nn.Module] = Model
    sparse: Callable[[str], bool] = is_sparse
    cut: Callable[[str, Tensor], list[Tensor]] = pieces_of

    def __post_init__(self) -> None:
        self.model = self.build().to(self.dtype)
        self.masks: dict[Key, Tensor] = {}
        self.vectors: dict[Key, nn.Parameter] = {}
        self.optimizers: dict[Key, torch.optim.AdamW] = {}
        self.counts: dict[Key, int] = {}
        for name, value in self.masters.items():
            first = 0
            for row, piece in self.rows(name, value):
                count = self.rules.kept(0, piece.numel()) if self.sparse(name) else piece.numel()
                count = count if self.rules.together is None else piece.numel()
                chosen = torch.ones(piece.numel(), dtype=torch.bool)
                if count < piece.numel():
                    chosen.zero_()
                    chosen[torch.from_numpy(first_by(random_order(name, 0, first, piece.numel()), count))] = True
                first += piece.numel()
                self.masks[name, row] = chosen.view(piece.shape)
                self.begin((name, row), piece[self.masks[name, row]])
        for key, mask in self.pruned(0).items():
            self.move(key, mask)
        self.write_back()

    def pruned(self, step: int) -> dict[Key, Tensor]:
        """The masks in which the largest of all pieces' cells are left, and the largest of each; none if there are no more."""
        if self.rules.together is None:
            return {}
        keys = sorted(key for key in self.masks if self.sparse(key[0]))
        wanted = self.rules.together(step, sum(self.masks[key].numel() for key in keys))
        sizes = [self.vectors[key].detach().abs().view(-1).numpy().copy() for key in keys]
        if wanted >= sum(size.size for size in sizes):
            return {}
        for size in sizes:
            size[size.argmax()] = np.inf
        stays = np.zeros(sum(size.size for size in sizes), np.bool_)
        stays[first_by(-np.concatenate(sizes), max(wanted, len(keys)))] = True
        found, start = {}, 0
        for key, size in zip(keys, sizes, strict=True):
            found[key] = self.masks[key].clone()
            found[key][self.masks[key]] = torch.from_numpy(stays[start : start + size.size])
            start += size.size
        return found

    def rows(self, name: str, value: Tensor) -> list[tuple[int, Tensor]]:
        pieces, found, row = self.cut(name, value), [], 0
        for piece in pieces:
            found.append((row, piece))
            row += piece.shape[0]
        return found

    def begin(self, key: Key, values: Tensor, moments: tuple[Tensor, Tensor] | None = None) -> None:
        name, _ = key
        matrix = self.masters[name].ndim > 1
        self.vectors[key] = nn.Parameter(values.clone().view(-1, 1) if matrix else values.clone())
        optimizer = torch.optim.AdamW(
            [self.vectors[key]], lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY if matrix else 0.0, fused=True
        )
        self.optimizers[key] = optimizer
        self.counts.setdefault(key, 0)
        if moments is not None:
            averages = dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True))
            optimizer.state[self.vectors[key]] = {"step": torch.tensor(float(self.counts[key])), **averages}

    def write_back(self) -> None:
        for name, value in self.masters.items():
            for row, piece in self.rows(name, value):
                piece.zero_()
                piece[self.masks[name, row]] = self.vectors[name, row].detach().view(-1)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.masters[name])

    def gradients(self, step: int) -> tuple[float, dict[Key, Tensor]]:
        batch = micro_batches(step)
        rows = [each.shape[0] for each in batch]
        groups = 8
        sums: list[dict[str, Tensor]] = [{} for _ in range(groups)]
        loss = 0.0
        for group in range(groups):
            for index in range(group * len(batch) // groups, (group + 1) * len(batch) // groups):
                weight = rows[index] / sum(rows)
                value = loss_fn(self.model, batch[index])
                (value * weight).backward()
                loss += weight * value.item()
                for name, parameter in self.model.named_parameters():
                    if parameter.grad is None:  # an expert that no token of this micro-batch went to
                        continue
                    gradient, parameter.grad = parameter.grad.float(), None
                    sums[group][name] = sums[group][name] + gradient if name in sums[group] else gradient
        total = {name: tree_sum([found.get(name) for found in sums]) for name in self.masters}
        found = {}
        for name, value in total.items():
            assert value is not None
            for row, piece in self.rows(name, value):
                whole = self.sparse(name) and self.rules.moves(step) and self.rules.algorithm == "rigl"
                found[name, row] = piece if whole else piece[self.masks[name, row]]
        return loss, found

    def step(self, step: int) -> tuple[float, float]:
        loss, gradients = self.gradients(step)
        squares = 0.0
        for key in sorted(gradients):
            squares += square_sum(gradients[key])
        norm = math.sqrt(squares)
        coefficient = 1.0 if self.clip_norm is None else min(1.0, self.clip_norm / (norm + 1e-6))
        pruned = self.pruned(step)  # by the weights that the step began with
        for key, gradient in gradients.items():
            scaled = gradient * coefficient if coefficient < 1.0 else gradient
            self.counts[key] += 1
            moves = self.sparse(key[0]) and self.rules.moves(step)
            if not (moves and self.rules.algorithm == "rigl"):
                self.vectors[key].grad = scaled.view(self.vectors[key].shape)
                self.optimizers[key].step()
            if self.sparse(key[0]):
                cells = self.masks[key].numel()
                present = int(self.masks[key].sum())
                target = self.rules.kept(step, cells) if self.rules.together is None else present
                if key in pruned:
                    self.move(key, pruned[key])
                elif target != present:
                    self.move(key, self.resized(key, target, step))
                elif moves:
                    self.move(key, self.moved(key, scaled, step))
                else:
                    self.count(key)
        self.write_back()
        return loss, norm

    def count(self, key: Key) -> None:
        state = self.optimizers[key].state[self.vectors[key]]
        assert float(state["step"]) == self.counts[key]

    def resized(self, key: Key, target: int, step: int) -> Tensor:
        mask, existing = self.masks[key].flatten(), self.masks[key].flatten().nonzero().view(-1)
        new = torch.zeros_like(mask)
        if target > existing.numel():
            new.copy_(mask)
            free = np.flatnonzero(~mask.numpy())
            grown = free[
                first_by(random_order(key[0], step, self.first(key), mask.numel())[free], target - existing.numel())
            ]
            new[torch.from_numpy(grown)] = True
        elif self.rules.algorithm != "gmp" and existing.numel() == mask.numel():
            new[torch.from_numpy(first_by(random_order(key[0], step, self.first(key), mask.numel()), target))] = True
        else:
            size = -self.vectors[key].detach().abs().view(-1).numpy()
            new[existing[torch.from_numpy(first_by(size, target))]] = True
        return new.view(self.masks[key].shape)

    def first(self, key: Key) -> int:
        return key[1] * self.masks[key][0].numel()

    def moved(self, key: Key, gradient: Tensor, step: int) -> Tensor:
        fraction = self.rules.fraction(step)
        mask = self.masks[key].flatten()
        existing = mask.nonzero().view(-1).numpy()
        values = self.vectors[key].detach().view(-1).numpy()
        survivors = []
        sides = [np.arange(values.size)]
        if self.rules.algorithm == "set":
            sides = [np.flatnonzero(values < 0), np.flatnonzero(values >= 0)]
        for side in sides:
            keep = side.size - int(fraction * side.size)
            survivors.append(side[first_by(-np.abs(values[side]), keep)])
        stays = existing[np.concatenate(survivors)]
        new = torch.zeros_like(mask)
        new[torch.from_numpy(stays)] = True
        free = np.flatnonzero(~new.numpy())
        if self.rules.algorithm == "rigl":
            size = gradient.abs().view(gradient.shape[0], -1).numpy().astype(np.float64)
            if self.rules.relative:
                rows, columns = (np.sqrt(np.cumsum(size**2, axis=axis)) for axis in (1, 0))  # one after the other
                size = size / np.where(rows[:, -1:] > 0, rows[:, -1:], 1) / np.where(columns[-1:] > 0, columns[-1:], 1)
            scores = -size.astype(np.float32).flatten()[free]
        else:
            scores = random_order(key[0], step, self.first(key), mask.numel())[free]
        new[torch.from_numpy(free[first_by(scores, existing.size - stays.size)])] = True
        return new.view(self.masks[key].shape)

    def move(self, key: Key, new: Tensor) -> None:
        """Survivors keep value and moments, what is new begins at zero."""
        old = self.masks[key]
        state = self.optimizers[key].state[self.vectors[key]]
        found = []
        for vector in (self.vectors[key].detach(), *(state[n] if state else None for n in ("exp_avg", "exp_avg_sq"))):
            dense = torch.zeros(old.shape)
            if vector is not None:
                dense[old] = vector.view(-1)
            dense[~new] = 0.0
            found.append(dense[new].view(-1, 1))
        self.masks[key] = new
        self.begin(key, found[0], (found[1], found[2]))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Dense masters, moments and masks by name."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, value in self.masters.items():
            parts = {part: torch.zeros_like(value) for part in ("param", "exp_avg", "exp_avg_sq")}
            parts["mask"] = torch.zeros_like(value, dtype=torch.bool)
            for row, piece in self.rows(name, value):
                mask, vector = self.masks[name, row], self.vectors[name, row]
                rows = slice(row, row + piece.shape[0])
                parts["mask"][rows] = mask
                state = self.optimizers[name, row].state[vector]
                for part, values in (("param", vector.detach()), *((n, state[n]) for n in ("exp_avg", "exp_avg_sq"))):
                    parts[part][rows][mask] = values.view(-1)
            found[name] = parts
        return found


def group(**settings: Any) -> ws.Sparsity:
    chosen = {"patterns": ("*.up.weight", "*.down.weight"), "sparsity": 0.8, "init": "random"} | settings
    return ws.Sparsity((ws.SparsityGroup(**chosen),))


def open_engine(store: Path, sparsity: ws.Sparsity | None, **settings: Any) -> ws.Engine:
    optimizer = settings.pop("optimizer", ws.AdamW(lr=LR, weight_decay=DECAY))
    chosen = {"clip_norm": 0.5, "threads_per_worker": 1, "seed": SEED, "panel_elements": PANEL} | settings
    return ws.Engine(Model, store, optimizer, sparsity=sparsity, initial=initial_values(), **chosen)


def train(
    store: Path, sparsity: ws.Sparsity | None, pieces: Sequence[int], count: int = MICRO_BATCHES, **settings: Any
) -> list[tuple[float, float]]:
    found = []
    for steps in pieces:
        with open_engine(store, sparsity, **settings) as engine:
            for _ in range(steps):
                result = engine.step(micro_batches(engine.step_count + 1, count), loss_fn)
                found.append((result.loss, result.grad_norm))
    return found


def digest(path: Path) -> str:
    with ws.Store.open(path, writable=False) as store:
        assert store.verify() == []
        return store.digest()


def assert_equal_to(reference: Reference, path: Path) -> None:
    expected = reference.state()
    with ws.Store.open(path, writable=False) as store:
        found: Mapping[str, Mapping[str, Tensor]] = dict(store.items())
    assert found.keys() == expected.keys()
    for name, parts in expected.items():
        mask = found[name].get("mask", torch.ones_like(parts["mask"]))
        assert torch.equal(mask, parts["mask"]), name
        for part in ("param", "exp_avg", "exp_avg_sq"):
            assert torch.equal(found[name][part], parts[part]), (name, part)


KEPT = Rules().kept


def gmp(step: int, cells: int) -> int:
    """From dense to 90% along the cubic of Zhu and Gupta between steps 4 and 24, every fourth step."""
    at = min(max(step, 4), 24)
    at -= (at - 4) % 4
    sparsity = 0.9 - 0.9 * (1.0 - (at - 4) / 20) ** 3
    return max(1, cells - round(sparsity * cells))


def phases(step: int, cells: int) -> int:
    return KEPT(step, cells) if 6 <= step < 20 else cells


MOVING = {"begin": 0, "end": 26, "every": 5}
CASES: dict[str, tuple[ws.Sparsity, Rules]] = {
    "static": (group(), Rules()),
    "set": (group(algorithm="set", **MOVING), Rules(algorithm="set", **MOVING)),  # type: ignore[arg-type]
    "rigl": (group(algorithm="rigl", **MOVING), Rules(algorithm="rigl", **MOVING)),  # type: ignore[arg-type]
    "relative_rigl": (
        group(algorithm="rigl", grow_by="relative_gradient", **MOVING),
        Rules(algorithm="rigl", relative=True, **MOVING),  # type: ignore[arg-type]
    ),
    "gmp": (
        group(algorithm="gmp", sparsity=0.9, begin=4, end=24, every=4),
        Rules(algorithm="gmp", kept=gmp, begin=4, end=24, every=4),
    ),
    "phases": (group(dense_until=6, dense_from=20), Rules(kept=phases)),
    "global_gmp": (
        group(algorithm="gmp", distribution="global", sparsity=0.9, begin=4, end=24, every=4),
        Rules(algorithm="gmp", together=gmp, begin=4, end=24, every=4),
    ),
    "global_rigl": (
        group(algorithm="rigl", distribution="global", init="magnitude", sparsity=0.8, **MOVING),
        Rules(algorithm="rigl", together=KEPT, **MOVING),  # type: ignore[arg-type]
    ),
}
