"""What interrupts, divides or looks at sparse training changes nothing; what it costs; what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.sparse.masked import (
    CASES,
    INITIAL,
    INNER,
    KEPT,
    PANEL,
    SEED,
    WIDTH,
    Model,
    digest,
    group,
    initial_values,
    is_sparse,
    loss_fn,
    micro_batches,
    open_engine,
    pieces_of,
    train,
)

import weightstream as ws
from weightstream.errors import ConfigError, StoreMismatchError
from weightstream.masking.first_masks import counts_now
from weightstream.masking.masking import Masking

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", CASES)
def test_interrupted_in_little_memory_as_in_one_go(case: str, tmp_path: Path) -> None:
    """Once it is closed, once it goes down before what it did is committed; mask updates are at steps 4 to 8."""
    sparsity, _ = CASES[case]
    clip_norm = 0.5 if case in ("rigl", "gmp", "global_rigl") else None
    whole = train(tmp_path / "whole", sparsity, [9], clip_norm=clip_norm)
    path, settings = tmp_path / "pieces", {"ram_tier": False, "commit_every": 4, "clip_norm": clip_norm}
    pieces = train(path, sparsity, [3], **settings)
    engine = open_engine(path, sparsity, **settings)
    for step in range(4, 10):
        engine.step(micro_batches(step), loss_fn)
    engine.abandon()
    with ws.Store.open(path, writable=False) as store:
        committed = store.step
    assert 3 < committed < 9
    pieces += whole[3:committed] + train(path, sparsity, [9 - committed], **settings)
    assert pieces == whole
    assert digest(path) == digest(tmp_path / "whole")


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

    def test_masks_of_another_model(self, tmp_path: Path) -> None:
        masks = {name: torch.ones(value.shape, dtype=torch.bool) for name, value in INITIAL.items() if is_sparse(name)}
        path = tmp_path / "masks.safetensors"
        for changed, message in (
            (
                torch.ones(WIDTH, INNER + 1),
                r"expected shape \(32, 192\), found \(32, 193\); give masks of the same model",
            ),
            (torch.zeros(WIDTH, INNER), "expected at least one element that exists, found none; leave it out"),
            (torch.full((WIDTH, INNER), 0.5), "expected 0 or 1 for each element, found other numbers; give masks, not"),
            (None, "has no mask of 'layers.2.down.weight'; add it, or give another init"),
        ):
            given = {name: mask for name, mask in masks.items() if name != "layers.2.down.weight"}
            save_file(given if changed is None else {**given, "layers.2.down.weight": changed}, path)
            with pytest.raises(ConfigError, match=message):
                open_engine(tmp_path / "store", group(init=str(path)))
        save_file(masks | {"layers.2.down.weight": torch.eye(WIDTH, INNER)}, path)
        with pytest.raises(ConfigError, match="is kept in part; expected whole blocks"):
            open_engine(tmp_path / "store", group(init=str(path), block=(2, 2)))
        assert not (tmp_path / "store").exists()

    def test_given_weights_without_a_word(self, tmp_path: Path) -> None:
        """Not where they stay dense, nor where the store is there already."""
        with pytest.raises(ConfigError, match=r"'layers\.0\.up\.weight', which is to be sparse .*give init: magnitude"):
            open_engine(tmp_path / "store", group(init=None))
        assert not (tmp_path / "store").exists()
        with pytest.raises(ConfigError, match="some are zero, found none that is"):
            open_engine(tmp_path / "store", group(init="zeros"))
        assert not (tmp_path / "store").exists()
        train(tmp_path / "store", group(init="magnitude"), [1])
        train(tmp_path / "store", group(init=None), [1])
        with pytest.raises(StoreMismatchError, match="sparsity: the store has .*magnitude.*this run has .*random"):
            open_engine(tmp_path / "store", group(init="random"))
        train(tmp_path / "pruned", group(init=None, algorithm="gmp", end=3), [1])


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


def test_blocks_of_all_pieces_compete_where_a_dense_phase_ends(tmp_path: Path) -> None:
    """Weights that do not move: those blocks stay whose sums of magnitudes are largest in the whole group."""
    moving = {"algorithm": "set", "distribution": "global", "init": "magnitude", "end": 9, "every": 4}
    sparsity = group(**moving, block=(2, 4), dense_until=2)
    values = initial_values()
    for scale, name in enumerate(name for name in values if is_sparse(name)):
        values[name] *= (1.0 + scale / 20) / values[name].std()
    sums = {}
    with ws.Engine(Model, tmp_path, ws.SGD(lr=0.0), sparsity=sparsity, initial=values, panel_elements=PANEL) as engine:
        for step in range(1, 4):
            engine.step(micro_batches(step), loss_fn)
            engine.commit()
            assert engine.nonzeros()[0] == engine.nonzeros()[1] or step >= 2
        masks = {name: parts["mask"] for name, parts in engine.store.items() if is_sparse(name)}
        for name, mask in masks.items():
            sums[name] = values[name].double().abs().view(values[name].shape[0] // 2, 2, -1, 4).sum((1, 3))
            masks[name] = mask.view(sums[name].shape[0], 2, -1, 4).float().mean((1, 3))
    together, chosen = (torch.cat([each.flatten() for each in found.values()]) for found in (sums, masks))
    assert set(chosen.unique().tolist()) == {0.0, 1.0}
    assert int(chosen.sum()) == KEPT(0, chosen.numel())
    assert together[chosen == 1].min() > together[chosen == 0].max()
    assert len({float(mask.mean()) for mask in masks.values()}) > 3  # each has its own density


def test_room_before_a_search_and_kernels_after_it(tmp_path: Path) -> None:
    """Nobody knows the counts yet: each record has room for what it comes to, all together for what the group keeps."""
    sparsity = group(distribution="global", init="magnitude", block=(8, 8))
    settings = {"kernels": {"*.up.weight": "gathered"}, "panel_elements": 1 << 20}
    whole = train(tmp_path / "whole", sparsity, [4], **settings)
    assert train(tmp_path / "pieces", sparsity, [1, 3], **settings) == whole
    with open_engine(tmp_path / "whole", sparsity, **settings) as engine:
        assert engine.masking is not None
        units, dense, now = engine.store.units, engine.masking.dense, engine.holding.sparsity
    before = Masking(sparsity, units, dense, SEED)
    for unit, records in before.largest().records.items():
        most = {piece.name: piece.nonzeros for piece in records[0]}
        assert all(piece.nonzeros <= most[piece.name] for piece in now[unit])
        assert unit in before.largest().mixed
    shared = Masking(sparsity, units, dense, SEED, counts_now(sparsity, units, before.in_proportion())).largest()
    assert not shared.mixed
    nonzeros = sum(piece.nonzeros for (found,) in shared.records.values() for piece in found)
    kept = sum(piece.nonzeros for found in now.values() for piece in found)
    assert nonzeros == pytest.approx(kept, abs=64 * len(INITIAL))


def test_of_equal_weights_the_same_stay_however_the_model_is_cut(tmp_path: Path) -> None:
    """A threshold among many equal weights; blocks of layers, and of their parts, whose records come in another order."""
    values = {
        name: (4 * value / value.std()).round() / 4 if is_sparse(name) else value
        for name, value in initial_values().items()
    }
    sparsity, digests = group(distribution="global", init="magnitude"), []
    for blocks in (None, 20_000):
        path = tmp_path / str(blocks)
        with ws.Engine(
            Model, path, ws.AdamW(), sparsity=sparsity, initial=values, panel_elements=PANEL, max_block_bytes=blocks
        ) as engine:
            names = [parameter.name for unit in engine.store.units for parameter in unit.parameters]
        digests.append((digest(path), tuple(names)))
    assert digests[0][1] != digests[1][1]
    assert digests[0][0] == digests[1][0]
    with ws.Store.open(path, writable=False) as store:
        found = {name: parts["mask"] for name, parts in store.items() if is_sparse(name)}
    sizes, kept = (torch.cat([each[name].flatten() for name in sorted(found)]) for each in (values, found))
    edge = sizes.abs()[kept].min()
    assert sizes.abs()[~kept].max() == edge
    ties = kept[sizes.abs() == edge]
    assert torch.equal(ties, torch.arange(ties.numel()) < ties.sum())


@pytest.mark.parametrize("algorithm", ["static", "gmp"])
def test_a_piece_may_stay_whole_or_keep_one_cell(algorithm: Any, tmp_path: Path) -> None:
    """Under a global threshold, with buffers that have no byte more than a plan says; and opened again."""
    sparsity = group(algorithm=algorithm, distribution="global", init="magnitude", sparsity=0.5, end=3, every=1)
    values = initial_values()
    values["layers.1.down.weight"] *= 1e6
    values["layers.2.down.weight"] *= 1e-6
    settings = {"sparsity": sparsity, "initial": values, "panel_elements": PANEL, "ram_tier": False}
    found = []
    for _ in range(2):
        with ws.Engine(Model, tmp_path, ws.SGD(lr=0.0, momentum=0.9), **settings) as engine:
            for _ in range(2):
                engine.step(micro_batches(engine.step_count + 1), loss_fn)
            engine.commit()
            found.append(engine.densities())
    nonzeros, elements = zip(*found[1].values(), strict=True)
    assert sum(nonzeros) == sum(elements) // 2
    assert found[1]["layers.1.down.weight"] == (elements[3], elements[3])
    assert found[1]["layers.2.down.weight"] == (1, elements[5])
    assert (found[0] == found[1]) == (algorithm == "static")


@pytest.mark.parametrize("clip_norm", [None, 0.5], ids=["no clip", "clip"])
@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_a_skipped_step_skips_its_mask_update_and_counts_are_made_up_for(
    distribution: Any, clip_norm: float | None, tmp_path: Path
) -> None:
    sparsity = group(algorithm="gmp", distribution=distribution, sparsity=0.9, begin=2, end=6, every=2)
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
