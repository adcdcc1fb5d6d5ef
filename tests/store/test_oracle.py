"""The store against a dictionary: Hypothesis writes, commits, discards, pins, takes snapshots, restores and branches
them, closes and crashes."""

import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from tests.store.cases import (
    BLOCKS,
    TRAINED,
    Mortal,
    abandon,
    assert_accounted,
    assert_holds,
    filled,
    loaded,
    make,
    reopen,
    sparsity_of,
)

from weightstream.blocks import Parameter
from weightstream.store import records
from weightstream.store.families import Family
from weightstream.store.recipes import Recipe, Step
from weightstream.store.segments import RecordBuffer
from weightstream.store.sparsity import InitialMask, Sparsity
from weightstream.store.store import Store

PARTS = ("copy", "param", "mask", "exp_avg", "exp_avg_sq")
MASKS = {"embed.weight": InitialMask("random", counts=(400,)), "odd.weight": InitialMask("dense", (3, 4))}
SHARES = (0.8, 0.3, 0.02, 1.0)  # of the blocks of a sparse tensor, by value
FAMILY = Family(
    "expert {}",
    2**33,
    (Parameter("expert.{}.weight", (7, 9)), Parameter("expert.{}.bias", (7,))),
    {"expert.{}.weight": Recipe((Step("normal", (0.0, 1.0)),)), "expert.{}.bias": Recipe((Step("fill", (2.0,)),))},
)
MEMBERS = [len(BLOCKS) + number for number in (0, 1, 7, 2**32 + 5, 2**33 - 1)]  # some of billions
RECORDS = [*TRAINED, *MEMBERS]
blocks = st.sampled_from(RECORDS)
Values = dict[int, tuple[int, int]]  # block → (value, version); a block without one holds its initial values


class StoreMachine(RuleBasedStateMachine):
    store: Store
    device: Mortal

    @initialize(kept=st.sampled_from((1, 2, 1024)), precision=st.sampled_from(("bf16", "fp32")))
    def create(self, kept: int, precision: str) -> None:
        records.MEMBERS_KEPT = kept  # so few that records of the family come and go
        self.directory = Path(tempfile.mkdtemp(prefix="oracle "))
        self.device = Mortal()
        self.path = self.directory / "store"
        self.store = make(self.path, precision, self.device, families=[FAMILY], masks=MASKS)  # type: ignore[arg-type]
        self.initial = {index: loaded(self.store, index) for index in RECORDS}
        self.committed: Values = {}
        self.newest: Values = {}
        self.accepted: Values = {}
        self.step = 0
        self.value = 0
        self.digests: dict[str, str] = {self._key(): self.store.digest()}
        self.snapshots: dict[str, tuple[int, Values]] = {}
        self.branches = 0

    @rule(index=blocks, wait=st.booleans(), summed=st.booleans())
    def write(self, index: int, wait: bool, summed: bool) -> None:
        self.value += 1
        version = self.newest.get(index, (0, 0))[1] + 1
        buffer = self._filled(index)
        sums = self.store.checksums(index, buffer) if summed else None
        future = self.store.write(index, buffer, version, version, sums)
        self.newest[index] = (self.value, version)
        if wait:
            future.result(timeout=30)

    @rule(indices=st.sets(st.sampled_from(RECORDS), min_size=2), wait=st.booleans())
    def write_many(self, indices: set[int], wait: bool) -> None:
        self.value += 1
        versions = {index: self.newest.get(index, (0, 0))[1] + 1 for index in sorted(indices)}
        future = self.store.write_many([(i, self._filled(i), version, version) for i, version in versions.items()])
        self.newest |= {index: (self.value, version) for index, version in versions.items()}
        if wait:
            future.result(timeout=30)

    @rule(indices=st.lists(st.sampled_from(RECORDS), min_size=1, max_size=9))
    def read_many(self, indices: list[int]) -> None:
        buffers = [RecordBuffer(self.store.layout(index)) for index in indices]
        versions = self.store.read_many(list(zip(indices, buffers, strict=True))).result(timeout=30)
        for index, buffer, version in zip(indices, buffers, versions, strict=True):
            value, wanted = self.newest.get(index, (None, 0))
            assert version == wanted
            expected = filled(buffer.layout, value) if value is not None else None
            for part in buffer.layout.states:
                for name, tensor in buffer.tensors(part.name).items():
                    initial = self.initial[index].get(f"{part.name}/{name}")
                    assert torch.equal(tensor, expected.tensors(part.name)[name] if expected else initial)

    @rule(wait=st.booleans())
    def commit(self, wait: bool) -> None:
        self.step += 1
        future = self.store.commit(self.step, {"value": self.value})
        self.committed, self.accepted = dict(self.newest), dict(self.newest)
        if wait:
            future.result(timeout=30)
            assert (self.store.step, self.store.progress) == (self.step, {"value": self.value})

    @rule()
    def accept(self) -> None:
        """Steps between commits: an undo goes back to them, a crash does not."""
        self.store.accept()
        self.accepted = dict(self.newest)

    @rule()
    def discard(self) -> None:
        self.store.discard()
        self.newest = dict(self.accepted)

    @rule(index=blocks)
    def check(self, index: int) -> None:
        value, version = self.newest.get(index, (None, 0))
        assert self.store.version(index) == version
        if value is not None:
            assert self.store.sparsity(index) == self._sparsity(index, value)
        assert_holds(self.store, index, value, self.initial)

    @rule(index=blocks, parts=st.sets(st.sampled_from(PARTS)))
    def pin(self, index: int, parts: set[str]) -> None:
        self.store.pin(index, parts)

    @rule(index=blocks, parts=st.sets(st.sampled_from(PARTS)))
    def unpin(self, index: int, parts: set[str]) -> None:
        self.store.unpin(index, parts)

    @rule(name=st.sampled_from("xyz"))
    def snapshot(self, name: str) -> None:
        self._settle()
        if name in self.snapshots:
            self.store.remove_snapshot(name)
            del self.snapshots[name]
        else:
            self.store.snapshot(name)
            self.snapshots[name] = (self.step, dict(self.committed))
        self._same_snapshots()

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        self._settle()
        name = data.draw(st.sampled_from(sorted(self.snapshots)))
        self.store.restore(name, discard=True)
        self.step, values = self.snapshots[name]
        self.committed, self.accepted = dict(values), dict(values)
        self.newest = dict(values)
        assert self.store.step == self.step
        self._check_all()

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data(), move=st.booleans())
    def branch(self, data: st.DataObject, move: bool) -> None:
        """Another store with what a snapshot holds; perhaps the one to go on with, while its origin stays behind."""
        self._settle()
        name = data.draw(st.sampled_from(sorted(self.snapshots)))
        self.branches += 1
        path = self.directory / f"branch {self.branches}"
        self.store.branch(name, path)
        step, values = self.snapshots[name]
        if not move:
            with reopen(path) as branch:
                for index in RECORDS:
                    assert_holds(branch, index, values.get(index, (None, 0))[0], self.initial)
                assert (branch.step, branch.snapshots(), branch.verify()) == (step, {}, [])
            return
        self.store.close()
        self.path, self.step, self.committed, self.snapshots = path, step, dict(values), {}
        self._open()

    @rule(crash=st.booleans())
    def reopen(self, crash: bool) -> None:
        self._settle()
        if crash:
            abandon(self.store)
        else:
            self.store.close()
        self._open()

    @rule(index=blocks, writes_left=st.integers(0, 12))
    def crash_in_a_commit(self, index: int, writes_left: int) -> None:
        """Either all of the commit is there afterwards or nothing of it."""
        self._settle()
        before = dict(self.committed)
        self.device.writes_left = writes_left
        self.write(index, False, False)
        future: Future[None] = self.store.commit(self.step + 1, {"value": self.value})
        failed = future.exception(timeout=30) is not None
        abandon(self.store)
        if failed:
            self.committed = before
        else:
            self.step += 1
            self.committed = dict(self.newest)
        self._open()

    @precondition(lambda self: hasattr(self, "store"))
    @rule()
    def digest(self) -> None:
        """Equal contents give equal digests, unequal ones do not."""
        self._settle()
        found = self.store.digest()
        assert self.digests.setdefault(self._key(), found) == found
        assert len(set(self.digests.values())) == len(self.digests)
        assert self.store.verify() == []
        assert_accounted(self.store)

    def teardown(self) -> None:
        records.MEMBERS_KEPT = 1024
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.directory)

    def _open(self) -> None:
        self.device = Mortal()
        self.store = reopen(self.path, self.device)
        self.newest, self.accepted = dict(self.committed), dict(self.committed)
        assert self.store.step == self.step
        self._same_snapshots()
        self._check_all()

    def _same_snapshots(self) -> None:
        assert self.store.snapshots() == {name: step for name, (step, _) in self.snapshots.items()}

    def _check_all(self) -> None:
        for index in RECORDS:
            self.check(index)

    def _filled(self, index: int) -> RecordBuffer:
        """As sparse as the value says, whatever the version before was."""
        return filled(self.store.layout_of(index, self._sparsity(index, self.value)), self.value)

    def _sparsity(self, index: int, value: int) -> Sparsity:
        return sparsity_of(self.store, index, SHARES[value % len(SHARES)])

    def _settle(self) -> None:
        """Wait for commits under way, so that the committed state is the one expected."""
        self.store.commit(self.step, {"value": self.value}).result(timeout=30)
        self.committed, self.accepted = dict(self.newest), dict(self.newest)

    def _key(self) -> str:
        return repr(sorted(self.committed.items()))


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
