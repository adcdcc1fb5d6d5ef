"""The order of training: which sequences a step sees, as a pure function of (seed, step).

Nothing is shuffled and no state is kept, so a resumed run sees exactly what an uninterrupted one would have seen, and a
corpus of any size needs no table of indices. Each epoch visits every sequence once, in an order of its own.
"""

import hashlib
from dataclasses import dataclass

_ROUNDS = 4  # Luby and Rackoff (1988): four rounds of a keyed function make a pseudorandom permutation


@dataclass(frozen=True, slots=True)
class Permutation:
    """A pseudorandom permutation of range(count), computed per index: a Feistel network with cycle walking."""

    count: int
    key: bytes

    def __call__(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(f"index {index} is not in range({self.count})")
        half_bits = max(1, ((self.count - 1).bit_length() + 1) // 2)
        mask = (1 << half_bits) - 1
        while True:
            left, right = index >> half_bits, index & mask
            for turn in range(_ROUNDS):
                left, right = right, left ^ (self._mix(turn, right) & mask)
            index = (left << half_bits) | right
            # The network permutes a power of four; values beyond the range walk on along their cycle, which returns.
            if index < self.count:
                return index

    def _mix(self, turn: int, half: int) -> int:
        message = bytes([turn]) + half.to_bytes(8, "little")
        return int.from_bytes(hashlib.blake2b(message, key=self.key, digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Order:
    """The endless row of indices into `count` packed sequences: epoch after epoch, each permuted with its own key."""

    count: int
    seed: int

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self.count)
        key = hashlib.sha256(f"order,{self.seed},{epoch}".encode()).digest()
        return Permutation(self.count, key)(index)

    def take(self, position: int, count: int) -> list[int]:
        """The indices at positions [position, position + count)."""
        return [self[position + i] for i in range(count)]
