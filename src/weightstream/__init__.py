"""weightstream: train PyTorch models that do not fit in memory; weights stream from a store that is the checkpoint.

Names are imported when first used, so that `import weightstream` and the command line's `--help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightstream import nn
    from weightstream.blocks import Block, Parameter
    from weightstream.engine.engine import Engine
    from weightstream.machine.sparsity import auto_kernels
    from weightstream.sparse.settings import Ramp, Sparsity, SparsityGroup
    from weightstream.store.families import Family
    from weightstream.store.optimizers import SGD, Adafactor, AdamW, Group, Lion, Torch
    from weightstream.store.recipes import Recipe
    from weightstream.store.schedules import constant, cosine, linear, wsd
    from weightstream.store.segments import RecordBuffer
    from weightstream.store.store import Store

__version__ = "0.1.0"
__all__ = [
    "SGD",
    "Adafactor",
    "AdamW",
    "Block",
    "Engine",
    "Family",
    "Group",
    "Lion",
    "Parameter",
    "Ramp",
    "Recipe",
    "RecordBuffer",
    "Sparsity",
    "SparsityGroup",
    "Store",
    "Torch",
    "auto_kernels",
    "constant",
    "cosine",
    "linear",
    "nn",
    "wsd",
]

_HOMES = {
    "Engine": "weightstream.engine.engine",
    "Store": "weightstream.store.store",
    "Block": "weightstream.blocks",
    "Parameter": "weightstream.blocks",
    "auto_kernels": "weightstream.machine.sparsity",
    "Family": "weightstream.store.families",
    "Recipe": "weightstream.store.recipes",
    "RecordBuffer": "weightstream.store.segments",
    **dict.fromkeys(("Ramp", "Sparsity", "SparsityGroup"), "weightstream.sparse.settings"),
    **dict.fromkeys(("SGD", "Adafactor", "AdamW", "Group", "Lion", "Torch"), "weightstream.store.optimizers"),
    **dict.fromkeys(("constant", "cosine", "linear", "wsd"), "weightstream.store.schedules"),
}


def __getattr__(name: str) -> Any:
    if name == "nn":
        return import_module("weightstream.nn")
    if name not in _HOMES:
        raise AttributeError(f"module 'weightstream' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
