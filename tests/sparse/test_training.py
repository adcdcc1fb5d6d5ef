"""Sparse training from end to end, against masked dense training in plain PyTorch.

`Reference` imports nothing of weightstream: dense tensors with zeros, autograd on them, one `torch.optim.AdamW` for each
vector of non-zeros, masks changed by sorting. What it must equal is equal in every bit.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tests.parity.reference import square_sum, tree_sum
from torch import Tensor, nn

import weightstream as ws
from weightstream.cluster import Cluster
from weightstream.errors import ConfigError, StoreMismatchError
from weightstream.fabric.links import Links
from weightstream.fabric.local import run_ranks

VOCABULARY, WIDTH, INNER = 40, 32, 192
PANEL = 2048  # elements: 64 rows of `up` (192 x 32), and all of what is smaller or has too short rows
SEED, MICRO_BATCHES, LR, DECAY = 5, 3, 3e-3, 0.1
Key = tuple[str, int]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    """How the reference's masks change; `kept(step, cells)` is how many cells a piece has after a step."""

    algorithm: str = "static"
    kept: Callable[[int, int], int] = lambda step, cells: cells - round(0.8 * cells)
    begin: int = 0
    end: int = 0
    every: int = 1
    drop: float = 0.3

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

    def __post_init__(self) -> None:
        self.model = Model().to(self.dtype)
        self.masks: dict[Key, Tensor] = {}
        self.vectors: dict[Key, nn.Parameter] = {}
        self.optimizers: dict[Key, torch.optim.AdamW] = {}
        self.counts: dict[Key, int] = {}
        for name, value in self.masters.items():
            first = 0
            for row, piece in self.rows(name, value):
                count = self.rules.kept(0, piece.numel()) if is_sparse(name) else piece.numel()
                chosen = torch.ones(piece.numel(), dtype=torch.bool)
                if count < piece.numel():
                    chosen.zero_()
                    chosen[torch.from_numpy(first_by(random_order(name, 0, first, piece.numel()), count))] = True
                first += piece.numel()
                self.masks[name, row] = chosen.view(piece.shape)
                self.begin((name, row), piece[self.masks[name, row]])
        self.write_back()

    @staticmethod
    def rows(name: str, value: Tensor) -> list[tuple[int, Tensor]]:
        pieces, found, row = pieces_of(name, value), [], 0
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
                    assert parameter.grad is not None
                    gradient, parameter.grad = parameter.grad.float(), None
                    sums[group][name] = sums[group][name] + gradient if name in sums[group] else gradient
        total = {name: tree_sum([found.get(name) for found in sums]) for name in self.masters}
        found = {}
        for name, value in total.items():
            assert value is not None
            for row, piece in self.rows(name, value):
                whole = is_sparse(name) and self.rules.moves(step) and self.rules.algorithm == "rigl"
                found[name, row] = piece if whole else piece[self.masks[name, row]]
        return loss, found

    def step(self, step: int) -> tuple[float, float]:
        loss, gradients = self.gradients(step)
        squares = 0.0
        for key in sorted(gradients):
            squares += square_sum(gradients[key])
        norm = math.sqrt(squares)
        coefficient = 1.0 if self.clip_norm is None else min(1.0, self.clip_norm / (norm + 1e-6))
        for key, gradient in gradients.items():
            scaled = gradient * coefficient if coefficient < 1.0 else gradient
            self.counts[key] += 1
            moves = is_sparse(key[0]) and self.rules.moves(step)
            if not (moves and self.rules.algorithm == "rigl"):
                self.vectors[key].grad = scaled.view(self.vectors[key].shape)
                self.optimizers[key].step()
            if is_sparse(key[0]):
                cells = self.masks[key].numel()
                target = self.rules.kept(step, cells)
                if target != int(self.masks[key].sum()):
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
            scores = -gradient.abs().flatten().numpy()[free]
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
    chosen = {"patterns": ("*.up.weight", "*.down.weight"), "sparsity": 0.8} | settings
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
    "gmp": (
        group(algorithm="gmp", sparsity=0.9, begin=4, end=24, every=4),
        Rules(algorithm="gmp", kept=gmp, begin=4, end=24, every=4),
    ),
    "phases": (group(dense_until=6, dense_from=20), Rules(kept=phases)),
}


@pytest.mark.parametrize("clip_norm", [None, 0.5], ids=["no clip", "clip"])
@pytest.mark.parametrize("case", CASES)
def test_equals_masked_dense_training(case: str, clip_norm: float | None, tmp_path: Path) -> None:
    sparsity, rules = CASES[case]
    reference = Reference(rules, clip_norm, torch.float32)
    found = train(tmp_path / "store", sparsity, [30], clip_norm=clip_norm)
    assert found == [reference.step(step) for step in range(1, 31)]
    assert_equal_to(reference, tmp_path / "store")
    assert any(not mask.all() for mask in reference.masks.values()) or case == "phases"


def test_equals_masked_dense_training_in_bf16(tmp_path: Path) -> None:
    sparsity, rules = CASES["rigl"]
    reference = Reference(rules, 0.5, torch.bfloat16)
    found = train(tmp_path / "store", sparsity, [30], precision="bf16")
    assert found == [reference.step(step) for step in range(1, 31)]
    assert_equal_to(reference, tmp_path / "store")


@pytest.mark.parametrize("case", CASES)
def test_in_pieces_as_in_one_go_and_in_little_memory(case: str, tmp_path: Path) -> None:
    """Mask updates are at steps 4 and 8 or 5 and 10: just before and just after the store is opened again."""
    sparsity, _ = CASES[case]
    whole = train(tmp_path / "whole", sparsity, [12])
    pieces = train(tmp_path / "pieces", sparsity, [4, 1, 3, 2, 2], ram_tier=False)
    assert pieces == whole
    assert digest(tmp_path / "pieces") == digest(tmp_path / "whole")


CLUSTERS = [Cluster(2), Cluster(4, 1), Cluster(3, 2)]


@pytest.mark.parametrize("case", CASES)
def test_any_cluster_has_the_digest_of_one_rank(case: str, tmp_path: Path) -> None:
    sparsity, _ = CASES[case]
    number = list(CASES).index(case)
    cluster, clip_norm = CLUSTERS[number % 3], (None, 0.5)[number % 2]
    settings = {"precision": "bf16", "clip_norm": clip_norm}

    def work(links: Links) -> list[tuple[float, float]]:
        return train(tmp_path / "ranks", sparsity, [11], 9, cluster=cluster, links=links, **settings)

    alone = train(tmp_path / "alone", sparsity, [11], 9, **settings)
    assert all(found == alone for found in run_ranks(cluster, work, timeout_s=60))
    assert digest(tmp_path / "ranks") == digest(tmp_path / "alone")


class TestRefused:
    def test_another_sparsity(self, tmp_path: Path) -> None:
        train(tmp_path / "store", group(), [1])
        with pytest.raises(StoreMismatchError, match=r"sparsity: the store has .*0\.8.*this run has .*0\.7"):
            open_engine(tmp_path / "store", group(sparsity=0.7))
        with pytest.raises(StoreMismatchError, match="sparsity: the store has .*this run has nothing"):
            open_engine(tmp_path / "store", None)

    def test_an_optimizer_that_looks_at_whole_tensors(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"elements one by one, such as AdamW.*found Adafactor"):
            open_engine(tmp_path / "store", group(), optimizer=ws.Adafactor())

    def test_what_does_not_fit_the_model(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="matches no trainable matrix"):
            open_engine(tmp_path / "store", group(patterns=("*.gate.*",)))
        with pytest.raises(ConfigError, match="do not divide"):
            open_engine(tmp_path / "store", group(block=(5, 1)))
        assert not (tmp_path / "store").exists()


class Tied(Model):
    """Its head is its embedding: two uses of one parameter, in blocks that lie far apart."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embedding.weight


def test_a_tied_parameter_is_summed_over_its_uses(tmp_path: Path) -> None:
    """Against the same mask held by hand: the dense run's first gradient at non-zeros is the sparse run's."""
    sparsity = group(patterns=("embedding.weight",), include_all=True)
    first = {}
    for name, settings in (("sparse", sparsity), ("dense", None)):
        values = initial_values()
        del values["head.weight"]
        if name == "dense":
            values["embedding.weight"] *= first["sparse"]["mask"]
        optimizer = ws.SGD(lr=1.0, momentum=0.9)
        with ws.Engine(Tied, tmp_path / name, optimizer, sparsity=settings, initial=values, seed=SEED) as engine:
            if name == "sparse":
                first[name] = dict(engine.store.items())["embedding.weight"]
            engine.step(micro_batches(1), loss_fn)
            first[name] = dict(engine.store.items())["embedding.weight"]
    mask = first["sparse"]["mask"]
    assert 0.19 < mask.double().mean() < 0.21
    momentum = first["dense"]["momentum_buffer"] * mask
    assert torch.equal(first["sparse"]["momentum_buffer"], momentum)
    assert momentum.abs().max() > 0


def test_masks_by_magnitude_and_from_a_file(tmp_path: Path) -> None:
    train(tmp_path / "magnitude", group(init="magnitude", distribution="erdos_renyi", block=(2, 4)), [0])
    values, kept = initial_values(), {}
    with ws.Store.open(tmp_path / "magnitude", writable=False) as store:
        for name, parts in store.items():
            if is_sparse(name):
                kept[name] = parts["mask"]
                sums = values[name].double().abs().view(values[name].shape[0] // 2, 2, -1, 4).sum((1, 3))
                cells = parts["mask"].view(sums.shape[0], 2, -1, 4).float().mean((1, 3))
                assert set(cells.unique().tolist()) == {0.0, 1.0}
                for panel, chosen in zip(
                    pieces_of(name, sums.repeat_interleave(2, 0)),
                    pieces_of(name, cells.repeat_interleave(2, 0)),
                    strict=True,
                ):
                    assert panel[chosen == 1].min() > panel[chosen == 0].max()
    save_file({name: mask.contiguous() for name, mask in kept.items()}, tmp_path / "masks.safetensors")
    sparsity = group(init=str(tmp_path / "masks.safetensors"), algorithm="rigl", end=9, every=3)
    found = train(tmp_path / "given", sparsity, [0, 2, 3])
    assert train(tmp_path / "whole", sparsity, [5]) == found
    with ws.Store.open(tmp_path / "given", writable=False) as store:
        for name, parts in store.items():
            if is_sparse(name):
                assert parts["mask"].sum() == kept[name].sum()
                assert not torch.equal(parts["mask"], kept[name])  # RigL has moved them
    with pytest.raises(ConfigError, match=r"masks\.safetensors has no mask of 'embedding\.weight'"):
        open_engine(tmp_path / "none", group(init=sparsity.groups[0].init, patterns=("*",), include_all=True))


@pytest.mark.parametrize("clip_norm", [None, 0.5], ids=["no clip", "clip"])
def test_a_skipped_step_skips_its_mask_update_and_counts_are_made_up_for(
    clip_norm: float | None, tmp_path: Path
) -> None:
    sparsity = group(algorithm="gmp", sparsity=0.9, begin=2, end=6, every=2)
    found = {}
    with open_engine(tmp_path / "store", sparsity, clip_norm=clip_norm) as engine:
        for step in range(1, 8):
            bad = [float("inf"), 0.0, 0.0] if step == 4 else None
            skipped = engine.step(micro_batches(step), loss_fn, weights=bad).skipped
            assert skipped == (step == 4)
            engine.commit()
            nonzeros, elements = engine.nonzeros()
            found[step] = nonzeros / elements
            stored = sum(int(parts["mask"].sum()) for _, parts in engine.store.items() if "mask" in parts)
            assert stored in (nonzeros, 0)
    assert found[1] == found[2] == 1.0 == found[3] == found[4]  # the ramp's first change would be that of step 4
    assert found[5] == pytest.approx(1 - 0.9 * (1 - 0.5**3), abs=1e-3)
    assert found[6] == found[7] == pytest.approx(0.1, abs=1e-3)


def test_evaluation_in_between_changes_nothing(tmp_path: Path) -> None:
    sparsity, _ = CASES["gmp"]
    whole = train(tmp_path / "whole", sparsity, [10])
    losses = []
    with open_engine(tmp_path / "looked", sparsity) as engine:
        found = []
        for step in range(1, 11):
            result = engine.step(micro_batches(step), loss_fn)
            found.append((result.loss, result.grad_norm))
            with engine.module() as model:
                losses.append(float(model(micro_batches(99)[0])))
    assert found == whole
    assert digest(tmp_path / "looked") == digest(tmp_path / "whole")
    resident = Model()
    with ws.Store.open(tmp_path / "whole", writable=False) as store:
        for name, parts in store.items():
            resident.get_parameter(name).data = parts["param"]
    with torch.no_grad():
        assert float(resident(micro_batches(99)[0])) == losses[-1]


def test_bytes_are_those_of_the_bound_and_masks_are_reported(tmp_path: Path) -> None:
    """From the disk and to it, once nothing is read ahead of a first step: what `plan` says, and a fraction of dense."""
    settings = {"ram_tier": False, "clip_norm": None, "host_memory": "3MiB", "device_memory": "3MiB"}
    totals = {}
    sparse = {name for name in INITIAL if is_sparse(name)}
    for name, sparsity in (("dense", None), ("sparse", group(algorithm="set", sparsity=0.9, end=9, every=2))):
        with open_engine(tmp_path / name, sparsity, **settings) as engine:
            for step in range(1, 8):
                if step == 6:
                    engine.commit()
                    before = disk_bytes(engine)
                result = engine.step(micro_batches(step), loss_fn)
                assert result.masks.keys() == (sparse if name == "sparse" and step in (2, 4, 6) else set())
                assert all(abs(facts.density - 0.1) < 2e-3 < facts.turnover < 0.3 for facts in result.masks.values())
            engine.commit()
            read, written = (now - then for now, then in zip(disk_bytes(engine), before, strict=True))
            bound = engine.bytes_bound()
            assert (read, written) == (2 * bound.read, 2 * bound.written)
            assert ("sparse            " in engine.plan) == (name == "sparse")
            totals[name] = bound.total
    assert totals["sparse"] < 0.6 * totals["dense"]


def disk_bytes(engine: ws.Engine) -> tuple[int, int]:
    found = [moved for (tier, _), moved in engine.store.counters.items() if tier == "disk"]
    return sum(moved["read"] for moved in found), sum(moved["written"] for moved in found)
