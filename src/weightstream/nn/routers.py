"""Which experts a token goes to: by a hash of the tokens before it, or by learned product keys."""

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weightstream.errors import ConfigError

MOST_EXPERTS = 2**62
"""Records of a store have 64-bit numbers."""
_GOLDEN, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Router(nn.Module, ABC):
    """Chooses `top_k` different experts for each token."""

    @abstractmethod
    def forward(self, hidden: Tensor, ids: Tensor | None, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
        """The experts of each token, int64, and what each one's output is multiplied by: (tokens, top_k) both.

        Args:
            hidden: (..., d_model). ids: token ids, (...), of which the last dimension is the order of tokens.
        """

    def beforehand(self, ids: Tensor, experts: int, top_k: int) -> Tensor | None:
        """The experts of each token, if they follow from token ids alone."""
        return None

    def check(self, d_model: int, experts: int, top_k: int) -> None:
        """Refuses a layer that it cannot route.

        Raises:
            ConfigError: naming both sizes.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What decides its choices, as JSON: fixed with a store. Its parameters are not part of it."""


def check_numbers(router: Router, numbers: Tensor, experts: int) -> None:
    """Refuses numbers beyond a layer's experts: they would be records of another layer, or blocks of the store.

    Raises:
        ConfigError: naming the router and one of them.
    """
    if not numbers.numel():
        return
    least, most = (int(found) for found in numbers.aminmax())
    if least < 0 or most >= experts:
        raise ConfigError(
            f"{type(router).__name__}: expected experts from 0 to {experts - 1:,}, found {least if least < 0 else most:,}; "
            f"choose among those that the layer has"
        )


class HashRouter(Router):
    """Experts by a hash of the last `tokens` token ids; the same for any batch, on any machine; nothing is learned.

    It knows the ids of one call alone: what lies before them counts as the beginning of a text.
    Every expert counts alike (1 / top_k). The hash is the finaliser of SplitMix64 (Steele et al., "Fast Splittable
    Pseudorandom Number Generators", OOPSLA 2014), chained over the ids; routing by hash is Roller et al., "Hash Layers For
    Large Sparse Models", NeurIPS 2021.
    """

    def __init__(self, tokens: int = 2, seed: int = 0) -> None:
        super().__init__()
        if tokens < 1:
            raise ConfigError(f"HashRouter: tokens must be at least 1, found {tokens}")
        self.tokens, self.seed = tokens, seed
        digest = hashlib.sha256(f"weightstream hash router\0{seed}".encode()).digest()
        self._start = np.uint64(int.from_bytes(digest[:8], "little"))

    def forward(self, hidden: Tensor, ids: Tensor | None, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
        if ids is None or ids.shape != hidden.shape[:-1]:
            found = "none" if ids is None else f"of shape {tuple(ids.shape)}"
            raise ConfigError(
                f"HashRouter: expected token ids of shape {tuple(hidden.shape[:-1])}, found {found}; pass the model's "
                f"input_ids to the layer: experts(hidden, input_ids)"
            )
        numbers = self.beforehand(ids, experts, top_k).to(hidden.device)
        return numbers, torch.full(numbers.shape, 1.0 / top_k, dtype=hidden.dtype, device=hidden.device)

    def beforehand(self, ids: Tensor, experts: int, top_k: int) -> Tensor:
        tokens = ids.detach().cpu().to(torch.int64).numpy().astype(np.uint64) + np.uint64(1)  # 0: before the first one
        context = np.full(tokens.shape, self._start)
        for back in reversed(range(self.tokens)):
            shifted = np.zeros_like(tokens)
            if back < tokens.shape[-1]:
                shifted[..., back:] = tokens[..., : tokens.shape[-1] - back]
            context = _mixed(context ^ shifted)
        return torch.from_numpy(_distinct(context.reshape(-1), experts, top_k))

    def facts(self) -> dict[str, Any]:
        return {"router": "hash", "tokens": self.tokens, "seed": self.seed}

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, seed={self.seed}"


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's next output from each state; arithmetic is modulo 2**64."""
    words = words + _GOLDEN
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))


def _distinct(context: NDArray[np.uint64], experts: int, top_k: int) -> NDArray[np.int64]:
    """`top_k` different numbers below `experts` for each context, (contexts, top_k).

    The j-th is drawn from the `experts - j` that are left, so that none has to be drawn twice.
    """
    chosen = np.empty((context.size, top_k), dtype=np.int64)
    state = context
    for choice in range(top_k):
        state = _mixed(state)
        drawn = (state % np.uint64(experts - choice)).astype(np.int64)
        for before in np.sort(chosen[:, :choice], axis=1).T:
            drawn += drawn >= before
        chosen[:, choice] = drawn
    return chosen


class ProductKeyRouter(Router):
    """Learned keys for `codebooks` parts of a query: expert (i, j, …) has the sum of the scores of keys i, j, ….

    The best `top_k` of all experts are found exactly without scoring them: of sums, the best can be made of each part's
    best alone, so codebooks are merged one by one. The gates are the softmax over the chosen scores, of a single one its
    sigmoid, so that the router learns. Source: Lample et al., "Large Memory Layers with Product Keys", NeurIPS 2019,
    section 3.1 (there two codebooks).
    """

    def __init__(self, d_model: int, experts: int, codebooks: int = 2, d_key: int = 32) -> None:
        super().__init__()
        side = round(experts ** (1 / codebooks)) if codebooks >= 1 else 0
        if codebooks < 1 or side**codebooks != experts:
            raise ConfigError(
                f"ProductKeyRouter: experts must be a whole number to the power of codebooks, found {experts} experts and "
                f"{codebooks} codebooks; {max(side, 1) ** max(codebooks, 1)} would do"
            )
        self.side, self.codebooks, self.d_key = side, codebooks, d_key
        self.query = nn.Linear(d_model, codebooks * d_key, bias=False)
        self.keys = nn.Parameter(torch.empty(codebooks, side, d_key))
        nn.init.normal_(self.keys, std=d_key**-0.5)

    def check(self, d_model: int, experts: int, top_k: int) -> None:
        if self.query.in_features != d_model or self.side**self.codebooks != experts:
            raise ConfigError(
                f"ProductKeyRouter for {self.side**self.codebooks} experts of width {self.query.in_features}: the layer has "
                f"{experts} of width {d_model}; make both alike"
            )

    def forward(self, hidden: Tensor, ids: Tensor | None, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
        queries = self.query(hidden.reshape(-1, hidden.shape[-1])).view(-1, self.codebooks, self.d_key)
        scores = torch.einsum("nck,csk->ncs", queries, self.keys).float()
        kept = min(top_k, self.side)
        best, numbers = _best(scores[:, 0], kept)
        for codebook in range(1, self.codebooks):
            more, last = _best(scores[:, codebook], kept)
            sums = (best.unsqueeze(2) + more.unsqueeze(1)).flatten(1)
            joint = (numbers.unsqueeze(2) * self.side + last.unsqueeze(1)).flatten(1)
            best, places = _best(sums, min(top_k, sums.shape[1]))
            numbers = joint.gather(1, places)
        gates = best.softmax(1) if top_k > 1 else best.sigmoid()
        return numbers, gates.to(hidden.dtype)

    def facts(self) -> dict[str, Any]:
        return {"router": "product keys", "codebooks": self.codebooks, "side": self.side}

    def extra_repr(self) -> str:
        return f"side={self.side}, codebooks={self.codebooks}"


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest scores of each row and their places; of equal ones the first."""
    found, places = torch.sort(scores, dim=1, descending=True, stable=True)
    return found[:, :count], places[:, :count]
