"""Models as a few numbers: blocks, their parameters, and what a token costs in each. Presets with their sources.

Only matrices and tables are counted: norms and biases are less than a thousandth of any preset.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from weightstream.errors import ConfigError
from weightstream.sparse.codec import mask_form

T = TypeVar("T")

FORWARD_PER_PARAMETER = 2.0
"""FLOPs of a token per parameter that it meets: one multiplication and one addition."""
ATTENTION_PER_POSITION = 4.0
"""FLOPs of a token per position of its sequence and element of the heads: scores and values, without the causal half
left out, which is how the figure of 1.59 PFLOP/s for GPT-J comes about (6·P + 12·layers·width·sequence a token)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseShape:
    """How sparse the matrices of all layers are; tables and the head are dense.

    Args:
        density: the part that exists, of what is sparse.
        block: rows and columns that exist together or not.
        share: the part of a layer's parameters that may be missing at all; the rest is dense.
        speedup: how many times faster products with them are; 1 where they are expanded and multiplied densely.
        says: where this comes from, for whoever reads the result.
    """

    density: float
    block: tuple[int, int] = (1, 1)
    share: float = 1.0
    speedup: float = 1.0
    says: str = ""

    def nonzeros(self, parameters: int) -> int:
        """Of so many parameters of layers, what exists of them: what is dense, and of the rest whole blocks."""
        sparse = round(self.share * parameters)
        each = self.block[0] * self.block[1]
        return parameters - sparse + min(sparse, self._cells(sparse)[1] * each)

    def mask_bytes(self, parameters: int) -> int:
        return mask_form(*self._cells(round(self.share * parameters)))[1]

    def _cells(self, sparse: int) -> tuple[int, int]:
        cells = sparse // (self.block[0] * self.block[1])
        return cells, min(cells, max(1, round(self.density * cells))) if cells else 0

    @property
    def cost(self) -> float:
        """What the products of a layer take, against dense ones."""
        return 1 - self.share + self.share / self.speedup


@dataclass(frozen=True, slots=True)
class Part:
    """What streams as one block: a layer, or a part of one where a layer is too large.

    Args:
        active: parameters that a token meets; fewer than `parameters` with experts or in a table.
        attention: elements of the heads whose attention it computes.
        input_width: elements per token that its backward needs again.
        saved_width: elements per token that it saves besides while it goes backward.
        in_layer: whether it is of a layer; what is not is never sparse.
    """

    name: str
    parameters: int
    active: float
    attention: float
    input_width: float
    saved_width: float = 0.0
    in_layer: bool = True

    def forward_flops(self, sequence: float, sparse: SparseShape | None = None) -> float:
        """Of one token in a sequence of so many; with kernels that leave zeros out, dense ones that take as long."""
        products = FORWARD_PER_PARAMETER * self.active
        if sparse is not None and self.in_layer:
            products *= sparse.cost
        return products + ATTENTION_PER_POSITION * sequence * self.attention

    def nonzeros(self, sparse: SparseShape | None) -> int:
        """Parameters that exist."""
        return self.parameters if sparse is None or not self.in_layer else sparse.nonzeros(self.parameters)

    def mask_bytes(self, sparse: SparseShape | None) -> int:
        return 0 if sparse is None or not self.in_layer else sparse.mask_bytes(self.parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder of equal layers (every `expert_every`-th with experts).

    Args:
        named: parameters that its name or its source gives.
        named_within: how far from that the shape may be, relatively.
        head_width: of one head; by default `width / heads`.
        gated: three matrices in the feed-forward part instead of two.
        positions: rows of a table of learned positions.
        tied: the head uses the embedding's parameters.
        unverified: what of it no source gives.
    """

    name: str
    named: float
    layers: int
    width: int
    heads: int
    intermediate: int
    vocabulary: int
    sequence: int
    named_within: float = 0.02
    kv_heads: int | None = None
    head_width: int | None = None
    gated: bool = False
    experts: int = 1
    experts_per_token: int = 1
    expert_every: int = 1
    positions: int = 0
    tied: bool = False
    source: str = ""
    unverified: str = ""

    @property
    def attention_width(self) -> int:
        """Elements of all heads together."""
        return self.heads * (self.head_width or self.width // self.heads)

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        share = (self.kv_heads or self.heads) / self.heads
        return round(self.width * self.attention_width * (2 + 2 * share))

    @property
    def expert_parameters(self) -> int:
        """Of one expert, or of the feed-forward part of a layer without experts."""
        return (3 if self.gated else 2) * self.width * self.intermediate

    def experts_of(self, layer: int) -> int:
        """1 for a layer without experts."""
        return self.experts if layer % self.expert_every == self.expert_every - 1 else 1

    def layer_parameters(self, layer: int) -> int:
        """Matrices of one layer, its router included."""
        experts = self.experts_of(layer)
        router = self.width * experts if experts > 1 else 0
        return self.attention_parameters + experts * self.expert_parameters + router

    @property
    def table_parameters(self) -> int:
        """The embedding, and so the head."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """All of them, each once."""
        tables = self.table_parameters * (1 if self.tied else 2) + self.positions * self.width
        return sum(self.layer_parameters(layer) for layer in range(self.layers)) + tables

    def forward_flops(self, sequence: int | None = None) -> float:
        """Of one token; backward takes twice that, and recomputing once more."""
        length = self.sequence if sequence is None else sequence
        return sum(part.forward_flops(length) for part in [*self.parts(), self.head()])

    def parts(self, most: float = float("inf"), layers: int | None = None) -> tuple[Part, ...]:
        """The embedding and the layers, in blocks of at most so many parameters; the head is apart.

        Args:
            layers: only so many of them.
        """
        return _parts(self, most, self.layers if layers is None else layers)

    def head(self) -> Part:
        """The last matrix, which makes scores over the vocabulary."""
        return Part("head", self.table_parameters, self.table_parameters, 0, self.width, in_layer=False)

    def heads_within(self, most: float) -> tuple[Part, ...]:
        """The head in blocks of at most so many parameters; one that is tied cannot be cut apart from its embedding."""
        if self.tied:
            return (self.head(),)
        sizes = _cut(self.table_parameters, most)
        return tuple(
            Part(f"head{mark}", size, size, 0, self.width / len(sizes), in_layer=False) for mark, size in sizes
        )

    def layer_parts(self, layer: int, most: float) -> list[Part]:
        """One layer, in blocks of at most so many parameters."""
        experts, name = self.experts_of(layer), f"layers.{layer}"
        used = min(self.experts_per_token, experts)
        whole = self.layer_parameters(layer)
        saved = self.saved_width(experts)
        if whole <= most:
            active = whole - (experts - used) * self.expert_parameters
            return [Part(name, whole, active, self.attention_width, self.width, saved)]
        # cut, the inputs of its matrices are what backward needs again, not the layer's alone
        attention = _cut(self.attention_parameters, most)
        parts = [
            Part(
                f"{name}.attention{mark}", size, size, self.attention_width / len(attention),
                2 * self.width / len(attention), saved / 2 / len(attention),
            )
            for mark, size in attention
        ]  # fmt: skip
        per_block = max(1, int(most // self.expert_parameters))
        groups = -(-experts // per_block)
        for group in range(groups):
            count = min(per_block, experts - group * per_block)
            pieces = _cut(count * self.expert_parameters, most)
            share = used / experts * count / len(pieces)
            width = (self.width + self.intermediate) * share
            label = f"{name}.experts.{group}" if experts > 1 else f"{name}.feed_forward"
            parts += [
                Part(
                    label + mark, size, size * used / experts, 0, width,
                    saved / 2 * count / experts / len(pieces),
                )
                for mark, size in pieces
            ]  # fmt: skip
        return parts

    def saved_width(self, experts: int = 1) -> float:
        """Elements of 2 bytes per token that one layer saves for its backward.

        17 times the width: 5.5 of the attention, 9.5 of the feed-forward part (of each expert that a token meets), 2 of
        the norms, without attention scores (Korthikanti et al. 2022, arXiv:2205.05198, section 4.1: 34·s·b·h bytes).
        """
        used = min(self.experts_per_token, experts)
        feed_forward = 9.5 * used * self.intermediate / 4
        return 5.5 * self.attention_width + 2 * self.width + feed_forward


@lru_cache(maxsize=64)
def _parts(model: ModelShape, most: float, layers: int) -> tuple[Part, ...]:
    rows = model.table_parameters + model.positions * model.width
    found = [Part(f"embedding{mark}", size, 0, 0, 0, in_layer=False) for mark, size in _cut(rows, most)]
    for layer in range(layers):
        found += model.layer_parts(layer, most)
    return tuple(found)


def _cut(parameters: int, most: float) -> list[tuple[str, int]]:
    """Equal pieces of at most `most`, with what is added to the name of each; one piece keeps the name."""
    pieces = max(1, -(-parameters // int(most)) if most < parameters else 1)
    if pieces == 1:
        return [("", parameters)]
    base, more = divmod(parameters, pieces)
    return [(f"[{piece}/{pieces}]", base + (piece < more)) for piece in range(pieces)]


def _cerebras_gpt(name: str, named: float, layers: int, width: int, heads: int) -> ModelShape:
    # layers, widths, heads, vocabulary 50,257, 2,048 positions: table on the model card of cerebras/Cerebras-GPT-13B and
    # its sisters on Hugging Face, and arXiv:2304.03208; GPT-2's embeddings are tied
    return ModelShape(
        name=name, named=named, layers=layers, width=width, heads=heads, intermediate=4 * width, vocabulary=50257,
        sequence=2048, positions=2048, tied=True, source="Cerebras-GPT model cards; arXiv:2304.03208",
    )  # fmt: skip


_LLAMA = "Grattafiori et al. 2024, arXiv:2407.21783, table 3; vocabulary 128,256 from the models' config.json"
_MODELS = (
    # config.json of EleutherAI/gpt-j-6b: n_layer 28, n_embd 4096, n_head 16, vocab_size 50400; rotary, head untied
    ModelShape(
        name="gpt-j-6b", named=6.05e9,  # 6,053,381,344 on its model card
        layers=28, width=4096, heads=16, intermediate=16384, vocabulary=50400, sequence=2048,
        source="EleutherAI/gpt-j-6b, model card",
    ),
    # Brown et al. 2020, arXiv:2005.14165, table 2.1: 40 layers, d_model 5140, 40 heads of 128; 12.85e9 without the tables
    ModelShape(
        name="gpt3-13b", named=13e9, layers=40, width=5140, heads=40, head_width=128, intermediate=4 * 5140,
        vocabulary=50257, sequence=2048, positions=2048, tied=True, source="Brown et al. 2020, arXiv:2005.14165, table 2.1",
    ),
    # the same table: 96 layers, d_model 12288, 96 heads of 128
    ModelShape(
        name="gpt3-175b", named=175e9, layers=96, width=12288, heads=96, intermediate=4 * 12288, vocabulary=50257,
        sequence=2048, positions=2048, tied=True, source="Brown et al. 2020, arXiv:2005.14165, table 2.1",
    ),
    ModelShape(
        name="llama-8b", named=8.03e9, layers=32, width=4096, heads=32, kv_heads=8, intermediate=14336,
        vocabulary=128256, sequence=8192, gated=True, source=_LLAMA,
    ),
    ModelShape(
        name="llama-70b", named=70.6e9, layers=80, width=8192, heads=64, kv_heads=8, intermediate=28672,
        vocabulary=128256, sequence=8192, gated=True, source=_LLAMA,
    ),
    ModelShape(
        name="llama-405b", named=405e9, layers=126, width=16384, heads=128, kv_heads=8, intermediate=53248,
        vocabulary=128256, sequence=8192, gated=True, source=_LLAMA,
    ),
    # Narayanan et al. 2021, arXiv:2104.04473, table 1: 1008.0e9 parameters, 128 layers, hidden 25600, 160 heads
    ModelShape(
        name="1t", named=1008e9, layers=128, width=25600, heads=160, intermediate=4 * 25600, vocabulary=51200,
        sequence=2048, positions=2048, tied=True, source="Narayanan et al. 2021, arXiv:2104.04473, table 1",
    ),
    # Du et al. 2021, arXiv:2112.06905, table 4 (64B/64E): 1.2e12 parameters (1.162e12 in the text), 64 layers, M 8192,
    # H 32768, 128 heads of 128, 64 experts in every other layer, 2 a token; vocabulary 256,000
    ModelShape(
        name="1t-moe", named=1.162e12, layers=64, width=8192, heads=128, head_width=128, intermediate=32768,
        vocabulary=256000, sequence=1024, experts=64, experts_per_token=2, expert_every=2,
        source="GLaM 64B/64E, Du et al. 2021, arXiv:2112.06905, table 4",
    ),
    # no shape was ever published for 120 trillion parameters: width / layers is 186, between GPT-3's 128 and the 1T
    # model's 200; heads of 128 elements as GPT-3 has
    ModelShape(
        name="120t", named=120e12, layers=662, width=122880, heads=960, intermediate=4 * 122880, vocabulary=51200,
        sequence=2048, source="120 trillion: Wired, 2021-08-24", unverified="its shape is ours: none was published",
    ),
    # GPT-3's layers, each with 1,024 experts of the size of its feed-forward part, two of them a token
    ModelShape(
        name="120t-moe", named=120e12, layers=96, width=12288, heads=96, intermediate=4 * 12288, vocabulary=51200,
        sequence=2048, experts=1024, experts_per_token=2, source="120 trillion: Wired, 2021-08-24",
        unverified="its shape is ours: none was published",
    ),
    # Zvyagin et al. 2022, bioRxiv 10.1101/2022.10.10.511571: 10,240 codons on CS-2. The shape is GPT-3 XL's (Brown et al.,
    # table 2.1: 24 layers, 2048), whose 1.3e9 holds a text vocabulary; with codons it has 6% fewer
    ModelShape(
        name="genslm-1.3b", named=1.3e9, named_within=0.06, layers=24, width=2048, heads=16, intermediate=8192,
        vocabulary=70, sequence=10240, positions=10240, tied=True, source="bioRxiv 10.1101/2022.10.10.511571",
        unverified="its shape is taken to be that of GPT-3 XL, with a vocabulary of codons",
    ),
    _cerebras_gpt("cerebras-gpt-111m", 111e6, 10, 768, 12),
    _cerebras_gpt("cerebras-gpt-256m", 256e6, 14, 1088, 17),
    _cerebras_gpt("cerebras-gpt-590m", 590e6, 18, 1536, 12),
    _cerebras_gpt("cerebras-gpt-1.3b", 1.316e9, 24, 2048, 16),
    _cerebras_gpt("cerebras-gpt-2.7b", 2.65e9, 32, 2560, 32),
    _cerebras_gpt("cerebras-gpt-6.7b", 6.66e9, 32, 4096, 32),
    _cerebras_gpt("cerebras-gpt-13b", 12.85e9, 40, 5120, 40),
)  # fmt: skip
MODELS: Mapping[str, ModelShape] = {model.name: model for model in _MODELS}


def model_named(name: str) -> ModelShape:
    """The preset of that name.

    Raises:
        ConfigError: there is none; the nearest is named.
    """
    return known(name, MODELS, "--model")


def known(name: str, presets: Mapping[str, T], option: str) -> T:
    """What a name stands for.

    Raises:
        ConfigError: nothing; the nearest name is in the message.
    """
    if name in presets:
        return presets[name]
    near = difflib.get_close_matches(name.lower(), presets, n=1, cutoff=0.3)
    meant = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"{option} {name}: no preset of that name; {meant}known: {', '.join(presets)}")
