"""What both executors emit: one record per operation and resource, with its beginning and its end.

The runtime measures its spans, the simulator predicts them; they are compared kind by kind, and shown on the same tracks.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """An operation, or the part of one that keeps one resource busy.

    `kind` is the operation's type in lower case (`forward`, `load`, …), `resource` the track that it lies on: `compute`,
    `read` and `write` (the disk), `down` and `up` (the link), `memory` (copies in host memory), `optimizer` (a processor
    beside the workers' own), `manifest`. Times are seconds since the step began; `waited_s` is the part at the
    beginning that passed before the resource was had, or before the bytes that it needs were there.
    """

    step: int
    rank: int
    kind: str
    resource: str
    what: str
    begin_s: float
    end_s: float
    nbytes: int = 0
    waited_s: float = 0.0

    @property
    def busy_s(self) -> float:
        """How long the resource worked for it."""
        return self.end_s - self.begin_s - self.waited_s
