"""What both executors emit: one record per operation and resource, with its beginning and its end.

The runtime measures its spans, the simulator predicts them; they are compared kind by kind, and shown on the same tracks.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

RESOURCES = ("compute", "optimizer", "expand", "memory", "read", "write", "down", "up", "manifest")
"""The tracks, in the order in which they are shown."""


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


@dataclass(slots=True)
class Total:
    """What the operations of one kind came to on one resource.

    `seconds` are the resource's own: while it works for several at once, each has its part of the time. So the seconds of
    all kinds on a resource add up to the time in which it was busy at all.
    """

    count: float = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    nbytes: float = 0

    def add(self, other: "Total", times: float = 1.0) -> None:
        self.count += other.count * times
        self.seconds += other.seconds * times
        self.waited_s += other.waited_s * times
        self.nbytes += other.nbytes * times


Totals = dict[tuple[str, str], Total]
"""By kind and resource."""


def totals(spans: Iterable[Span]) -> Totals:
    """What spans came to; those of several ranks or steps are added up."""
    found: Totals = defaultdict(Total)
    tracks: dict[tuple[int, int, str], list[tuple[float, float, str]]] = defaultdict(list)
    for span in spans:
        total = found[span.kind, span.resource]
        total.count += 1
        total.waited_s += span.waited_s
        total.nbytes += span.nbytes
        tracks[span.step, span.rank, span.resource].append((span.begin_s + span.waited_s, span.end_s, span.kind))
    for (_, _, resource), busy in tracks.items():
        for kind, seconds in shares(busy).items():
            found[kind, resource].seconds += seconds
    return dict(found)


def shares(busy: Sequence[tuple[float, float, str]]) -> dict[str, float]:
    """How much of a resource's time each kind had: of `n` intervals that overlap each has an `n`th of that time."""
    found: dict[str, float] = defaultdict(float)
    edges = sorted(edge for begin, end, kind in busy for edge in ((begin, 1, kind), (end, -1, kind)))
    active: Counter[str] = Counter()
    running, since = 0, 0.0
    for at, change, kind in edges:
        if running and at > since:
            part = (at - since) / running
            for each, count in active.items():
                if count:
                    found[each] += part * count
        since = at
        active[kind] += change
        running += change
    return dict(found)


def extent(spans: Iterable[Span]) -> tuple[float, float]:
    """The first beginning and the last end."""
    begin, end = 0.0, 0.0
    for span in spans:
        begin, end = min(begin, span.begin_s), max(end, span.end_s)
    return begin, end
