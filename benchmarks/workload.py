"""What every benchmark trains: a Llama-like model of a given depth and width, on random tokens.

At 12 layers and width 1,024 it has 162,554,880 parameters (untied head, 4,096 tokens, 2,816 hidden units). Every side
of a comparison builds it from the same configuration and gets the same micro-batches, so that only the way of training
differs.
"""

import argparse
from dataclasses import dataclass
from typing import Self

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 4096
LONGEST_SEQUENCE = 512
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, CLIP_NORM = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step: the model's size, and `tokens` cut into `micro_batches` of equal size."""

    layers: int = 12
    width: int = 1024
    tokens: int = 2048
    micro_batches: int = 4

    def __post_init__(self) -> None:
        if self.width % 64:
            raise ValueError(f"width must be a multiple of 64 (the width of an attention head), found {self.width}")
        if self.tokens % self.micro_batches:
            raise ValueError(
                f"{self.tokens} tokens do not divide into {self.micro_batches} micro-batches of equal size"
            )
        each = self.tokens // self.micro_batches
        if each % min(each, LONGEST_SEQUENCE):
            raise ValueError(
                f"a micro-batch of {each} tokens is not a whole number of {LONGEST_SEQUENCE}-token sequences"
            )

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser, *, tokens: int = 2048, micro_batches: int = 4) -> None:
        parser.add_argument("--layers", type=int, default=12)
        parser.add_argument("--width", type=int, default=1024)
        parser.add_argument("--tokens", type=int, default=tokens, help="of one step")
        parser.add_argument("--micro-batches", type=int, default=micro_batches)

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Self:
        return cls(**{name: getattr(arguments, name) for name in ("layers", "width", "tokens", "micro_batches")})

    def arguments(self) -> list[str]:
        """The command-line arguments that make this workload again in another process."""
        pairs = {"layers": self.layers, "width": self.width, "tokens": self.tokens, "micro-batches": self.micro_batches}
        return [text for name, value in pairs.items() for text in (f"--{name}", str(value))]

    @property
    def shape(self) -> tuple[int, int]:
        """(sequences, tokens of each) of one micro-batch."""
        each = self.tokens // self.micro_batches
        length = min(each, LONGEST_SEQUENCE)
        return each // length, length

    def config(self) -> LlamaConfig:
        """The model's configuration: heads of 64, hidden units 2.75 times the width, head not tied to the embedding."""
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.width,
            intermediate_size=self.width * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            num_key_value_heads=self.width // 64,
            max_position_embeddings=LONGEST_SEQUENCE,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )

    def build(self) -> LlamaForCausalLM:
        """The model in fp32, with its own initialisation (or without any, under `torch.device("meta")`)."""
        return LlamaForCausalLM(self.config())

    def parameter_count(self) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build().parameters())

    def batches(self, step: int) -> list[dict[str, torch.Tensor]]:
        """The micro-batches of one step: tokens drawn uniformly, a function of the step alone."""
        generator = torch.Generator().manual_seed(step)
        drawn = [torch.randint(VOCABULARY, self.shape, generator=generator) for _ in range(self.micro_batches)]
        return [{"input_ids": tokens, "labels": tokens} for tokens in drawn]


def loss_fn(model: torch.nn.Module, micro_batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of one micro-batch."""
    return model(**micro_batch).loss


def decays(parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: not to norms and biases, as in the store's default groups."""
    return parameter.ndim > 1
