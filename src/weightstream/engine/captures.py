"""Outputs that transformers takes out of a block behind its back, made proper outputs of the block.

Since version 5, models collect router logits, attentions and hidden states by forward hooks that append to lists in a
context variable. A streamed block runs in the scheduler's thread, where that variable is empty, and runs again in
backward. So every execution of a block collects into lists of its own, and their new entries become outputs.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

State = dict[str, int]  # how many entries each list had when the block was called


class SideOutputs:
    """The protocol of `worker.tape.SideOutputs` for transformers' output capturing.

    Args:
        collector: the context variable that holds `{kind: list}` during a model's forward, or None.
    """

    def __init__(self, collector: Any) -> None:
        self._collector = collector
        self._others: dict[str, Any] = {}

    def begin(self) -> State | None:
        """In the micro-batch's thread, before a block runs."""
        outer = self._collector.get()
        if outer is None:
            return None
        self._others = {key: value for key, value in outer.items() if not isinstance(value, list)}
        return {key: len(value) for key, value in outer.items() if isinstance(value, list)}

    @contextmanager
    def collecting(self, state: State) -> Iterator[Callable[[], dict[str, list[Any]]]]:
        """Around every execution of the block; what is yielded returns what the block gave."""
        inner: dict[str, Any] = {**self._others, **{key: [None] * length for key, length in state.items()}}
        token = self._collector.set(inner)
        try:
            yield lambda: {key: inner[key][length:] for key, length in state.items()}
        finally:
            self._collector.reset(token)

    def deliver(self, state: State, side: dict[str, list[Any]]) -> None:
        """In the micro-batch's thread: the cut leaves go where the model expects them."""
        outer = self._collector.get()
        for key in state:
            outer[key].extend(side[key])


def find_side_outputs(model: nn.Module) -> SideOutputs | None:
    """The collector of the library that the model comes from, if that library is loaded and has one."""
    if not any(hasattr(module, "_can_record_outputs") for module in model.modules()):
        return None
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    return None if collector is None else SideOutputs(collector)
