"""Room that is planned for sparse records: enough for every version that a schedule comes to, and no more than one needs."""

from typing import Any

import pytest

from weightstream.blocks import Parameter, Unit
from weightstream.masking.masking import Masking
from weightstream.sparse.settings import Ramp, Sparsity, SparsityGroup
from weightstream.store.block_bytes import block_bytes
from weightstream.store.layout import RecordLayout, record_layout
from weightstream.store.optimizers import AdamW
from weightstream.store.sparsity import Sparsity as StoredSparsity

UNIT = Unit(0, 0, "block", (Parameter("large", (256, 512)), Parameter("small", (16, 64))))
"""Under Erdős–Rényi the small one stays whole for long."""


def layout_of(unit: Unit, sparsity: StoredSparsity) -> RecordLayout:
    return record_layout(unit, "bf16", AdamW(), sparsity)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"algorithm": "gmp", "sparsity": 0.8, "every": 1, "end": 200}, 200),
        ({"algorithm": "gmp", "sparsity": Ramp("linear", 0.8, 0.0), "every": 1, "end": 200}, 200),
        ({"algorithm": "static", "sparsity": 0.5}, 1),
        ({"algorithm": "set", "sparsity": 0.5, "every": 10, "end": 100, "dense_from": 50}, 100),
    ],
    ids=["rising", "falling", "static", "dense at last"],
)
def test_room_for_every_version_where_small_layers_stay_whole(settings: dict[str, Any], steps: int) -> None:
    group = SparsityGroup(patterns=("*",), distribution="erdos_renyi", **settings)
    masking = Masking(Sparsity((group,)), (UNIT,), frozenset(), 0)
    room = block_bytes((UNIT,), layout_of, largest=masking.largest())
    layouts = [layout_of(UNIT, masking.expected(version)[0]) for version in range(steps + 1)]
    assert 1 in {len(layout.sparsity) for layout in layouts}, "one of them is whole while the other is not"
    needed = max(layout.image_nbytes for layout in layouts)
    assert needed <= room.written < 1.02 * needed
    assert max(layout.fetched_nbytes for layout in layouts) <= room.fetched
