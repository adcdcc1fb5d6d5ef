"""Missed steps are made up for with what they had: their training step, and the optimizer of that time."""

import json

import weightstream as ws
from weightstream.families.past import Past


def test_a_count_leads_to_its_step_and_optimizer_after_skips_and_changes() -> None:
    slow, fast = ws.AdamW(lr=1e-4), ws.AdamW(lr=ws.cosine(1e-2, warmup=1, steps=9))
    past = Past()
    past.goes_on(1, slow)
    past.goes_on(3, slow)  # the same again is no change
    past.goes_on(6, fast)
    past = Past.from_json(json.loads(json.dumps(past.to_json(skipped=[2, 3, 7]))))
    good = [step for step in range(1, 12) if step not in (2, 3, 7)]
    found = [past.at(count) for count in range(1, len(good) + 1)]
    assert [step for step, _ in found] == good
    assert [optimizer.lr_at(step) for step, optimizer in found] == [
        (slow if step < 6 else fast).lr_at(step) for step in good
    ]


def test_an_optimizer_that_no_step_had_is_not_kept() -> None:
    past = Past()
    past.goes_on(4, ws.AdamW(lr=1.0))
    past.goes_on(4, ws.AdamW(lr=2.0))
    assert [(first, optimizer.lr) for first, optimizer in past.optimizers] == [(4, 2.0)]
