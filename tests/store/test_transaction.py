"""The store by itself: reading records and changing them together."""

import contextlib
from pathlib import Path

import pytest
import torch
from tests.store.cases import BLOCKS, Full, make, reopen
from tests.store.test_families import EXPERTS, of

from weightstream.errors import StoreError
from weightstream.store.optimizers import AdamW


def test_changes_are_published_together(tmp_path: Path) -> None:
    with of(tmp_path / "store") as store:
        index = store.index(EXPERTS.name, 2**31)
        before = store.read(0)["embed.weight"]["param"]
        with store.transaction(step=7, progress={"at": 3}) as transaction:
            transaction[0]["embed.weight"]["param"].add_(1)
            transaction[index][f"layer.expert.{2**31}.scale"]["exp_avg"].fill_(5)
            assert store.version(0) == 0
            assert torch.equal(store.read(0)["embed.weight"]["param"], before)
        assert (store.version(0), store.version(index), store.optimizer_steps(0)) == (1, 1, 0)
    with reopen(tmp_path / "store") as store:
        assert (store.step, store.progress) == (7, {"at": 3})
        assert torch.equal(store.read(0)["embed.weight"]["param"], before + 1)
        assert store.read(index)[f"layer.expert.{2**31}.scale"]["exp_avg"].eq(5).all()
        assert store.verify() == []
        with store.transaction() as transaction:
            transaction[1]
        assert (store.step, store.progress) == (7, {"at": 3})


def test_an_update_is_the_optimizer_of_the_store(tmp_path: Path) -> None:
    gradients = [torch.randn(500, 8) for _ in range(3)]
    with make(tmp_path / "store") as store:
        wanted = torch.nn.Parameter(store.read(0)["embed.weight"]["param"])
        optimizer = torch.optim.AdamW([wanted], lr=0.1, weight_decay=AdamW().weight_decay, fused=True)
        for gradient in gradients:
            wanted.grad = gradient
            optimizer.step()
            with store.transaction(step=store.step + 1) as transaction:
                transaction.update(0, {"embed.weight": gradient})
        found = store.read(0)["embed.weight"]
        assert torch.equal(found["param"], wanted)
        assert torch.equal(found["exp_avg"], optimizer.state[wanted]["exp_avg"])
        assert (store.optimizer_steps(0), store.version(0)) == (3, 3)


def test_after_an_error_nothing_has_happened(tmp_path: Path) -> None:
    device = Full()
    with make(tmp_path / "store", device=device) as store:
        digest = store.digest()
        with contextlib.suppress(KeyboardInterrupt), store.transaction() as transaction:
            transaction[0]["embed.weight"]["param"].add_(1)
            raise KeyboardInterrupt
        with (
            pytest.raises(ValueError, match=r"expected shape \(500, 8\), found \(8,\)"),
            store.transaction() as transaction,
        ):
            transaction.update(0, {"embed.weight": torch.ones(8)})
        with pytest.raises(KeyError), store.transaction() as transaction:
            transaction.update(0, {"other": torch.ones(8)})
        device.full = True
        with pytest.raises(StoreError, match="make room on the disk"), store.transaction() as transaction:
            transaction[0]["embed.weight"]["param"].add_(1)
        device.full = False
        assert (store.digest(), store.version(0)) == (digest, 0)
        with store.transaction() as transaction:
            transaction[0]["embed.weight"]["param"].add_(1)
        assert store.digest() != digest
        assert store.verify() == []


def test_refusals(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        store.attached = True
        with pytest.raises(StoreError, match="is being trained"):
            store.transaction()
        for index in (-1, len(BLOCKS)):
            with pytest.raises(IndexError, match="the store has records 0 to 2"):
                store.read(index)
        with (
            reopen(tmp_path / "store", writable=False) as reader,
            pytest.raises(StoreError, match="opened for reading"),
        ):
            reader.transaction()
