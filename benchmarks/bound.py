"""The least bytes that a step must move between memory and disk, from arithmetic alone (not from the engine's plan).

Per parameter, with b_w bytes streamed, b_g staged, and the share rho kept across the turn from forward to backward:
without clipping read 12 + (2 - rho) b_w and write 12 + b_w; with clipping the update has just produced the streamed
copy, so the forward reads none: read 12 + (1 - rho) b_w and write 12 + b_w, and b_g more each way only where gradients
wait on disk. In fp32 the streamed copy is the master, which is among the 12 already: an update neither reads nor writes
it a second time, but a fetch that no update has just made is a read of it.

rho counts only what is in use at the turn whatever the memory: the head and the final norm. A run that has memory for
more of the last layers moves less than this, one that fetches twice moves more.
"""

from dataclasses import dataclass

from workload import VOCABULARY, Workload

MASTER_AND_MOMENTS_BYTES = 12  # fp32 each: AdamW's two moments
STAGED_BYTES = 4  # fp32 sums


@dataclass(frozen=True)
class Bound:
    """Bytes per step."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


def bytes_bound(workload: Workload, *, precision: str, clipped: bool, staged_on_disk: bool) -> Bound:
    """The bound of one step of AdamW on `workload`; precision "bf16" or "fp32"."""
    parameters = workload.parameter_count()
    turned = parameters - VOCABULARY * workload.width - workload.width  # all but the head and the final norm
    streamed = {"bf16": 2, "fp32": 4}[precision]
    copy = streamed if precision == "bf16" else 0
    read = MASTER_AND_MOMENTS_BYTES * parameters + streamed * turned
    written = (MASTER_AND_MOMENTS_BYTES + copy) * parameters
    if not clipped:
        read += streamed * parameters
    elif staged_on_disk:
        read += STAGED_BYTES * parameters
        written += STAGED_BYTES * parameters
    return Bound(read, written)
