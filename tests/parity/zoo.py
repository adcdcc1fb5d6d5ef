"""Small models of every kind that streaming has to get right, with their data and loss.

Each is tiny (width 32, two to four layers), so that ten steps take about a second, and each is here for a reason:
Llama (grouped-query attention, rotary buffers), GPT-2 (tied head), T5 (one embedding used three times, an encoder
output and a position bias that many blocks read), ViT (parameters beside modules, no tokens), a Mixtral-like mixture
of experts with and without its router logits in the loss, and a hand-written module with skips across blocks and a
block called twice, alone and with tensors of its own between the blocks. A boundary activation has at least 4,096
bytes, the smallest that is worth spilling, in either precision.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 96
LLAMA_VOCABULARY = 544  # logits of one micro-batch beyond what PyTorch's CPU kernels leave to a single thread
MicroBatch = dict[str, Tensor]


@dataclass(frozen=True)
class ZooModel:
    """One model: how it is built, what it is fed, and which of its modules' calls are separate uses of a parameter."""

    name: str
    build_with_dropout: Callable[[float], nn.Module]
    micro_batch: Callable[[int, torch.Generator], MicroBatch]  # size of the raggedness, generator → inputs and labels
    calls: tuple[str, ...] = ()  # modules each of whose calls is one use of the parameters below them
    frozen_names: tuple[str, ...] = ()  # parameter names start so where `frozen` is asked for
    block_rules: Mapping[str, str] = field(default_factory=dict)  # how it is split, where not by the usual rules
    dropout: float = 0.0
    frozen: bool = False

    def with_(self, *, dropout: float | None = None, frozen: bool | None = None) -> "ZooModel":
        """The same model with another dropout probability, or with some parameters frozen."""
        return replace(
            self,
            dropout=self.dropout if dropout is None else dropout,
            frozen=self.frozen if frozen is None else frozen,
        )

    def build(self) -> nn.Module:
        model = self.build_with_dropout(self.dropout)
        if self.frozen:
            chosen = [p for name, p in model.named_parameters() if name.startswith(self.frozen_names)]
            assert chosen, f"{self.name} has no parameter that starts with one of {self.frozen_names}"
            for parameter in chosen:
                parameter.requires_grad_(False)
        return model

    def micro_batches(self, count: int, *, ragged: bool, step: int) -> list[MicroBatch]:
        """`count` micro-batches of step `step`, of equal size or all different."""
        generator = torch.Generator().manual_seed(1000 * step + 7)
        return [self.micro_batch((3 * i + step) % 4 if ragged else 1, generator) for i in range(count)]

    def token_shares(self, micro_batches: list[MicroBatch]) -> list[float]:
        """Each micro-batch's share of the step's targets, the weights of the numerical contract."""
        targets = [target_count(micro_batch) for micro_batch in micro_batches]
        return [count / sum(targets) for count in targets]

    @staticmethod
    def loss_fn(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        return model(**micro_batch).loss


def target_count(micro_batch: MicroBatch) -> int:
    """Labels that are predicted; where they are the inputs, the first of a row is not."""
    labels = micro_batch["labels"]
    shifted = "input_ids" in micro_batch and micro_batch["input_ids"].shape == labels.shape
    return int((labels[:, 1:] if shifted else labels).ne(-100).sum())


def _text(raggedness: int, generator: torch.Generator, vocabulary: int = VOCABULARY) -> MicroBatch:
    tokens = torch.randint(0, vocabulary, (2, 32 + 5 * raggedness), generator=generator)
    labels = tokens.clone()
    labels[0, : 5 + raggedness] = -100  # a prompt that is not trained on: token counts differ from sizes
    return {"input_ids": tokens, "labels": labels}


def _padded_text(raggedness: int, generator: torch.Generator) -> MicroBatch:
    """As `_text`, with an attention mask: tensors that need no gradient enter every block."""
    micro_batch = _text(raggedness, generator, LLAMA_VOCABULARY)
    mask = torch.ones_like(micro_batch["input_ids"])
    mask[1, 25 + raggedness :] = 0
    micro_batch["labels"][mask == 0] = -100
    return {**micro_batch, "attention_mask": mask}


def _pair(raggedness: int, generator: torch.Generator) -> MicroBatch:
    source = torch.randint(1, VOCABULARY, (2, 32 + 8 * raggedness), generator=generator)
    target = torch.randint(1, VOCABULARY, (2, 33 + 2 * raggedness), generator=generator)
    return {"input_ids": source, "labels": target}


def _images(raggedness: int, generator: torch.Generator) -> MicroBatch:
    count = 4 + raggedness
    pixels = torch.randn(count, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, 10, (count,), generator=generator)}


def _llama(dropout: float) -> nn.Module:
    config = LlamaConfig(
        vocab_size=LLAMA_VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_dropout=dropout,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _gpt2(dropout: float) -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, resid_pdrop=dropout, embd_pdrop=dropout,
        attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _t5(dropout: float) -> nn.Module:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=3, num_heads=4,
        dropout_rate=dropout, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def _vit(dropout: float) -> nn.Module:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4,
        num_labels=10, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return ViTForImageClassification(config)


def _mixtral(dropout: float, router_logits: bool) -> nn.Module:
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        attention_dropout=dropout, output_router_logits=router_logits, router_aux_loss_coef=0.05,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return MixtralForCausalLM(config)


class SkipBlock(nn.Module):
    """A residual block that takes keywords, may read a second stream, and gives a dictionary and a scalar back."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, *, skip: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        inner = self.norm(hidden if skip is None else hidden + skip)
        inner = self.down(F.gelu(self.up(inner))) * scale
        return {"hidden": hidden + self.dropout(inner), "size": inner.float().square().mean(), "inner": inner}


class SkipOutput:
    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class SkipNet(nn.Module):
    """Skips from an early block to later ones, a block called twice, an output nobody uses, glue with arithmetic.

    With `glue`, what the skips carry was made between blocks, and is read both by blocks and by later glue.
    """

    def __init__(self, width: int, dropout: float, *, glue: bool) -> None:
        super().__init__()
        self.glue = glue
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(SkipBlock(width, dropout) for _ in range(4))
        self.shared = SkipBlock(width, dropout)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> SkipOutput:
        embedded = self.embedding(input_ids)
        if self.glue:
            embedded, gate = torch.tanh(embedded.repeat(1, 1, 2) * 3).chunk(2, dim=-1)  # views of one tensor
            early = embedded * 0.5 + torch.sin(embedded)  # made before a block reads what it was made from
        else:
            gate = early = embedded
        first = self.blocks[0](embedded)
        hidden = first["hidden"]
        if self.glue:
            hidden = hidden * 1.3 + torch.sin(hidden)
        once = self.shared(hidden, scale=0.5)
        second = self.blocks[1](once["hidden"] + early if self.glue else once["hidden"], skip=first["inner"])
        mixed = second["hidden"] * torch.sigmoid(hidden) + gate
        third = self.blocks[2](mixed, skip=early)
        again = self.shared(third["hidden"], skip=hidden)
        fourth = self.blocks[3](again["hidden"], skip=once["inner"])
        logits = self.head(self.norm(fourth["hidden"] + hidden * embedded if self.glue else fourth["hidden"] + hidden))
        sizes = first["size"] + again["size"] + fourth["size"]
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return SkipOutput(loss + 0.01 * sizes)


_SKIP_FROZEN = ("embedding", "blocks.2.up", "blocks.1.")
_T5_CALLS = ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
ZOO: dict[str, ZooModel] = {
    model.name: model
    for model in (
        ZooModel("llama", _llama, _padded_text, frozen_names=("model.embed_tokens", "model.layers.1.")),
        ZooModel("gpt2", _gpt2, _text, ("transformer.wte", "lm_head"), ("transformer.wpe", "transformer.h.0.mlp")),
        ZooModel("t5", _t5, _pair, _T5_CALLS, ("encoder.block.0.", "decoder.block.1.layer.2")),
        ZooModel("vit", _vit, _images, frozen_names=("vit.embeddings",)),
        ZooModel("moe", lambda d: _mixtral(d, False), _text, frozen_names=("model.layers.0.mlp.gate", "lm_head")),
        ZooModel("moe_router", lambda d: _mixtral(d, True), _text, frozen_names=("model.layers.1.mlp.experts",)),
        ZooModel("skip", lambda d: SkipNet(32, d, glue=False), _text, ("shared",), _SKIP_FROZEN, {"shared": "block"}),
        ZooModel("glue", lambda d: SkipNet(32, d, glue=True), _text, ("shared",), _SKIP_FROZEN),
    )
}
