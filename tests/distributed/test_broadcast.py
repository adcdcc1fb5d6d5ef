"""Blocks on their way down come whole into every slab, whatever is late; a read that fails reaches everyone who waits."""

import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weightstream.fabric.broadcast as broadcast_module
from weightstream.cluster import Cluster
from weightstream.errors import FabricError, StoreError
from weightstream.fabric.broadcast import Broadcast, Span
from weightstream.fabric.links import Links
from weightstream.fabric.local import run_ranks
from weightstream.store.futures import done, new_future

CHUNK = 64


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast_module, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(broadcast_module, "AHEAD", 3)
    monkeypatch.setattr(broadcast_module, "UNITS", 4)  # so that tags are used again within a block


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    return Cluster(draw(st.integers(1, 11)), draw(st.sampled_from(["colocated", 1, 2, 3])))


@st.composite
def blocks(draw: st.DrawFn, cluster: Cluster) -> list[Span]:
    """Units of any size, also none, in a slab with room between them."""
    spans, at = [], 0
    for unit in range(draw(st.integers(0, 14))):
        at += draw(st.integers(0, 70))
        nbytes = draw(st.one_of(st.integers(0, 3), st.integers(0, 5 * CHUNK), st.sampled_from([CHUNK, 2 * CHUNK])))
        spans.append(Span(unit, at, at + nbytes, draw(st.sampled_from(cluster.memory_ranks))))
        at += nbytes
    return spans


def content(block: int, span: Span) -> bytes:
    return random.Random(1000 * block + span.unit).randbytes(span.stop - span.start)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 2**20))
def test_every_slab_holds_the_block(data: st.DataObject, seed: int) -> None:
    cluster = data.draw(clusters())
    asked = [data.draw(blocks(cluster)) for _ in range(data.draw(st.integers(1, 3)))]

    def work(links: Links) -> list[bytes]:
        draw = random.Random(f"{seed} {links.rank}")
        down = Broadcast(links.down, cluster)
        slabs = [bytearray(b"\xff" * max([0, *(span.stop for span in spans)])) for spans in asked]
        arrivals, readers = [], []
        with ThreadPoolExecutor(4) as pool:

            def read(block: int, span: Span, future: "Future[Any]", delay_s: float) -> None:
                time.sleep(delay_s)
                slabs[block][span.start : span.stop] = content(block, span)
                future.set_result(None)

            for block, spans in enumerate(asked):
                local: dict[int, Future[Any]] = {}
                for span in spans:
                    if span.owner == links.rank:
                        local[span.unit] = new_future()
                        delay_s = draw.choice([0, 0, 0.003])
                        readers.append(pool.submit(read, block, span, local[span.unit], delay_s))
                arrivals.append(down.start(memoryview(slabs[block]), spans, local))
            found = []
            for slab, (here, passed) in zip(slabs, arrivals, strict=True):
                here.result(timeout=30)
                found.append(bytes(slab))
                passed.result(timeout=30)
        down.close()
        assert [future.result() for future in readers] == [None] * len(readers)
        return found

    for rank, found in enumerate(run_ranks(cluster, work, timeout_s=30)):
        for block, spans in enumerate(asked):
            for span in spans:
                if rank in cluster.compute_ranks or rank == span.owner:
                    assert found[block][span.start : span.stop] == content(block, span), (rank, block, span)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_read_that_fails_reaches_everyone_who_waits(data: st.DataObject) -> None:
    cluster = data.draw(clusters())
    units = data.draw(st.integers(1, 4))
    owners = [data.draw(st.sampled_from(cluster.memory_ranks)) for _ in range(units)]
    spans = [Span(unit, unit * 150, (unit + 1) * 150, owner) for unit, owner in enumerate(owners)]
    broken = data.draw(st.sampled_from(spans))
    everyone = threading.Barrier(cluster.size)

    def work(links: Links) -> tuple[str, str]:
        down = Broadcast(links.down, cluster)
        slab = bytearray(150 * units)
        reads: dict[int, Future[Any]] = {span.unit: new_future() for span in spans if span.owner == links.rank}
        here, passed = down.start(memoryview(slab), spans, reads)
        for unit, read in reads.items():
            if unit == broken.unit:
                read.set_exception(StoreError(f"unit {unit}: checksum differs"))
            else:
                read.set_result(None)
        errors = [type(future.exception(timeout=20)).__name__ for future in (here, passed)]
        text = str(here.exception())
        later, _ = down.start(memoryview(slab), spans, reads)
        later.exception(timeout=20)  # the next block does not hang either
        down.close()
        everyone.wait(20)
        return errors[0], text

    started = time.monotonic()
    results = run_ranks(cluster, work, timeout_s=60)
    assert time.monotonic() - started < 15
    for rank, (kind, text) in enumerate(results):
        if rank == broken.owner:
            assert (kind, text) == (StoreError.__name__, f"unit {broken.unit}: checksum differs")
        elif rank in cluster.compute_ranks:
            assert kind == FabricError.__name__
            assert f"rank {broken.owner} stopped: unit {broken.unit}: checksum differs" in text


def test_more_units_than_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are of one size and what is owned is there at once: bytes of one unit would fit in the place of another."""
    monkeypatch.setattr(broadcast_module, "UNITS", 128)
    cluster = Cluster(3, "colocated")
    spans = [Span(unit, unit * 16, unit * 16 + 16, unit % 3) for unit in range(300)]

    def work(links: Links) -> bytes:
        down = Broadcast(links.down, cluster)
        slab = bytearray(16 * len(spans))
        for span in spans:
            if span.owner == links.rank:
                slab[span.start : span.stop] = content(0, span)
            elif links.rank == 0:
                time.sleep(1e-5)
        local = {span.unit: done(None) for span in spans if span.owner == links.rank}
        here, passed = down.start(memoryview(slab), spans, local)
        here.result(timeout=30)
        passed.result(timeout=30)
        down.close()
        return bytes(slab)

    whole = b"".join(content(0, span) for span in spans)
    assert run_ranks(cluster, work, timeout_s=30) == [whole] * 3
