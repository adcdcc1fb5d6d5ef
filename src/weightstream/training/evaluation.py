"""The loss on sequences, weighted by target tokens, and text that a model continues; weights stream for both."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING

import torch
from torch import nn

from weightstream.data.batches import in_portions, micro_batch
from weightstream.data.dataset import Sequences
from weightstream.data.tokenizer import Tokenizer
from weightstream.errors import DataError

if TYPE_CHECKING:
    from weightstream.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean loss in nats per token, over this many target tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return exp(min(self.loss, 700.0))  # beyond that a float overflows, and nobody reads the number


def evaluate(engine: "Engine", sequences: Sequences, *, limit: int, size: int) -> Evaluation:
    """The loss on at most `limit` sequences, `size` per forward pass; drains the engine first, as any look does.

    Several ranks divide the passes among those that compute, and add what each found in order of pass: the figure does not
    depend on their number.
    """
    portions = in_portions(sequences, limit, size)
    found: list[tuple[int, float, int]] = []
    with engine.module() as model, torch.no_grad():
        for number in _own(engine, len(portions)):
            # all make the same calls of the model: who has nothing left in the last round does the first pass again
            batch = micro_batch(sequences, portions[number if number < len(portions) else 0])
            loss = float(model(**batch, use_cache=False).loss)
            if number < len(portions):
                found.append((number, loss, batch["labels"][:, 1:].numel()))  # the first token is nobody's target
    total, tokens = 0.0, 0
    for _, loss, targets in sorted(tuple(each) for own in engine.gather(found) for each in own):
        total += loss * targets
        tokens += targets
    return Evaluation(total / tokens, tokens)


def _own(engine: "Engine", count: int) -> range:
    """The passes of this rank, as many as every other one that computes makes."""
    if not engine.computes:
        return range(0)
    workers = len(engine.cluster.compute_ranks)
    first = engine.rank - engine.cluster.compute_ranks.start
    return range(first, -(-count // workers) * workers, workers)


def generate(
    engine: "Engine", tokenizer: Tokenizer, prompts: Sequence[str], *, tokens: int, temperature: float, seed: int
) -> list[str]:
    """Continue all prompts at once, so that the weights are fetched once per token for all of them.

    Raises:
        DataError: a prompt is empty.
    """
    if not all(prompts):
        raise DataError("a prompt is empty; give at least one character to continue")
    encoded = tokenizer.encode(prompts)
    width = max(map(len, encoded))
    # Padded on the left, so that all prompts end, and their continuations begin, at the same place.
    ids = torch.tensor([[tokenizer.end_of_text] * (width - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
    continued: list[list[int]] = []
    with engine.module() as model, torch.no_grad():
        if engine.computes:
            new = _continue(model, ids, mask, tokenizer.end_of_text, tokens, temperature, seed)
            continued = [_until(row.tolist(), tokenizer.end_of_text) for row in new]
    found: list[list[int]] = next(rows for rows in engine.gather(continued) if rows)
    return [tokenizer.decode(row) for row in found]


def _continue(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, end: int, tokens: int, temperature: float, seed: int
) -> torch.Tensor:
    """(prompts, up to `tokens`) new ids; greedy at temperature 0. A model without a cache is given all tokens each time."""
    generator = torch.Generator().manual_seed(seed)
    cache = None
    step_ids, new = ids, []
    finished = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -step_ids.shape[1] :]
        output = model(
            input_ids=step_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = getattr(output, "past_key_values", None)
        logits = output.logits[:, -1].float()
        if temperature > 0:
            step_ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            step_ids = logits.argmax(-1, keepdim=True)
        step_ids = step_ids.masked_fill(finished[:, None], end)
        finished |= step_ids[:, 0] == end
        new.append(step_ids)
        if finished.all():
            break
        mask = torch.cat([mask, torch.ones_like(step_ids)], dim=1)
        if cache is None:
            step_ids = torch.cat([ids, *new], dim=1)
    return torch.cat(new, dim=1)


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
