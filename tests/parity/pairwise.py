"""A small table of cases in which every two values of any two factors meet: greedy and deterministic."""

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]
_Pair = tuple[str, int, str, int]  # factor, place of its value, and the same of a later factor


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Cases that cover all pairs of values. Each starts from the first pair still missing and then takes, factor by
    factor, the value that covers most missing pairs with the values already chosen."""
    names = list(factors)
    missing: dict[_Pair, None] = {
        (a, i, b, j): None
        for a, b in combinations(names, 2)
        for i, j in product(range(len(factors[a])), range(len(factors[b])))
    }
    cases = []
    while missing:
        first, i, second, j = next(iter(missing))
        chosen = {first: i, second: j}
        for name in names:
            if name not in chosen:
                # Ties go to a value that moves on with every case, so that no value is chosen by default.
                turn = [(place + len(cases)) % len(factors[name]) for place in range(len(factors[name]))]
                chosen[name] = max(turn, key=lambda value: len(_pairs(names, chosen | {name: value}) & missing.keys()))
        for pair in _pairs(names, chosen):
            missing.pop(pair, None)
        cases.append({name: factors[name][chosen[name]] for name in names})
    return cases


def _pairs(names: list[str], chosen: Mapping[str, int]) -> set[_Pair]:
    known = [name for name in names if name in chosen]
    return {(a, chosen[a], b, chosen[b]) for a, b in combinations(known, 2)}
