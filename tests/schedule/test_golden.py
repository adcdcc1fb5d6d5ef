"""Golden schedules: text files; a change of the planner shows as a diff of them (`--update-golden` writes them)."""

from pathlib import Path

import pytest
from tests.schedule.examples import block, chain, plan

from weightstream.schedule.allotment import Allotment, Facts
from weightstream.schedule.operations import Visit
from weightstream.schedule.verify import verify

GOLDEN = Path(__file__).parent / "golden"
SPILL = {"boundaries": ("disk", "host", "disk", "device")}
MEASURED = {"boundary_bytes": (4096,) * 4, "kept_bytes": (65536,) * 4, "activations": "recompute"}
TIED = (Visit(1, "embedding"), Visit(2, "layer"), Visit(1, "head"))

CASES = {
    "clip_steady": (chain(**MEASURED), True, {"slabs": 3}),
    "clip_first": (chain(**MEASURED), False, {"slabs": 3}),
    "no_clip": (chain(deferred=False, **MEASURED), True, {"slabs": 3}),
    "kept_across_the_turn": (chain(**MEASURED), True, {}),
    "spilled": (chain(), True, SPILL),
    "kept": (chain(), True, SPILL | {"keep": frozenset({1, 2})}),
    "tied": (chain(2, visits=TIED), True, {}),
    "two_slabs": (chain(5, prefetch=1), True, {"slabs": 2}),
    "one_record_buffer": (chain(3, micro_batches=1), True, {"record_buffers": 1}),
    "ranks": (chain(micro_batches=2, share=1, share_groups=1, sum_buffers=2, **MEASURED), True, {"slabs": 3}),
    "frozen": (chain(blocks=(block(0), block(1, trainable=False), block(2)), visits=tuple(
        Visit(index, f"b{index}") for index in range(3))), True, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_golden_schedule(name: str, update_golden: bool) -> None:
    facts: Facts
    facts, steady, changes = CASES[name]
    schedule, allotment = plan(facts, steady=steady, **changes)
    assert isinstance(allotment, Allotment)
    verify(schedule, facts, allotment)
    path, text = GOLDEN / f"{name}.txt", schedule.text()
    if update_golden:
        path.write_text(text)
    assert path.read_text().splitlines() == text.splitlines(), "if this is meant: pytest tests/schedule --update-golden"


def test_every_golden_file_has_its_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES)
