"""Sparse records: their layout and files, versions whose counts change, and everything that looks at a whole store."""

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tests.store.cases import BLOCKS as DENSE_BLOCKS
from tests.store.cases import make, reopen, segment, sparsity_of
from tests.store.sparse_cases import (
    BLOCKS,
    MASKS,
    PLAIN,
    RECIPES,
    TALL,
    THIN,
    assert_expands,
    make_sparse,
    sparse_filled,
    write_sparse,
)

from weightstream.blocks import Parameter, Unit
from weightstream.cluster import LASTING_VARIABLE
from weightstream.errors import StoreError
from weightstream.store.block_bytes import Largest
from weightstream.store.difference import difference
from weightstream.store.given import fill, masks_by_magnitude, masks_given, masks_of_zeros
from weightstream.store.images import slab_image
from weightstream.store.initial import generate
from weightstream.store.layout import record_layout
from weightstream.store.masks import bits_from, bits_of, dense_of, put_bits
from weightstream.store.optimizers import AdamW
from weightstream.store.owned import Holding, WorkingBuffer
from weightstream.store.pull import pull
from weightstream.store.push import push
from weightstream.store.segments import RecordBuffer
from weightstream.store.sparsity import DENSE, InitialMask, SparsePiece


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_mask_comes_back_in_either_form(data: st.DataObject) -> None:
    high, wide = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    shape = (high * data.draw(st.integers(1, 7)), wide * data.draw(st.integers(1, 40)))
    cells = shape[0] // high * (shape[1] // wide)
    ones = data.draw(st.integers(0, cells))
    bits = np.zeros(cells, dtype=bool)
    bits[np.random.default_rng(ones).permutation(cells)[:ones]] = True
    unit = Unit(0, 0, "u", (Parameter("w", shape),))
    layout = record_layout(unit, "bf16", AdamW(), (SparsePiece("w", ones * high * wide, (high, wide)),))
    spec = layout.spec("mask", "w")
    assert spec is not None
    assert spec.nbytes <= -(-cells // 8)
    tensor = torch.zeros(spec.shape, dtype=spec.dtype)
    put_bits(spec, bits, tensor)
    assert np.array_equal(bits_of(spec, tensor), bits)
    dense = dense_of(spec, bits)
    assert dense.shape == shape
    assert int(dense.sum()) == ones * high * wide
    assert np.array_equal(bits_from(spec, dense), bits)


@pytest.mark.parametrize(("precision", "parts"), [
    ("bf16", ["copy", "mask", "param", "exp_avg", "exp_avg_sq"]), ("fp32", ["param", "mask", "exp_avg", "exp_avg_sq"])
])  # fmt: skip
def test_what_a_worker_needs_is_one_run_of_a_file_that_anyone_reads(
    precision: str, parts: list[str], tmp_path: Path
) -> None:
    with make_sparse(tmp_path / "store", precision=precision) as store:
        sparsity = sparsity_of(store, THIN, 0.1, 0.5)
        write_sparse(store, THIN, 1, sparsity)
        store.commit(1, {}).result(timeout=30)
        layout = store.layout(THIN)
        assert [part.name for part in layout.parts] == parts
        assert [part.name for part in layout.fetched] == parts[:2]
        assert layout.parts[1].offset == layout.header_nbytes + layout.parts[0].nbytes
        assert all(part.offset % 4096 == 0 for part in layout.parts)
        path = segment(store, THIN)
        assert path.stat().st_size == layout.image_nbytes
        with safe_open(path, framework="pt") as opened:
            said = json.loads(opened.metadata()["masks"])
            assert said == {
                "thin.weight": {"block": [1, 1], "form": "gaps8", "shape": [40, 30]},
                "thin.grid": {"block": [3, 2], "form": "bitmap", "shape": [12, 4]},
            }
            assert opened.get_tensor("param/thin.weight").shape == (sparsity[0].nonzeros, 1)
            assert opened.get_tensor("mask/thin.weight").shape == (124,)
            assert opened.get_tensor("exp_avg/thin.bias").shape == (40,)


def test_a_record_that_was_never_written_has_the_dense_values_at_random_places(tmp_path: Path) -> None:
    """Each mask has its count; values are those that a dense store of the same seed begins with."""
    with make_sparse(tmp_path / "store") as store, make_sparse(tmp_path / "other", contract={"seed": 4}) as other:
        found, elsewhere = dict(store.items()), dict(other.items())
        assert "mask" not in found["thin.grid"]  # dense at first
        counts = {"thin.weight": [120], "tall.weight": [204, 100, 12]}
        for name, wanted in counts.items():
            mask, values = found[name]["mask"], found[name]["param"]
            heights = [mask.shape[0]] if len(wanted) == 1 else [32, 32, 6]
            assert [int(rows.sum()) for rows in mask.split(heights)] == wanted
            dense = generate(RECIPES[name], seed=store.seed, name=name, shape=mask.shape)
            assert torch.equal(values, torch.where(mask, dense, torch.zeros(())))
            assert not torch.equal(mask, elsewhere[name]["mask"])
            assert torch.equal(store.tensor(name, "mask"), mask)
        pairs = found["tall.weight"]["mask"].reshape(35, 2, 64)
        assert torch.equal(pairs[:, 0], pairs[:, 1])
        assert store.digest() != other.digest()
        initial = store.digest()
        for index in (THIN, *TALL):  # writing what is there changes nothing
            buffer = RecordBuffer(store.layout(index))
            store.load(index, buffer, [part.name for part in store.layout(index).parts]).result(timeout=30)
            store.write(index, buffer, 0, 0).result(timeout=30)
        store.commit(0, {}).result(timeout=30)
        assert store.digest() == initial


def test_versions_of_other_counts_take_their_own_room(tmp_path: Path) -> None:
    """A recycled file is cut or grown, and a store opened anew has every version as it was written."""
    path = tmp_path / "store"
    with make_sparse(path) as store:
        sizes = []
        for value, share in enumerate([0.9, 0.5, 0.1, 0.02, 1.0, 0.0, 0.5], 1):
            expected = write_sparse(store, TALL[0], value, sparsity_of(store, TALL[0], share))
            store.commit(value, {}).result(timeout=30)
            assert_expands(store, TALL[0], expected)
            sizes.append(segment(store, TALL[0]).stat().st_size)
            assert sizes[-1] == store.layout(TALL[0]).image_nbytes
            assert store.info()["last_commit_bytes"] == sizes[-1]
        assert sizes[0] > sizes[1] >= sizes[3] > sizes[5] - 4096  # there is a page for every part
        assert sizes[4] > sizes[5] < sizes[0]
        assert store.verify() == []
        assert len(list((path / "segments").iterdir())) <= 3
        digest = store.digest()
    with reopen(path) as store:
        assert_expands(store, TALL[0], expected)
        assert store.digest() == digest
        assert store.info()["sparse"]["tall.weight"]["nonzeros"] == store.sparsity(TALL[0])[0].nonzeros + 100 + 12


def test_pins_follow_the_count(tmp_path: Path) -> None:
    """What is kept in memory is of the newest version, also after an undo and where a mask comes or goes."""
    with make_sparse(tmp_path / "store") as store:
        store.pin(THIN, ["copy", "param", "mask"])
        first = write_sparse(store, THIN, 1, sparsity_of(store, THIN, 0.5, 1.0))
        assert_expands(store, THIN, first)
        store.accept()
        for value, shares in enumerate([(0.1, 0.5), (1.0, 1.0), (0.9, 0.2)], 2):
            expected = write_sparse(store, THIN, value, sparsity_of(store, THIN, *shares))
            before = dict(store.counters)
            assert_expands(store, THIN, expected)
            states = sum(part.nbytes for part in store.layout(THIN).states if part.name.startswith("exp"))
            assert store.counters["disk", "states"]["read"] - before["disk", "states"]["read"] == states
            assert store.pinned_bytes == sum(
                part.nbytes for part in store.layout(THIN).parts if part.name in ("copy", "param", "mask")
            ) or not store.sparsity(THIN)
        store.discard()
        assert_expands(store, THIN, first)


def test_memory_that_outlives_the_process_follows_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of another size takes a file of its own; the next process finds the last one, and reads no disk."""
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setenv(LASTING_VARIABLE, str(memory))
    parts = ("copy", "param", "mask")
    with make_sparse(tmp_path / "store") as store:
        store.pin(THIN, parts)
        for value, share in enumerate((0.9, 0.2, 1.0, 0.9), 1):
            view = memoryview(bytearray(store.layout(THIN).fetched_nbytes))
            reading = store.fetch(THIN, view)  # from memory that the write takes away
            expected = write_sparse(store, THIN, value, sparsity_of(store, THIN, share, 1.0))
            reading.result(timeout=30)
            assert_expands(store, THIN, expected)
        store.commit(4, {}).result(timeout=30)
    monkeypatch.setenv(LASTING_VARIABLE, str(memory))
    with reopen(tmp_path / "store") as store:
        store.pin(THIN, parts)
        for part in parts:
            assert (memory / f"{store.manifest.meta()['id']}-00000-{part}").stat().st_size == store.layout(THIN).part(
                part
            ).nbytes
        assert_expands(store, THIN, expected)
        assert store.counters.get(("disk", "copy"), {"read": 0})["read"] == 0


def test_the_digest_is_of_what_tensors_expand_to(tmp_path: Path) -> None:
    """Not of how they are cut or masks are written; a value, a bit, or a step more changes it."""
    masks = {"tall.weight": InitialMask("given")}
    mask = torch.rand(70, 64, generator=torch.Generator().manual_seed(0)) < 0.02
    values = {"tall.weight": torch.randn(70, 64, generator=torch.Generator().manual_seed(1)).masked_fill(~mask, 0.0)}
    digests = []
    for panel_elements in (2048, 4096, 1 << 20):
        with make_sparse(tmp_path / str(panel_elements), masks=masks, panel_elements=panel_elements) as store:
            fill(store, values, masks_given({"tall.weight": mask}))
            digests.append(store.digest())
            assert store.verify() == []
            assert torch.equal(store.tensor("tall.weight"), values["tall.weight"])
    assert len(set(digests)) == 1
    assert difference_of(tmp_path / "2048", tmp_path / "1048576")["equal"]
    with make_sparse(tmp_path / "more", masks=masks) as store:
        one_more = mask.clone()
        one_more.view(-1)[int((~mask).reshape(-1).nonzero()[0])] = True
        fill(store, values, masks_given({"tall.weight": one_more}))
        assert store.digest() != digests[0]
    found = difference_of(tmp_path / "2048", tmp_path / "more")
    assert [(row["name"], row["part"]) for row in found["tensors"] if row["state"] != "equal"] == [
        ("tall.weight", "mask")
    ]


def test_one_panel_may_be_dense_where_another_is_not(tmp_path: Path) -> None:
    """Every position of it counts as kept, in whatever looks at the whole tensor."""
    shares = [(1.0, 0.5, 1.0), (0.5, 1.0, 1.0), (1.0, 0.5, 0.5)]
    digests = set()
    for number, these in enumerate(shares):
        with make_sparse(tmp_path / str(number)) as store:
            kept = []
            for index, share, rows in zip(TALL, these, (32, 32, 6), strict=True):
                expected = write_sparse(store, index, 1, sparsity_of(store, index, share))
                kept.append(expected.get("mask/tall.weight", torch.ones(rows, 64, dtype=torch.bool)))
            store.commit(1, {}).result(timeout=30)
            assert torch.equal(store.tensor("tall.weight", "mask"), torch.cat(kept))
            assert torch.equal(dict(store.items())["tall.weight"]["mask"], torch.cat(kept))
            digests.add(store.digest())
    assert len(digests) == len(shares)
    for a, b in ((0, 1), (1, 0), (0, 2)):
        found = difference_of(tmp_path / str(a), tmp_path / str(b))
        states = {row["part"]: row["state"] for row in found["tensors"] if row["name"] == "tall.weight"}  # type: ignore
        assert states["mask"] == "differs"
    assert difference_of(tmp_path / "2", tmp_path / "2")["equal"]


def difference_of(a: Path, b: Path) -> dict[str, object]:
    with reopen(a, writable=False) as one, reopen(b, writable=False) as other:
        return difference(one, other)


GIVEN = {"thin.weight": InitialMask("given", (2, 3)), "tall.weight": InitialMask("given")}


class TestGivenMasks:
    @pytest.fixture
    def values(self) -> dict[str, torch.Tensor]:
        made = torch.Generator().manual_seed(5)
        return {p.name: torch.randn(p.shape, generator=made) for block in BLOCKS for p in block.parameters}

    def test_by_magnitude(self, tmp_path: Path, values: dict[str, torch.Tensor]) -> None:
        with make_sparse(tmp_path / "store", masks=GIVEN) as store:
            fill(store, values, masks_by_magnitude({"thin.weight": 0.25, "tall.weight": 0.1}))
            found = dict(store.items())
            sums = values["thin.weight"].abs().double().reshape(20, 2, 10, 3).sum(dim=(1, 3)).reshape(-1)
            kept = found["thin.weight"]["mask"][::2, ::3].reshape(-1)
            assert int(kept.sum()) == 50
            assert float(sums[kept].min()) > float(sums[~kept].max())
            for rows in (slice(0, 32), slice(32, 64), slice(64, 70)):  # each panel by itself
                mask, magnitude = found["tall.weight"]["mask"][rows], values["tall.weight"][rows].abs()
                assert int(mask.sum()) == round(0.1 * mask.numel())
                assert float(magnitude[mask].min()) > float(magnitude[~mask].max())
            assert torch.equal(found["tall.weight"]["param"], values["tall.weight"] * found["tall.weight"]["mask"])

    def test_where_values_are_not_zero(self, tmp_path: Path, values: dict[str, torch.Tensor]) -> None:
        values["thin.weight"][:, 3:9] = 0.0
        values["tall.weight"][5:] = 0.0
        with make_sparse(tmp_path / "store", masks=GIVEN) as store:
            fill(store, values, masks_of_zeros)
            assert torch.equal(store.tensor("thin.weight", "mask"), values["thin.weight"] != 0)
            assert torch.equal(store.tensor("tall.weight"), values["tall.weight"])
            assert [store.sparsity(index)[0].nonzeros for index in TALL] == [5 * 64, 0, 0]

    def test_without_saying_how(self, tmp_path: Path, values: dict[str, torch.Tensor]) -> None:
        with make_sparse(tmp_path / "store", masks=GIVEN) as store:
            with pytest.raises(
                StoreError, match="'thin.weight' is sparse and its mask is to be given; say where it comes"
            ):
                fill(store, values)
            with pytest.raises(StoreError, match="mask of parameter 'thin.weight' is given, and was never written"):
                store.digest()
        with reopen(tmp_path / "store") as store:  # it can be completed
            with pytest.raises(
                StoreError, match="kept or dropped whole, found one in part; give a mask made for such blocks"
            ):
                fill(store, values, masks_given({"thin.weight": torch.eye(40, 30)}))
            with pytest.raises(StoreError, match=r"mask of 'thin.weight': expected shape \(40, 30\), found \(3,\)"):
                fill(store, values, masks_given({"thin.weight": torch.ones(3)}))


@pytest.mark.parametrize(("masks", "error"), [
    ({"thin.weight": InitialMask("random", counts=(120, 3))}, "is stored in 1 or more pieces, 2 counts"),
    ({"tall.weight": InitialMask("random", counts=(120,))}, "is stored in 2 or more pieces, 1 counts"),
    ({"thin.weight": InitialMask("random", (3, 1), (120,))}, "blocks of 3×1 do not divide 40×30"),
    ({"thin.weight": InitialMask("random", (2, 2), (122,))}, "expected a multiple of 4 non-zeros from 0 to 1200, found 122"),
    ({"thin.weight": InitialMask("random", counts=(1201,))}, "from 0 to 1200, found 1201"),
    ({"thin.bias": InitialMask("dense")}, "only trained parameters of two or more dimensions are sparse, found one of 1"),
    ({"nothing": InitialMask("dense")}, "'nothing', which is no parameter of the model"),
])  # fmt: skip
def test_masks_that_do_not_fit_are_refused(masks: dict[str, InitialMask], error: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=error):
        make_sparse(tmp_path / "store", masks=masks)


def test_a_dense_parameter_stays_dense(tmp_path: Path) -> None:
    with make_sparse(tmp_path / "store") as store:
        with pytest.raises(StoreError, match="was not made with a sparse parameter 'plain.weight'"):
            store.layout_of(PLAIN, (SparsePiece("plain.weight", 3),))
        with pytest.raises(ValueError, match="the buffer is bound to block"):
            store.write(TALL[0], sparse_filled(store.layout(TALL[1]), 1)[0], 1, 1)


def test_snapshots_branches_pushes_and_pulls_take_versions_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with make_sparse(path) as store:
        early = {THIN: write_sparse(store, THIN, 1, sparsity_of(store, THIN, 0.5, 0.5))}
        early[TALL[0]] = write_sparse(store, TALL[0], 1, sparsity_of(store, TALL[0], 0.3))
        store.commit(1, {}).result(timeout=30)
        store.snapshot("early")
        digest = store.digest()
        for value in (2, 3, 4):
            write_sparse(store, THIN, value, sparsity_of(store, THIN, 0.5 / value, 0.25))
            write_sparse(store, TALL[0], value, sparsity_of(store, TALL[0], 0.3 / value))
            store.commit(value, {}).result(timeout=30)
        assert store.verify() == []
        store.branch("early", tmp_path / "branch")
        late = store.digest()
        push(path, tmp_path / "target")
        pull(tmp_path / "target", tmp_path / "pulled")
        store.restore("early", discard=True)
        assert store.digest() == digest
        again = push(path, tmp_path / "target", replace=True)
        assert again["sent_records"] == 2
        pull(tmp_path / "target", tmp_path / "pulled early")
    for other, wanted in (("branch", digest), ("pulled", late), ("pulled early", digest), ("store", digest)):
        with reopen(tmp_path / other) as opened:
            assert opened.verify() == []
            assert opened.digest() == wanted
            if wanted == digest:
                for index, expected in early.items():
                    assert_expands(opened, index, expected)
            write_sparse(opened, THIN, 9, sparsity_of(opened, THIN, 0.9, 0.9))
            opened.commit(9, {}).result(timeout=30)
            assert opened.verify() == []


def test_a_mask_with_other_ones_is_found(tmp_path: Path) -> None:
    """Its checksum is right, as whoever wrote it wrote it wrong."""
    with make_sparse(tmp_path / "store") as store:
        buffer, _ = sparse_filled(store.layout_of(TALL[0], sparsity_of(store, TALL[0], 0.01)), 1)
        buffer.tensors("mask")["tall.weight"][:5] = 255
        store.write(TALL[0], buffer, 1, 1)
        buffer, _ = sparse_filled(store.layout_of(THIN, sparsity_of(store, THIN, 0.5, 1.0)), 1)
        buffer.tensors("mask")["thin.weight"][0] ^= 1
        store.write(THIN, buffer, 1, 1)
        store.commit(1, {}).result(timeout=30)
        found = store.verify()
        assert len(found) == 2
        assert "the mask of 'thin.weight' was written wrong: mask: expected 600 cells that exist" in found[0]
        assert "the mask of 'tall.weight' was written wrong: mask" in found[1]


def test_damage_of_a_copy_is_made_anew_and_that_of_a_mask_is_not(tmp_path: Path) -> None:
    with make_sparse(tmp_path / "store") as store:
        write_sparse(store, THIN, 1, sparsity_of(store, THIN, 0.5, 0.5))
        store.commit(1, {}).result(timeout=30)
        store.snapshot("one")
        expected = write_sparse(store, THIN, 2, sparsity_of(store, THIN, 0.3, 0.5))
        store.commit(2, {}).result(timeout=30)
        for part, said in (("copy", "wrote 1 records anew"), ("mask", "went back from step 2 to snapshot 'one'")):
            with segment(store, THIN).open("r+b") as file:
                file.seek(store.layout(THIN).part(part).offset)
                file.write(b"\xa5")
            assert [f"part {part!r}" in line for line in store.verify()] == [True]
            assert said in store.repair()[0]
            assert store.verify() == []
            if part == "copy":
                assert_expands(store, THIN, expected)


def test_a_holding_lands_what_is_compressed(tmp_path: Path) -> None:
    """Slabs are dense; landing areas and working buffers are as large as versions are, or may become."""
    with make_sparse(tmp_path / "store") as store:
        largest = {index: [sparsity_of(store, index, 0.9), DENSE] for index in TALL}
        holding = Holding(store, largest=Largest(largest, {}))
        slab = slab_image([store.layout_of(index, DENSE) for index in TALL])
        assert holding.slabs[1] == slab
        assert holding.bytes[1].streamed == slab.nbytes
        assert holding.is_sparse(1)
        assert not holding.is_sparse(2)
        buffer = WorkingBuffer(holding.bytes[1].written)
        holding.load(1, buffer).result(timeout=30)
        pieces = list(holding.pieces(1, buffer))
        assert [piece.master.shape for piece in pieces] == [(204, 1), (100, 1), (12, 1)]
        assert all(piece.mask is not None and piece.states.keys() == {"exp_avg", "exp_avg_sq"} for piece in pieces)
        for shares in ((0.9, 0.5, 0.1), (1.0, 0.9, 1.0)):
            sparsities = {index: sparsity_of(store, index, share) for index, share in zip(TALL, shares, strict=True)}
            holding.rebind(1, buffer, sparsities)
            holding.become(sparsities)
            wanted = {}
            for index, record in zip(TALL, buffer.records, strict=True):
                source, wanted[index] = sparse_filled(store.layout_of(index, sparsities[index]), index)
                record.image[:] = source.image
            holding.write(1, buffer, holding.checksums(1, buffer)).result(timeout=30)
            places = holding.landing(1)
            fetched, served = (memoryview(bytearray(places[TALL[-1]].stop)) for _ in range(2))
            for future in holding.fetch(1, fetched).values():
                future.result(timeout=30)
            holding.serve(1, buffer, served)
            assert fetched == served
            for index, expected in wanted.items():
                assert_expands(store, index, expected)


def test_a_store_of_dense_parameters_is_what_it_was(tmp_path: Path) -> None:
    """The same format: the versions before read it, and theirs is read; one with masks is of the next."""
    numbers = {}
    for name, blocks, masks in (("dense", DENSE_BLOCKS, None), ("sparse", BLOCKS, MASKS)):
        with make(tmp_path / name, blocks=blocks, masks=masks, panel_elements=2048, recipes=_recipes(blocks)):
            pass
        connection = sqlite3.connect(tmp_path / name / "manifest.sqlite")
        (numbers[name],) = connection.execute("PRAGMA user_version").fetchone()
        columns = [row[1] for row in connection.execute("PRAGMA table_info(records)")]
        assert ("sparsity" in columns) == (name == "sparse")
        connection.close()
    assert numbers == {"dense": 4, "sparse": 5}


def _recipes(blocks: object) -> dict[str, object]:
    return {p.name: next(iter(RECIPES.values())) for block in blocks for p in block.parameters}  # type: ignore[attr-defined]


def test_a_changed_sparsity_in_the_manifest_is_found(tmp_path: Path) -> None:
    with make_sparse(tmp_path / "store") as store:
        write_sparse(store, THIN, 1, sparsity_of(store, THIN, 0.5, 1.0))
        store.commit(1, {}).result(timeout=30)
    connection = sqlite3.connect(tmp_path / "store" / "manifest.sqlite", isolation_level=None)
    connection.execute("""UPDATE records SET sparsity = '[["thin.weight",601,1,1]]'""")
    connection.close()
    with pytest.raises(StoreError, match="row 0 of table records was committed with checksum"):
        reopen(tmp_path / "store")
