"""Each algorithm against dense tensors with masks, and schedules against their definitions."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from weightstream.blocks import Parameter
from weightstream.errors import ConfigError
from weightstream.sparse.algorithms import initial_mask, turn, update
from weightstream.sparse.codec import Places, gather
from weightstream.sparse.masks import Keys, Mask, largest, magnitude_keys, random_keys
from weightstream.sparse.pieces import SparsePiece, dense_by_default, erdos_renyi, sparse_pieces
from weightstream.sparse.section import SparsityConfig
from weightstream.sparse.settings import Ramp, Sparsity, SparsityGroup
from weightstream.sparse.threshold import kept_counts

SHAPE, STEPS, SEED, NAME = (24, 20), 30, 11, "layers.0.weight"
CASES: dict[str, dict[str, Any]] = {
    "static": {"algorithm": "static", "sparsity": 0.8},
    "phases": {"algorithm": "static", "sparsity": 0.75, "dense_until": 5, "dense_from": 20, "init": "magnitude"},
    "gmp": {"algorithm": "gmp", "sparsity": 0.8, "begin": 3, "end": 24, "every": 5},
    "set": {"algorithm": "set", "sparsity": 0.8, "end": 28, "every": 5},
    "rigl": {"algorithm": "rigl", "sparsity": 0.8, "end": 28, "every": 5},
}


def piece_of(**settings: Any) -> SparsePiece:
    group = SparsityGroup(patterns=("*",), **settings)
    return sparse_pieces(Sparsity((group,)), [Parameter(NAME, SHAPE)])[0]


def ordered(scores: Tensor, candidates: list[int], count: int) -> list[int]:
    """The `count` candidates of largest score; of equal ones the lower index."""
    return sorted(candidates, key=lambda index: (-float(scores[index]), index))[:count]


class Reference:
    """Dense weights, moments and gradients with masks; torch's own fused optimizer on what a mask selects.

    Not on the dense tensor: its vector loop and the scalar one for what is left at the end round differently, so that an
    element's bits depend on where in its tensor it stands.
    """

    def __init__(self, case: str, start: Tensor, mask: Tensor, optimizer: str) -> None:
        self.case, self.mask, self.kind = case, mask.clone(), optimizer
        self.weight = start * mask
        self.states: dict[str, Tensor] = {}

    def _optimize(self, gradient: Tensor) -> None:
        where = self.mask.bool()
        leaf = torch.nn.Parameter(self.weight[where].view(-1, 1))
        leaf.grad = gradient[where].view(-1, 1)
        options = {"momentum": 0.9} if self.kind == "SGD" else {}
        optimizer = getattr(torch.optim, self.kind)([leaf], lr=0.05, weight_decay=0.1, fused=True, **options)
        if self.states:
            optimizer.state[leaf] = {
                name: state[where].view(-1, 1) if state.shape == SHAPE else state for name, state in self.states.items()
            }
        optimizer.step()
        self.weight[where] = leaf.detach().view(-1)
        for name, state in optimizer.state[leaf].items():
            if state.shape == leaf.shape:
                self.states.setdefault(name, torch.zeros(SHAPE))[where] = state.view(-1)
            else:
                self.states[name] = state

    def step(self, step: int, gradient: Tensor) -> None:
        moves = step % 5 == 0 and step < 28
        if not (self.case == "rigl" and moves):
            self._optimize(gradient)
        if self.case in ("set", "rigl") and moves:
            self._replace(step, gradient)
        if self.case == "gmp" and (step in (3, 8, 13, 18, 23) or step == 24):
            sparsity = 0.8 * (1 - (1 - (step - 3) / 21) ** 3)
            self._keep(self.weight.numel() - round(sparsity * self.weight.numel()))
        if self.case == "phases" and step == 5:
            self._keep(120)
        if self.case == "phases" and step == 20:
            self._set(torch.ones_like(self.mask))

    def _existing(self) -> list[int]:
        return [int(index) for index in self.mask.view(-1).nonzero()]

    def _keep(self, count: int) -> None:
        mask = torch.zeros(self.mask.numel())
        mask[ordered(self.weight.abs().view(-1), self._existing(), count)] = 1
        self._set(mask.view(SHAPE))

    def _replace(self, step: int, gradient: Tensor) -> None:
        fraction = 0.3 / 2 * (1 + math.cos(step * math.pi / 28))
        flat, existing = self.weight.view(-1), self._existing()
        if self.case == "rigl":
            kept = ordered(flat.abs(), existing, len(existing) - int(fraction * len(existing)))
            scores = gradient.abs().view(-1)
        else:
            kept = []
            for side in (
                [index for index in existing if flat[index] < 0],
                [index for index in existing if flat[index] >= 0],
            ):
                kept += ordered(flat.abs(), side, len(side) - int(fraction * len(side)))
            scores = -torch.from_numpy(random_keys(SEED, NAME, step, 0, flat.numel()).astype(np.float64))
        free = [index for index in range(flat.numel()) if index not in set(kept)]
        mask = torch.zeros(flat.numel())
        mask[kept + ordered(scores, free, len(existing) - len(kept))] = 1
        self._set(mask.view(SHAPE))

    def _set(self, mask: Tensor) -> None:
        """What does not exist is zero, and has no moments; so what comes to exist begins with zeros."""
        self.mask = mask
        self.weight *= mask
        for state in self.states.values():
            if state.shape == mask.shape:
                state *= mask


class Sparse:
    """The non-zeros alone, as the store would hold them: every step begins from plain tensors."""

    def __init__(self, piece: SparsePiece, start: Tensor, optimizer: str) -> None:
        self.piece, self.kind, self.count = piece, optimizer, 0
        self.mask = initial_mask(piece, start, seed=SEED)
        self.values = gathered(start, self.mask)
        self.states: dict[str, Tensor] = {}

    def step(self, step: int, gradient: Tensor) -> None:
        doing = turn(self.piece, step, self.mask.count)
        if doing.optimizer:
            leaf = torch.nn.Parameter(self.values)
            leaf.grad = gathered(gradient, self.mask)
            cls: Any = getattr(torch.optim, self.kind)
            options = {"momentum": 0.9} if self.kind == "SGD" else {}
            optimizer = cls([leaf], lr=0.05, weight_decay=0.1, fused=True, **options)
            if self.states:
                optimizer.state[leaf] = self.states
            optimizer.step()
            self.values, self.states = leaf.detach(), dict(optimizer.state[leaf])
        if doing.mask:
            dense = gradient if doing.dense_gradient else None
            found = update(self.piece, self.values, self.states, self.mask, dense, step=step, seed=SEED)
            assert int((found.mask.cells != self.mask.cells).sum()) == found.dropped + found.grown
            self.mask, self.values, self.states = found.mask, found.values, found.states
        assert self.mask.count == self.piece.count(step)


def gathered(dense: Tensor, mask: Mask) -> Tensor:
    out = torch.empty(mask.nonzeros, 1)
    gather(dense.contiguous(), Places.of(mask), out)
    return out


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("case", CASES)
def test_thirty_steps_are_those_of_masked_dense_training(case: str, optimizer: str) -> None:
    piece = piece_of(**CASES[case])
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(SHAPE, generator=generator)
    ours = Sparse(piece, start, optimizer)
    theirs = Reference(case, start, ours.mask.dense(SHAPE).float(), optimizer)
    changes = 0
    for step in range(1, STEPS + 1):
        # Coarse gradients, so that many are equal and ties have to be settled.
        gradient = (4 * torch.randn(SHAPE, generator=generator)).round() / 4
        before = ours.mask
        ours.step(step, gradient)
        theirs.step(step, gradient)
        changes += before != ours.mask
        assert torch.equal(ours.mask.dense(SHAPE), theirs.mask.bool()), step
        assert torch.equal(ours.values, gathered(theirs.weight, ours.mask)), step
        for name, state in theirs.states.items():
            if state.shape == SHAPE:
                assert torch.equal(ours.states[name], gathered(state, ours.mask)), (step, name)
    # Of five update steps the first (gmp, from 0) or the last (less than one cell to drop) changes nothing; gmp's at its
    # end rounds to the count that it had one step before.
    assert changes == {"static": 0, "phases": 2, "gmp": 4, "set": 4, "rigl": 4}[case]
    assert piece.count(STEPS) == (480 if case == "phases" else 96)


def test_a_skipped_prune_is_made_up_for_at_the_next_step() -> None:
    piece = piece_of(algorithm="gmp", sparsity=0.5, end=10, every=10)
    values = torch.arange(480.0).view(480, 1)
    assert not turn(piece, 9, 480).mask
    assert turn(piece, 11, 480).mask
    found = update(piece, values, {}, Mask.full(piece.grid), None, step=11, seed=0)
    assert torch.equal(found.values.view(-1), torch.arange(240.0, 480.0))


@pytest.mark.parametrize("algorithm", ["set", "rigl"])
def test_blocks_move_as_wholes_and_keep_their_numbers(algorithm: Any) -> None:
    piece = piece_of(algorithm=algorithm, sparsity=0.5, end=10, every=1, block=(4, 5))
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    mask = initial_mask(piece, None, seed=3)
    values = gathered(start, mask)
    found = update(piece, values, {"m": values * 2}, mask, gradient, step=1, seed=3)
    assert found.mask.count == mask.count == 12
    assert found.dropped == found.grown > 0
    expected = torch.where(mask.dense(SHAPE), start, 0.0)
    assert torch.equal(found.values, gathered(expected, found.mask))
    assert torch.equal(found.states["m"], found.values * 2)
    if algorithm == "rigl":
        sums = gradient.double().abs().view(6, 4, 4, 5).sum((1, 3)).view(-1)
        grown = found.mask.cells & ~mask.cells
        missing = ~(found.mask.cells | mask.cells)
        assert float(sums[torch.from_numpy(grown)].min()) >= float(sums[torch.from_numpy(missing)].max())


@pytest.mark.parametrize("block", [(1, 1), (4, 8)])
@pytest.mark.parametrize("algorithm", ["gmp", "set", "rigl"])
def test_decisions_do_not_depend_on_threads(algorithm: Any, block: tuple[int, int]) -> None:
    """Of a piece that is large enough for torch to divide it between threads."""
    group = SparsityGroup(
        patterns=("*",), algorithm=algorithm, sparsity=0.5, end=8, every=2, block=block, init="magnitude"
    )
    piece = sparse_pieces(Sparsity((group,)), [Parameter(NAME, (512, 256))])[0]
    generator = torch.Generator().manual_seed(9)
    dense, gradient = (torch.randn(512, 256, generator=generator) for _ in range(2))
    found, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            first = initial_mask(piece, dense, seed=SEED)
            values = gathered(dense, first).view(-1, 1)
            found.append((first, update(piece, values, {"m": values * 2}, first, gradient, step=4, seed=SEED)))
        finally:
            torch.set_num_threads(before)
    (one, after_one), (two, after_two) = found
    assert one == two
    assert after_one.mask == after_two.mask != one
    assert torch.equal(after_one.values, after_two.values)
    assert torch.equal(after_one.states["m"], after_two.states["m"])


def test_a_global_threshold_is_that_of_one_sort_over_all_pieces() -> None:
    generator = torch.Generator().manual_seed(4)
    for block in ((1, 1), (2, 2)):
        group = SparsityGroup(
            patterns=("*",), algorithm="gmp", distribution="global", sparsity=0.9, end=10, block=block
        )
        pieces = sparse_pieces(Sparsity((group,)), [Parameter(f"w{n}", (40, 30 * (n + 1))) for n in range(3)])
        # Small whole numbers: the threshold falls among very many equal ones.
        keys = [
            magnitude_keys(piece.grid, torch.randint(-3, 4, piece.parameter.shape, generator=generator).float())
            for piece in pieces
        ]
        keys.append(np.zeros_like(keys[0]))  # nothing of it is above the threshold: its first cell stays
        together = np.concatenate(keys)
        order = sorted(range(together.size), key=lambda index: (-int(together[index]), index))
        owned = [[(0, keys[0]), (3, keys[3])], [], [(2, keys[2]), (1, keys[1])]]
        for wanted in (4, 400, together.size):
            counts = owners_counts(owned, wanted)
            assert counts[0] == counts[1] == counts[2]
            found = np.concatenate([largest(each, count) for each, count in zip(keys, counts[0], strict=True)])
            assert np.count_nonzero(found) == wanted
            least = np.concatenate([largest(each, 1) for each in keys])
            others = [index for index in order if not least[index]][: wanted - 4]
            assert set(np.flatnonzero(found)) == {*np.flatnonzero(least), *others}


def owners_counts(owned: list[list[tuple[int, Keys]]], wanted: int) -> list[list[int]]:
    """What each of several owners finds, which are threads that wait for each other."""
    barrier, said = threading.Barrier(len(owned)), [None] * len(owned)

    def work(rank: int) -> list[int]:
        def gather(value: Any) -> list[Any]:
            said[rank] = value
            barrier.wait(5)
            found = list(said)
            barrier.wait(5)
            return found

        bits = owned[0][0][1].dtype.itemsize * 8
        return kept_counts(4, wanted, bits, lambda: owned[rank], gather)

    with ThreadPoolExecutor(len(owned)) as threads:
        return list(threads.map(work, range(len(owned))))


def test_erdos_renyi_meets_its_budget_with_dense_layers_capped() -> None:
    shapes = ((64, 3, 3, 3), (512, 512), (2048, 512), (4, 512, 256), (10, 8))
    sizes = [math.prod(shape) for shape in shapes]
    for sparsity in (0.3, 0.8, 0.95):
        densities = erdos_renyi(shapes, sparsity)
        assert all(0 < density <= 1 for density in densities)
        assert densities[4] == 1.0
        total = sum(density * size for density, size in zip(densities, sizes, strict=True))
        assert total == pytest.approx((1 - sparsity) * sum(sizes), rel=1e-12)
        # Free layers are in the proportion of the formula.
        assert densities[1] / densities[2] == pytest.approx((1024 / 512**2) / (2560 / (2048 * 512)))
    group = SparsityGroup(patterns=("*",), sparsity=0.8, distribution="erdos_renyi")
    pieces = sparse_pieces(Sparsity((group,)), [Parameter(str(n), shape) for n, shape in enumerate(shapes)])
    kept = sum(piece.count(0) or 0 for piece in pieces)
    assert abs(kept - 0.2 * sum(sizes)) <= len(pieces) / 2


def test_a_ramp_shares_out_each_of_its_steps() -> None:
    """Gradual pruning under Erdős–Rényi: layers are capped while there is much to keep, and the budget holds at each step."""
    shapes = {"large": (512, 256), "small": (16, 8), "middle": (64, 64)}
    group = SparsityGroup(
        patterns=("*",), algorithm="gmp", distribution="erdos_renyi", sparsity=0.98, begin=2, end=22, every=5
    )
    cut = [Parameter("large", (256, 256), row=row, rows=512) for row in (0, 256)]
    pieces = sparse_pieces(Sparsity((group,)), [*cut, *(Parameter(name, shapes[name]) for name in ("small", "middle"))])
    before = [piece.grid.cells for piece in pieces]
    for version in range(26):
        counts = [piece.count(version) or 0 for piece in pieces]
        last = min(version - (version - 2) % 5, 22) if version >= 2 else 2
        sparsity = 0.98 * (1 - (1 - (last - 2) / 20) ** 3)
        assert sum(counts) == pytest.approx((1 - sparsity) * sum(math.prod(shape) for shape in shapes.values()), abs=2)
        assert all(now <= then for now, then in zip(counts, before, strict=True))
        assert counts[0] == counts[1]
        if counts[2] < 128 and counts[3] < 4096:  # nobody is capped: in the proportion of the formula
            assert counts[3] / counts[0] == pytest.approx(2 * 128 / 768, rel=1e-2)
            assert counts[2] / counts[3] == pytest.approx(24 / 128, rel=1e-2)
        before = counts
    assert [piece.count(3) for piece in pieces] == [65536, 65536, 128, 4096]
    assert pieces[2].count(12) == 128 > (pieces[2].count(25) or 0)


def test_embeddings_norms_heads_and_vectors_stay_dense() -> None:
    class ScaleNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 8))

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.bag = nn.Embedding(10, 8), nn.EmbeddingBag(10, 8)
            self.norm, self.own_norm = nn.LayerNorm([4, 8]), ScaleNorm()
            self.body = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            self.body[1].requires_grad_(False)
            self.lm_head, self.out = nn.Linear(8, 10, bias=False), nn.Linear(8, 10)
            self.lm_head.weight = self.words.weight
            self.attention = nn.Module()
            self.attention.classifier = nn.Linear(8, 3)

        def get_output_embeddings(self) -> nn.Module:
            return self.out

    model = Whole()
    dense = dense_by_default(model)
    assert dense == {
        "words.weight", "bag.weight", "norm.weight", "norm.bias", "own_norm.weight", "out.weight", "out.bias",
        "attention.classifier.weight", "attention.classifier.bias",
    }  # fmt: skip
    parameters = [Parameter(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]
    for include_all, expected in (
        (False, {"body.0.weight"}),
        (True, {"body.0.weight"} | {name for name in dense if model.get_parameter(name).dim() > 1}),
    ):
        group = SparsityGroup(patterns=("*",), include_all=include_all)
        found = sparse_pieces(Sparsity((group,)), parameters, dense=dense)
        assert {piece.parameter.name for piece in found} == expected


def test_first_match_wins_and_what_is_dense_stays_so() -> None:
    attention = SparsityGroup(patterns=("*.attention.*",), sparsity=0.0)
    rest = SparsityGroup(patterns=("*",), sparsity=0.5)
    parameters = [
        Parameter("embed.weight", (10, 8)),
        Parameter("0.attention.weight", (8, 8)),
        Parameter("0.mlp.weight", (8, 8), row=0, rows=16),
        Parameter("0.mlp.weight", (8, 8), row=8, rows=16),
        Parameter("0.mlp.bias", (8,)),
    ]
    pieces = sparse_pieces(Sparsity((attention, rest)), parameters, dense={"embed.weight"})
    assert [str(piece.parameter) for piece in pieces] == ["0.mlp.weight[0:8]", "0.mlp.weight[8:16]"]
    masks = [initial_mask(piece, None, seed=0) for piece in pieces]
    assert masks[0] != masks[1]
    with pytest.raises(ConfigError, match=r"group \*\.moe\.\*: matches no trainable matrix"):
        sparse_pieces(Sparsity((SparsityGroup(patterns=("*.moe.*",)),)), parameters)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.0}, "at least 0 and below 1; found 1.0"),
        ({"algorithm": "rigl", "end": 5, "sparsity": Ramp("cubic", 0.0, 0.9)}, "algorithm: gmp"),
        ({"sparsity": -0.1}, "at least 0 and below 1; found -0.1"),
        (
            {"algorithm": "gmp", "end": 5, "distribution": "global", "sparsity": Ramp("linear", 0.8, 0.2)},
            "a schedule that rises with distribution: global",
        ),
        (
            {"algorithm": "gmp", "end": 5, "distribution": "global", "sparsity": Ramp("linear", 0.2, 0.8)},
            "magnitude with distribution: global",
        ),
        ({"algorithm": "set"}, "the step at which set ends"),
        ({"algorithm": "set", "end": 5, "grow_by": "relative_gradient"}, "expected gradient with set"),
        ({"dense_until": 5, "dense_from": 5}, "a step after dense_until"),
        ({"dense_until": 5, "init": "masks.safetensors"}, "magnitude after a dense phase"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SparsityGroup(patterns=("*",), **fields)


def test_the_section_becomes_settings_that_survive_json() -> None:
    section = SparsityConfig.model_validate(
        {
            "groups": [
                {"patterns": ["*.mlp.*"], "algorithm": "rigl", "sparsity": 0.9, "block": [32, 32]},
                {"patterns": ["*"], "algorithm": "gmp", "sparsity": {"initial": 0.2, "final": 0.8}, "end": 50},
            ]
        }
    )
    settings = section.settings(training_steps=1000)
    assert settings.groups[0].end == 750
    assert settings.groups[1].sparsity_at(0) == 0.2
    assert settings.groups[1].sparsity_at(50) == settings.groups[1].sparsity_at(10**6) == 0.8
    assert Sparsity.from_json(settings.to_json()) == settings
    assert "grow_by" not in settings.to_json()["groups"][0]  # as in stores that were made before there was a choice
    chosen = section.groups[0].model_copy(update={"grow_by": "relative_gradient"}).group(1000)
    assert Sparsity.from_json(Sparsity((chosen,)).to_json()).groups[0].grow_by == "relative_gradient"
