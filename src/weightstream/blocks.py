"""What streams: a model on the meta device, split into blocks.

A block is the unit that is fetched, computed and evicted as a whole: the parameters of one module (a decoder layer, an
embedding, the head), or of several modules that share a tied parameter. The split is a pure function of the module tree.
"""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter tensor as the store sees it: its first name in the model, its shape, whether it is trained."""

    name: str
    shape: tuple[int, ...]
    trainable: bool = True

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Block:
    """The unit that streams.

    `modules` are the names of the modules whose call needs this block in a slab (more than one where a parameter is
    tied or where small leftovers of a split layer joined). A `resident` block is never evicted: the model's own
    leftovers, such as the final norm.
    """

    index: int
    name: str
    parameters: tuple[Parameter, ...]
    modules: tuple[str, ...]
    resident: bool = False

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def trainable(self) -> bool:
        """Whether any of its parameters is trained; a block that is not streams and nothing else."""
        return any(parameter.trainable for parameter in self.parameters)
