"""A mixture-of-experts layer of any number of experts, of which none exists in memory until a token reaches it."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from weightstream.blocks import Parameter
from weightstream.errors import ConfigError
from weightstream.nn import grouping
from weightstream.nn.grouping import ACTIVATIONS, Activation, Grouping
from weightstream.nn.routers import MOST_EXPERTS, Router, check_numbers
from weightstream.store.families import Family
from weightstream.store.initial import generate
from weightstream.store.recipes import Recipe, Step

Untouched = Literal["frozen", "dense"]
W_IN, W_OUT = "w_in", "w_out"
_MOST_RESIDENT_BYTES = 1 << 30


class Source(Protocol):
    """Where a layer's weights come from in a step, and where their gradients go."""

    def routed(self, numbers: Tensor) -> Tensor:
        """The experts that these assignments go to: themselves, or others in place of those that may not come to exist."""

    def weights(self, numbers: Tensor, counts: Tensor) -> list[Tensor]:
        """The packed weights of these experts, which get so many rows each: `w_in` (touched, d_hidden, d_model) and
        `w_out` (touched, d_model, d_hidden)."""

    def gradients(self, numbers: Tensor, gradients: list[Tensor]) -> None:
        """Takes the gradients of the same, packed alike, for good."""


class StreamedExperts(nn.Module):
    """Experts `w_out · activation(w_in · x)`; each token goes to `top_k` of them, as the router says.

    Under an engine the experts are records of a family of the store (`docs/store.md`): one that no token ever reached is
    defined by the seed and takes no bytes, and a step fetches, computes, updates and writes only those that its tokens
    reach. The layer must be inside a block that streams, that is, in a module with parameters of its own, such as a
    decoder layer. Without an engine, `resident` holds a small number of experts as ordinary parameters.

    Args:
        d_model, d_hidden: width of the input and output, and within an expert.
        experts: how many there are, up to 2**62.
        top_k: how many each token goes to.
        router: chooses them.
        activation: "gelu", "silu" or "relu".
        untouched: what a step means for an expert that it did not reach. "frozen": nothing; an expert has its own number
            of optimizer steps (lazy updates). "dense": a gradient of zeros; decay and moments are made up for when it is
            next reached, so that the result is that of dense training. The work of that grows with the steps missed.

    Raises:
        ConfigError: sizes that do not go together.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        experts: int,
        top_k: int,
        router: Router,
        *,
        activation: Activation = "gelu",
        untouched: Untouched = "frozen",
    ) -> None:
        super().__init__()
        if d_model < 1 or d_hidden < 1 or experts < 1:
            raise ConfigError(f"StreamedExperts: expected sizes of at least 1, found {d_model}, {d_hidden}, {experts}")
        if experts > MOST_EXPERTS:
            raise ConfigError(
                f"StreamedExperts: {experts:,} experts are more than their numbers can tell apart; at most 2**62 fit"
            )
        if not 1 <= top_k <= experts:
            raise ConfigError(f"StreamedExperts: top_k must be from 1 to the {experts:,} experts, found {top_k}")
        if activation not in ACTIVATIONS:
            raise ConfigError(f"StreamedExperts: activation must be one of {ACTIVATIONS}, found {activation!r}")
        if untouched not in ("frozen", "dense"):
            raise ConfigError(f"StreamedExperts: untouched must be 'frozen' or 'dense', found {untouched!r}")
        router.check(d_model, experts, top_k)
        self.d_model, self.d_hidden, self.experts, self.top_k = d_model, d_hidden, experts, top_k
        self.router, self.activation, self.untouched = router, activation, untouched
        self.held: nn.ParameterDict | None = None
        self._source: Source | None = None

    def forward(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """(..., d_model) to the same. `ids` are token ids, (...), for routers that go by them."""
        tokens = hidden.reshape(-1, self.d_model)
        numbers, gates = self._routed(hidden, ids, tokens.shape[0])
        if not tokens.shape[0]:
            return (tokens * gates.sum(1, keepdim=True)).view(hidden.shape)
        if self.held is None and self._source is not None:
            numbers = self._source.routed(numbers)
        grouped = grouping.group(numbers)
        if self.held is not None:
            packed = [self.held[name].index_select(0, grouped.numbers) for name in (W_IN, W_OUT)]
            result = grouping.forward(tokens, gates, packed[0], packed[1], grouped, self.activation)[0]
        elif self._source is not None:
            if torch.is_grad_enabled() and not tokens.requires_grad:  # else nothing would lead back to the experts
                tokens = tokens.detach().requires_grad_()
            kind = tokens.device.type
            cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            if cast is not None:  # as products have it there; autograd casts gradients back
                tokens, gates = tokens.to(cast), gates.to(cast)
            result = _Streamed.apply(tokens, gates, _Products(grouped, self._source, self.activation, cast))
        else:
            raise ConfigError(
                f"StreamedExperts of {self.experts:,} experts is called without weights; train it by weightstream.Engine, or "
                f"call resident() on a layer that fits in memory"
            )
        return result.view(hidden.shape)

    def _routed(self, hidden: Tensor, ids: Tensor | None, tokens: int) -> tuple[Tensor, Tensor]:
        """What the router says."""
        numbers, gates = self.router(hidden, ids, self.experts, self.top_k)
        shape, who = (tokens, self.top_k), type(self.router).__name__
        if numbers.shape != shape or gates.shape != shape or numbers.dtype != torch.int64:
            raise ConfigError(
                f"{who}: expected experts (int64) and gates of shape {shape}, (tokens, top_k), found {tuple(numbers.shape)} "
                f"of {numbers.dtype} and {tuple(gates.shape)}; return them so from forward"
            )
        check_numbers(self.router, numbers, self.experts)
        return numbers, gates

    def attach(self, source: Source | None) -> Source | None:
        """Takes its weights from there from now on; gives where they came from before."""
        before, self._source = self._source, source
        return before

    def resident(self, name: str = "experts", seed: int = 0) -> "StreamedExperts":
        """Holds all experts as parameters, with the values that a store of this seed has for a layer of this name.

        Raises:
            ConfigError: they would take more than 1 GiB.
        """
        nbytes = 4 * self.experts * self.numel
        if nbytes > _MOST_RESIDENT_BYTES:
            raise ConfigError(
                f"StreamedExperts: {self.experts:,} experts would take {nbytes:,} bytes in memory; train them by "
                f"weightstream.Engine"
            )
        family = self.family(name)
        self.held = nn.ParameterDict()
        for short, parameter in zip((W_IN, W_OUT), family.parameters, strict=True):
            rows = (
                generate(family.recipes[parameter.name], seed=seed, name=own.name, shape=own.shape)
                for number in range(self.experts)
                for own in family.block(0, number).parameters
                if own.name.endswith(short)
            )
            self.held[short] = nn.Parameter(torch.stack(list(rows)))
        return self

    @property
    def numel(self) -> int:
        """Parameters of one expert."""
        return 2 * self.d_model * self.d_hidden

    def family(self, name: str) -> Family:
        """The family of records that a layer of this name has: uniform as in `nn.Linear`."""
        w_in, w_out = f"{name}.{{}}.{W_IN}", f"{name}.{{}}.{W_OUT}"
        parameters = (Parameter(w_in, (self.d_hidden, self.d_model)), Parameter(w_out, (self.d_model, self.d_hidden)))
        recipes = {w_in: _uniform(1 / math.sqrt(self.d_model)), w_out: _uniform(1 / math.sqrt(self.d_hidden))}
        return Family(f"{name}.{{}}", self.experts, parameters, recipes)

    def facts(self) -> dict[str, Any]:
        """What a resumed run may not change, as JSON."""
        own = {"experts": self.experts, "top_k": self.top_k, "d_model": self.d_model, "d_hidden": self.d_hidden}
        return {**own, "activation": self.activation, "untouched": self.untouched, **self.router.facts()}

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, {self.d_hidden}, experts={self.experts}, top_k={self.top_k}, "
            f"activation={self.activation!r}, untouched={self.untouched!r}"
        )


def _uniform(bound: float) -> Recipe:
    return Recipe((Step("uniform", (-bound, bound)),))


@dataclass(frozen=True, slots=True)
class _Products:
    grouping: Grouping
    source: Source
    activation: Activation
    cast: torch.dtype | None
    """What autocast computes in, where it is on."""

    def weights(self) -> list[Tensor]:
        found = self.source.weights(self.grouping.numbers, self.grouping.counts)
        return found if self.cast is None else [weights.to(self.cast) for weights in found]


class _Streamed(torch.autograd.Function):
    """The layer's products with weights that are no part of the graph: asked for in both directions."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gates: Tensor, products: _Products) -> Tensor:
        w_in, w_out = products.weights()
        with torch.autocast(
            hidden.device.type, enabled=False
        ):  # backward knows none, and computes with what this gives
            result, given, outputs = grouping.forward(
                hidden, gates, w_in, w_out, products.grouping, products.activation
            )
        none = torch.empty(0, dtype=torch.int64)  # what autograd keeps for us is measured, and dropped where it may be
        ctx.products = replace(products, grouping=products.grouping.of(none, none, none, none))
        ctx.save_for_backward(hidden, gates, given, outputs, *products.grouping.tensors)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        hidden, gates, given, outputs, *grouped = ctx.saved_tensors
        products: _Products = replace(ctx.products, grouping=ctx.products.grouping.of(*grouped))
        w_in, w_out = products.weights()
        with torch.autocast(hidden.device.type, enabled=False):
            hidden_grad, gate_grad, *own = grouping.backward(
                grads[0].contiguous(),
                hidden,
                gates,
                given,
                outputs,
                w_in,
                w_out,
                products.grouping,
                products.activation,
            )
        products.source.gradients(products.grouping.numbers, own)
        return hidden_grad, gate_grad, None
