"""Routers: exact numbers, whatever the batch; the best of all experts without scoring them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightstream.errors import ConfigError
from weightstream.nn import HashRouter, ProductKeyRouter, StreamedExperts
from weightstream.nn.attaching import layers_of


def test_hashes_are_those_of_integers_of_any_size() -> None:
    """SplitMix64 in Python's own integers, at sizes that no float holds."""
    experts, router = 2**61 + 12345, HashRouter(tokens=2, seed=7)
    ids = torch.tensor([[5, 0, 9]])
    mask = 2**64 - 1

    def mixed(word: int) -> int:
        word = (word + 0x9E3779B97F4A7C15) & mask
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        return word ^ (word >> 31)

    expected = []
    for before, token in itertools.pairwise([-1, 5, 0, 9]):
        state = int(router._start)
        for each in (before, token):
            state = mixed(state ^ (each + 1))
        state = mixed(state)
        first = state % experts
        second = mixed(state) % (experts - 1)
        expected.append([first, second + (second >= first)])
    assert router.beforehand(ids, experts, 2).tolist() == expected


@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_hashed_experts_differ_and_follow_from_the_last_tokens(experts: int, extra: int, tokens: int) -> None:
    top_k, router = experts, HashRouter(tokens=tokens)
    ids = torch.randint(0, 3, (2, 8), generator=torch.Generator().manual_seed(experts))
    found = router.beforehand(ids, experts + extra, top_k).view(2, 8, top_k)
    assert all(len(set(row)) == top_k for row in found.flatten(0, 1).tolist())
    assert int(found.min()) >= 0
    assert int(found.max()) < experts + extra
    start = 8 - tokens  # a token's experts do not depend on what stands before its context
    if start:
        other = ids.clone()
        other[:, :start] = 1
        assert torch.equal(found[:, -1], router.beforehand(other, experts + extra, top_k).view(2, 8, top_k)[:, -1])


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_product_keys_find_the_best_of_all(side: int, codebooks: int, top_k: int, seed: int) -> None:
    experts = side**codebooks
    top_k = min(top_k, experts)
    torch.manual_seed(seed)
    router = ProductKeyRouter(8, experts, codebooks, d_key=4)
    hidden = torch.randn(5, 8)
    numbers, gates = router(hidden, None, experts, top_k)
    parts = torch.einsum("nck,csk->ncs", router.query(hidden).view(5, codebooks, 4), router.keys)
    scores = torch.zeros(5, 1)
    for codebook in range(codebooks):
        scores = (scores.unsqueeze(2) + parts[:, codebook].unsqueeze(1)).flatten(1)
    best = scores.sort(dim=1, descending=True).values[:, :top_k]
    assert torch.equal(scores.gather(1, numbers), best)
    assert all(len(set(row)) == top_k for row in numbers.tolist())
    assert torch.allclose(gates, best.softmax(1) if top_k > 1 else best.sigmoid())


def test_sizes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="can tell apart"):
        StreamedExperts(8, 4, 2**62 + 1, 1, HashRouter())
    half = nn.ModuleList(StreamedExperts(8, 4, 2**62, 1, HashRouter()) for _ in range(2))
    with pytest.raises(ConfigError, match=r"2 layers of 9,223,372,036,854,775,808 experts in all: a store can number"):
        layers_of(half)
    with pytest.raises(ConfigError, match="top_k must be from 1 to the 4 experts, found 5"):
        StreamedExperts(8, 4, 4, 5, HashRouter())
    with pytest.raises(ConfigError, match="256 would do"):
        ProductKeyRouter(8, 250, 2)
    with pytest.raises(ConfigError, match="16 experts of width 8: the layer has 16 of width 4"):
        StreamedExperts(4, 4, 16, 1, ProductKeyRouter(8, 16, 2))
    layer = StreamedExperts(8, 4, 4, 1, HashRouter())
    with pytest.raises(ConfigError, match="pass the model's input_ids"):
        layer(torch.zeros(1, 3, 8))
    with pytest.raises(ConfigError, match="without weights"):
        layer(torch.zeros(1, 3, 8), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="would take"):
        StreamedExperts(8, 4, 2**32, 1, HashRouter()).resident()
