"""Tiny transformers models, saved as from_pretrained reads them."""

from pathlib import Path
from typing import Any

import pytest
import torch

SETTINGS: dict[str, Any] = {
    "clip_norm": 1.0, "precision": "fp32", "device_memory": "64MiB", "host_memory": "256MiB", "threads_per_worker": 1
}  # fmt: skip


def tiny_llama(seed: int = 1) -> Any:
    """Untied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        )
    )  # fmt: skip


def tiny_gpt2(seed: int = 2) -> Any:
    """Tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64, **dropout))


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return {"llama": tiny_llama, "gpt2": tiny_gpt2}[request.param]().eval()


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    tiny_llama().save_pretrained(folder)
    return folder
