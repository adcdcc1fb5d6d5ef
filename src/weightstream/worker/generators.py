"""Random state: every generator is seeded before each micro-batch, and travels with it from block to block."""

import hashlib
import random
from typing import Any

import numpy as np
import torch

State = tuple[Any, ...]


def seed_of(seed: int, step: int, micro_batch: int) -> int:
    """SHA-256 of (seed, step, micro-batch), as the numerical contract has it."""
    digest = hashlib.sha256(f"{seed},{step},{micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Generators:
    """All generators that a model may draw from: torch's (CPU and accelerator), Python's and NumPy's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = None if device.type == "cpu" else torch.get_device_module(device)

    def seed(self, value: int) -> None:
        # torch.manual_seed would queue a call, with its stack, for each kind of accelerator that is not there
        torch.default_generator.manual_seed(value)
        if self._module is not None:
            self._module.manual_seed_all(value)
        random.seed(value)
        np.random.seed(value % 2**32)

    def state(self) -> State:
        accelerator = None if self._module is None else self._module.get_rng_state(self._device)
        return torch.get_rng_state(), accelerator, random.getstate(), np.random.get_state()

    def restore(self, state: State) -> None:
        host, accelerator, python, numpy = state
        torch.set_rng_state(host)
        if self._module is not None:
            self._module.set_rng_state(accelerator, self._device)
        random.setstate(python)
        np.random.set_state(numpy)

    def same(self, one: State, other: State) -> bool:
        """Whether nothing was drawn between two states."""
        accelerators_equal = one[1] is None or torch.equal(one[1], other[1])
        numpy_equal = one[3][2:] == other[3][2:] and np.array_equal(one[3][1], other[3][1])
        return torch.equal(one[0], other[0]) and accelerators_equal and one[2] == other[2] and numpy_equal
