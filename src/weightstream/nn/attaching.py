"""An engine's model: its layers of experts, their families in the store, and what their routers know beforehand."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from weightstream.blocks import Block
from weightstream.errors import ConfigError
from weightstream.nn.experts import StreamedExperts
from weightstream.nn.routers import check_numbers

INPUT_IDS = "input_ids"
_MOST_RECORDS = 2**63 - 1


def layers_of(model: nn.Module) -> dict[str, StreamedExperts]:
    """The layers of experts by name.

    Raises:
        ConfigError: together they have more experts than a store can number.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, StreamedExperts)}
    experts = sum(layer.experts for layer in found.values())
    if experts > _MOST_RECORDS - 2**32:
        raise ConfigError(
            f"{len(found)} layers of {experts:,} experts in all: a store can number {_MOST_RECORDS:,} records; give fewer "
            f"experts"
        )
    return found


def places_of(model: nn.Module, layers: Mapping[str, StreamedExperts]) -> dict[str, list[str]]:
    """All names that each layer has: modules may share one."""
    name_of = {id(layer): name for name, layer in layers.items()}
    places: dict[str, list[str]] = {name: [] for name in layers}
    for place, module in model.named_modules(remove_duplicate=False):
        if id(module) in name_of:
            places[name_of[id(module)]].append(place)
    return places


def check_places(places: Mapping[str, Sequence[str]], blocks: Sequence[Block]) -> None:
    """Refuses layers that no streamed block holds: micro-batches visit those one after another, and go back again.

    Raises:
        ConfigError: naming the layer.
    """
    streamed = [module for block in blocks if not block.resident for module in block.modules]
    for name, own in places.items():
        if not any(place.startswith(f"{module}.") for module in streamed for place in own):
            raise ConfigError(
                f"layer '{name}' (StreamedExperts) is in no block that streams: put it into a module with parameters of its "
                f"own, such as its norm or a whole decoder layer, or make one block of that module "
                f"(block_rules={{'<module>': 'block'}})"
            )


def blocks_of(places: Mapping[str, Sequence[str]], blocks: Sequence[Block]) -> frozenset[int]:
    """The blocks that layers lie in."""
    every = [place for own in places.values() for place in own]
    return frozenset(
        block.index
        for block in blocks
        if any(place.startswith(f"{module}.") for module in block.modules for place in every)
    )


def known_beforehand(layers: Mapping[str, StreamedExperts], micro_batches: Iterable[Any]) -> dict[str, list[int]]:
    """The experts that these micro-batches will reach, by layer, as far as they follow from their `input_ids`."""
    texts = [found[INPUT_IDS] for found in micro_batches if isinstance(found, Mapping) and INPUT_IDS in found]
    expected: dict[str, list[int]] = {}
    for name, layer in layers.items():
        numbers: set[int] = set()
        for ids in texts:
            if isinstance(ids, Tensor):
                found = layer.router.beforehand(ids, layer.experts, layer.top_k)
                if found is not None:
                    check_numbers(layer.router, found, layer.experts)
                    numbers.update(found.flatten().tolist())
        if numbers:
            expected[name] = sorted(numbers)
    return expected


def tokens_in(micro_batches: Iterable[Any]) -> int | None:
    """How many tokens these micro-batches have; None if one of them is no dict with `input_ids`."""
    total = 0
    for found in micro_batches:
        ids = found.get(INPUT_IDS) if isinstance(found, Mapping) else None
        if not isinstance(ids, Tensor):
            return None
        total += ids.numel()
    return total
