"""Which training step was which optimizer step, and under which optimizer: for records that make up for missed steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from weightstream.store.optimizers import Optimizer


@dataclass(slots=True)
class Past:
    """`optimizers` are those that a run had, each from a training step on; `skipped` are the training steps whose
    gradients were not finite, in order."""

    optimizers: list[tuple[int, Optimizer]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)

    def at(self, count: int) -> tuple[int, Optimizer]:
        """The training step that was the optimizer step of this number, both from 1, and its optimizer."""
        step = count
        for skipped in self.skipped:
            step += skipped <= step
        return step, next(optimizer for first, optimizer in reversed(self.optimizers) if first <= step)

    def goes_on(self, step: int, optimizer: Optimizer) -> None:
        """From this training step on the run has this optimizer."""
        if not self.optimizers or self.optimizers[-1][1].to_json() != optimizer.to_json():
            self.optimizers = [found for found in self.optimizers if found[0] < step]
            self.optimizers.append((step, optimizer))

    def to_json(self, skipped: Sequence[int] = ()) -> dict[str, Any]:
        """With further steps that were skipped."""
        optimizers = [[first, optimizer.to_json()] for first, optimizer in self.optimizers]
        return {"optimizers": optimizers, "skipped": [*self.skipped, *skipped]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        optimizers = [(first, Optimizer.from_json(found)) for first, found in data.get("optimizers", ())]
        return cls(optimizers, list(data.get("skipped", ())))
