"""From a model and its settings to the store that it is trained in: made, or reopened under the same settings."""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from weightstream.blocks import PANEL_ELEMENTS, Block, Rule, Unit, cut
from weightstream.engine.planning import Budgets, check_blocks, check_disk, split_within
from weightstream.errors import PlaceTakenError, StoreInUseError, StoreMismatchError
from weightstream.fabric.ranks import Ranks
from weightstream.masking.first_masks import FirstMasks, counts_now, given_counts, require_said
from weightstream.masking.masking import Masking
from weightstream.sparse.choosing import CHOSEN_KERNELS
from weightstream.sparse.settings import Sparsity
from weightstream.store.block_bytes import NEVER_SPARSE, Largest, bytes_of_blocks
from weightstream.store.directory import WORKERS, require_new
from weightstream.store.elsewhere import Elsewhere, catalogue_of
from weightstream.store.families import Family
from weightstream.store.given import fill, first_values, unfilled
from weightstream.store.glance import committed_step
from weightstream.store.initial import Recipe
from weightstream.store.layout import Precision
from weightstream.store.members import Members
from weightstream.store.optimizers import Optimizer
from weightstream.store.sparsity import Sparsity as StoredSparsity
from weightstream.store.sparsity import sparsity_from_json, sparsity_to_json
from weightstream.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run asks of its store."""

    path: Path
    optimizer: Optimizer
    precision: Precision
    budgets: Budgets
    contract: Mapping[str, Any]
    element_bytes: int
    max_block_bytes: int | None
    rules: Mapping[str, Rule] | None
    panel_elements: int | None
    allow_other_numerics: bool
    sparsity: Sparsity | None = None
    asked: Sparsity | None = None
    """The same as it was asked for, where not every group may say how masks begin."""
    dense: frozenset[str] = frozenset()
    """Parameters that stay dense unless a group of `sparsity` says otherwise."""
    kernels: Collection[str] = ()
    """Patterns of the parameters that kernels multiply by, where they are given."""
    choose_kernels: Callable[[Sequence[Block], Masking | None], Mapping[str, str]] | None = None
    """Which parameters kernels multiply by, where that is decided when the store is made."""
    families: tuple[Family, ...] = ()
    """Those of the model's layers of experts, in order; what they are is part of the contract."""

    def masking(self, units: Sequence[Unit], now: Mapping[int, StoredSparsity] | None = None) -> Masking | None:
        """The sparse parameters of a model that is cut into these units.

        Args:
            now: how sparse units are in a store; before there is one, masks that are given in files are read.

        Raises:
            ConfigError: the settings do not fit the model.
        """
        if self.sparsity is None:
            return None
        found = counts_now(self.sparsity, units, now) if now is not None else None
        counts = given_counts(self.sparsity, units, self.dense) if found is None else found
        return Masking(self.sparsity, units, self.dense, int(self.contract["seed"]), counts)

    @property
    def splitting(self) -> dict[str, Any]:
        return {"element_bytes": self.element_bytes, "max_block_bytes": self.max_block_bytes, "rules": self.rules}


def contract_of(model: nn.Module, *, optimizer: Optimizer, device: torch.device, **fixed: Any) -> dict[str, Any]:
    """What a resumed run may not change. Learning rate, decay, budgets, device memory, ranks and logging may."""
    shapes = [(n, list(p.shape), p.requires_grad) for n, p in sorted(model.named_parameters())]
    threads = fixed.pop("threads")
    return {
        "model": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
        "parameters": sum(p.numel() for p in model.parameters()),
        **fixed,
        "optimizer": optimizer.fixed(),
        "numerics": {
            "torch": torch.__version__.split("+")[0],
            "device": device.type,
            "threads_per_worker": threads,
        },
    }


@contextmanager
def opened(
    wanted: Wanted,
    model: nn.Module,
    recipes: Mapping[str, Recipe],
    initial: Mapping[str, Tensor],
    ranks: Ranks,
    *,
    exists: bool,
) -> Iterator[Store]:
    """The store, for what else may fail before a run begins: then it is closed again, and removed if it was made here.

    A rank that owns nothing has `Elsewhere` in its place.

    Raises:
        StoreMismatchError: it holds another model, or was made under other settings.
        PlanError: the budgets, or the disk, are too small.
    """
    store: Store | Elsewhere | None = None
    made = False
    try:
        # a store at step 0 may be one whose filling was cut short; what is there already is not written again
        fills = bool(initial) or wanted.sparsity is not None
        begun = exists and fills and ranks.rank == 0 and committed_step(wanted.path) == 0
        if not ranks.alone and ranks.gather(not exists or begun)[0]:
            ranks.agreed_slowly(lambda: _create_for_all(wanted, model, recipes, initial, ranks, exists=exists))
            made = not exists and ranks.rank == 0
        there = exists or not ranks.alone
        store = ranks.agreed(lambda: _memory(wanted, model, recipes, initial, ranks, exists=there))
        made = made or not there
        if ranks.alone:
            yield cast(Store, store)
            return
        facts = _catalogue(store) if isinstance(store, Store) and ranks.rank == 0 else None
        catalogue = ranks.gather(facts)[0]
        if store is None:
            store = Elsewhere(wanted.path, catalogue, wanted.path / WORKERS / f"{ranks.rank}")
            store.optimizer = wanted.optimizer
        ranks.gather(None)  # all have what is theirs there, before the first one may refuse and remove it
        yield cast(Store, store)
    except BaseException:
        if store is not None:
            store.close()
        if made:
            shutil.rmtree(wanted.path, ignore_errors=True)
        raise


@contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    """A store that is being made here; whatever else there is stays."""
    try:
        yield
    except (PlaceTakenError, StoreInUseError):
        raise
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _create_for_all(
    wanted: Wanted,
    model: nn.Module,
    recipes: Mapping[str, Recipe],
    initial: Mapping[str, Tensor],
    ranks: Ranks,
    *,
    exists: bool,
) -> None:
    """With several ranks the first one makes the store, or fills one that was made, and then all memory ranks open it."""
    if ranks.rank == 0:
        if exists:
            store = _filled(wanted, Store.open(wanted.path), initial)
        else:
            store = _made(wanted, model, recipes, initial)
        store.close()


def _memory(
    wanted: Wanted,
    model: nn.Module,
    recipes: Mapping[str, Recipe],
    initial: Mapping[str, Tensor],
    ranks: Ranks,
    *,
    exists: bool,
) -> Store | None:
    """The store of a memory rank."""
    if not ranks.owns:
        return None
    if not exists:
        return _made(wanted, model, recipes, initial)
    store = _reopen(wanted, model, ranks)
    return _filled(wanted, store, initial) if ranks.alone else store


def _made(wanted: Wanted, model: nn.Module, recipes: Mapping[str, Recipe], initial: Mapping[str, Tensor]) -> Store:
    store = _create(wanted, model, recipes, initial)
    with _removed_on_failure(wanted.path):
        return _filled(wanted, store, initial)


def _filled(wanted: Wanted, store: Store, initial: Mapping[str, Tensor]) -> Store:
    """The store with its first values and masks, if it lacks them; closed where that fails."""
    try:
        masking = wanted.masking(store.units) if unfilled(store) else None  # files of masks are read once
        fill(store, initial, None if masking is None else FirstMasks(masking, partial(first_values, store, initial)))
    except BaseException:
        store.close()
        raise
    return store


def _create(wanted: Wanted, model: nn.Module, recipes: Mapping[str, Recipe], initial: Mapping[str, Tensor]) -> Store:
    require_new(wanted.path)
    if wanted.asked is not None:
        require_said(wanted.asked, model, wanted.dense, initial.keys(), wanted.path)
    panel_elements = PANEL_ELEMENTS if wanted.panel_elements is None else wanted.panel_elements

    def largest_of(units: Sequence[Unit], *, in_sum: bool = False) -> Largest:
        masking = wanted.masking(units)
        if masking is not None and in_sum:  # as if a search had found this
            masking = wanted.masking(units, masking.in_proportion())
        return NEVER_SPARSE if masking is None else masking.largest()

    driven = [name for name, _ in model.named_parameters() if any(fnmatchcase(name, one) for one in wanted.kernels)]
    sizes = partial(
        bytes_of_blocks, precision=wanted.precision, optimizer=wanted.optimizer, panel_elements=panel_elements,
        driven=driven,
    )  # fmt: skip
    blocks = split_within(model, wanted.budgets, partial(sizes, largest_of=largest_of), **wanted.splitting)
    in_sum = partial(largest_of, in_sum=True)
    check_disk(wanted.path, sizes(blocks, largest_of=in_sum), deferred=wanted.budgets.deferred)
    masking = wanted.masking(cut(blocks, panel_elements=panel_elements, panels=wanted.optimizer.elementwise))
    contract = dict(wanted.contract)
    if wanted.choose_kernels is not None:
        contract[CHOSEN_KERNELS] = dict(wanted.choose_kernels(blocks, masking))
    with _removed_on_failure(wanted.path):
        return Store.create(
            wanted.path, blocks=blocks, recipes=recipes, optimizer=wanted.optimizer, precision=wanted.precision,
            contract=contract, panel_elements=panel_elements, masks=masking.initial() if masking else None,
            families=wanted.families,
        )  # fmt: skip


def _reopen(wanted: Wanted, model: nn.Module, ranks: Ranks) -> Store:
    path = wanted.path
    members = Members(ranks.rank, len(ranks.cluster.memory_ranks), ranks.exchange)
    store = Store.open(path, members=members)
    try:
        contract = dict(wanted.contract)
        if wanted.allow_other_numerics:
            contract["numerics"] = store.contract.get("numerics")
        if wanted.choose_kernels is not None and CHOSEN_KERNELS in store.contract:
            contract[CHOSEN_KERNELS] = store.contract[CHOSEN_KERNELS]
        store.check_contract(contract)
        found = {p.name: p.shape for block in store.blocks for p in block.parameters}
        needed = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name in sorted(found.keys() ^ needed.keys()):
            raise StoreMismatchError(
                f"store '{path}' {'has' if name in found else 'lacks'} parameter '{name}', the model "
                f"{'lacks' if name in found else 'has'} it; give another store or the same model"
            )
        if wanted.panel_elements not in (None, store.panel_elements):
            raise StoreMismatchError(
                f"store '{path}' was cut into units with panel_elements={store.panel_elements}, this run has "
                f"panel_elements={wanted.panel_elements}; it is fixed when a store is made: leave it out to use the store's, "
                f"or give another store"
            )
        if wanted.max_block_bytes is not None or wanted.rules:
            check_blocks(store, model, **wanted.splitting)
        store.optimizer = wanted.optimizer  # learning rate, decay and groups are this run's
    except BaseException:
        store.close()
        raise
    return store


def _catalogue(store: Store) -> dict[str, Any]:
    return catalogue_of(
        store.manifest.blocks(), precision=store.precision, optimizer=store.optimizer.to_json(),
        panel_elements=store.panel_elements, contract=store.contract, step=store.step, progress=store.progress,
    )  # fmt: skip


def sparsity_now(store: Store, owned: Sequence[int], ranks: Ranks) -> dict[int, StoredSparsity]:
    """How sparse each unit is that may be: whoever owns it knows. Every rank calls it, with what it owns."""
    if not store.masks:
        return {}
    own = [
        (unit, sparsity_to_json(store.sparsity(unit)))
        for unit in owned
        if any(parameter.name in store.masks for parameter in store.units[unit].parameters)
    ]
    return {unit: sparsity_from_json(found) for each in ranks.gather(own) for unit, found in each}
