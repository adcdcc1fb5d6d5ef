"""Token files: documents encoded once, in order, then memory-mapped.

A file is the bare ids (uint16, or uint32 where the vocabulary needs it), each document closed by the end-of-text
token. A JSON file of the same name says what it holds, with a digest, so that a file cut short or changed is refused.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from weightstream.data.documents import Document
from weightstream.data.tokenizer import Tokenizer
from weightstream.errors import DataError

_BATCH_CHARS = 1 << 21  # what the tokenizer encodes at once: enough to keep its threads busy, little enough to forget
_FULL_CHECK_BYTES = 1 << 30  # a larger file is only checked for its size: reading it all would delay every start


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFacts:
    """What the JSON file beside the ids says."""

    dtype: str
    tokens: int
    documents: int
    text_bytes: int
    largest_id: int
    digest: str


@dataclass(frozen=True, slots=True)
class TokenFile:
    """Ids on disk, mapped; `ids[a:b]` reads only those."""

    path: Path
    facts: TokenFacts
    ids: np.ndarray  # (tokens,) uint16 or uint32

    def check_vocabulary(self, vocabulary: int) -> None:
        """Refuse ids that an embedding of this many rows does not have.

        Raises:
            DataError: the largest id is beyond the vocabulary.
        """
        if self.facts.largest_id >= vocabulary:
            raise DataError(
                f"{self.path.name} holds token id {self.facts.largest_id}, the model's vocabulary ends at "
                f"{vocabulary - 1}; give the model vocab_size: {self.facts.largest_id + 1} or more"
            )


def write_tokens(path: Path, documents: Sequence[Document], tokenizer: Tokenizer) -> TokenFile:
    """Encode documents into `path` and its JSON; memory stays bounded by a batch of text. They appear whole or not."""
    dtype = np.dtype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32)
    unfinished = path.with_suffix(".unfinished")
    state, tokens, largest = xxhash.xxh3_128(), 0, 0
    with unfinished.open("wb") as file:
        for ids in _encode(documents, tokenizer):
            array = np.asarray(ids, dtype=dtype)
            tokens += array.size
            largest = max(largest, int(array.max(initial=0)))
            state.update(array.tobytes())
            file.write(array.tobytes())
        file.flush()
        os.fsync(file.fileno())
    facts = TokenFacts(
        dtype=dtype.name,
        tokens=tokens,
        documents=len(documents),
        text_bytes=sum(document.nbytes for document in documents),
        largest_id=largest,
        digest=state.hexdigest(),
    )
    unfinished.replace(path)
    note = path.with_suffix(".json.unfinished")
    note.write_text(json.dumps(asdict(facts), indent=2), encoding="utf-8")
    note.replace(path.with_suffix(".json"))
    return open_tokens(path)


def open_tokens(path: Path) -> TokenFile:
    """Map a token file and check it against what its JSON file says.

    Raises:
        DataError: it is missing, cut short or changed.
    """
    try:
        facts = TokenFacts(**json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path.with_suffix('.json')} does not describe a token file ({error}); delete {path.parent}"
        ) from error
    expected_bytes = facts.tokens * np.dtype(facts.dtype).itemsize
    found_bytes = path.stat().st_size if path.is_file() else 0
    if found_bytes != expected_bytes:
        raise DataError(
            f"{path} has {found_bytes} bytes, {expected_bytes} were written; delete {path.parent}, it is made anew"
        )
    if not facts.tokens:
        return TokenFile(path, facts, np.zeros(0, facts.dtype))
    ids = np.memmap(path, dtype=facts.dtype, mode="r")
    if expected_bytes <= _FULL_CHECK_BYTES and xxhash.xxh3_128_hexdigest(ids.data) != facts.digest:
        raise DataError(
            f"{path} differs from what was written (digest {facts.digest}); delete {path.parent}, it is made anew"
        )
    return TokenFile(path, facts, ids)


def _encode(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[list[int]]:
    batch: list[str] = []
    ends: list[bool] = []  # whether this piece is the last of its document
    chars = 0
    for document in documents:
        for piece in document.pieces():
            batch.append(piece)
            ends.append(False)
            chars += len(piece)
            if chars >= _BATCH_CHARS:
                # The document may be over with this piece; its end then comes as an empty piece of the next batch.
                yield from _encoded(batch, ends, tokenizer)
                batch, ends, chars = [], [], 0
        if ends:
            ends[-1] = True
        else:
            batch, ends = [""], [True]
    yield from _encoded(batch, ends, tokenizer)


def _encoded(batch: list[str], ends: list[bool], tokenizer: Tokenizer) -> Iterator[list[int]]:
    for ids, is_end in zip(tokenizer.encode(batch), ends, strict=True):
        yield [*ids, tokenizer.end_of_text] if is_end else ids
