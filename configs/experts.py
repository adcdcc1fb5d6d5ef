"""A small decoder whose layers have experts without end: the model of `experts.yaml`, and a pattern for one's own.

What `weightstream fit` asks of a model that somebody's own code builds: `vocab_size` among its arguments; a forward that takes
`input_ids` and `labels` by name, and whatever else a causal language model of transformers may be given; `loss` and `logits`
on what that returns.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from weightstream.nn import HashRouter, StreamedExperts


class Layer(nn.Module):
    """Attention, and experts to which a hash of the last tokens leads."""

    def __init__(self, index: int, width: int, heads: int, experts: int, expert_width: int, hashed_tokens: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.experts_norm = nn.LayerNorm(width)
        router = HashRouter(tokens=hashed_tokens, seed=index)
        self.experts = StreamedExperts(width, expert_width, experts, top_k=1, router=router)

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        rows, length, width = x.shape
        shape = (rows, length, 3, self.heads, width // self.heads)
        query, key, value = self.qkv(self.attention_norm(x)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.experts(self.experts_norm(x), input_ids)


class Decoder(nn.Module):
    """`experts` are those of each layer; each has two matrices of `width` by `expert_width`."""

    def __init__(
        self,
        vocab_size: int,
        layers: int = 2,
        width: int = 256,
        heads: int = 4,
        experts: int = 256**4,
        expert_width: int = 28,
        hashed_tokens: int = 2,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(
            Layer(index, width, heads, experts, expert_width, hashed_tokens) for index in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: object) -> CausalLMOutput:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, input_ids)
        logits = self.head(self.norm(x))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
