"""A byte-pair tokenizer: trained on the spot from the training documents, or given."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from weightstream.data.documents import Document
from weightstream.errors import DataError

END_OF_TEXT = "<|endoftext|>"
_TRAINING_CHARS = 1 << 26  # beyond 64 M characters merges no longer change much, and the counts must fit in memory


class Tokenizer:
    """A `tokenizers.Tokenizer` with the three facts that training needs: its size, where a text ends, its digest."""

    def __init__(self, inner: Any, end_of_text: int) -> None:
        self.inner = inner
        self.end_of_text = end_of_text

    @property
    def size(self) -> int:
        """One more than the largest token id."""
        return max(self.inner.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.inner.to_str().encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=True))

    def save(self, path: Path) -> None:
        path.write_text(self.inner.to_str(), encoding="utf-8")


def train_tokenizer(documents: Sequence[Document], size: int) -> Tokenizer:
    """Byte-level BPE with `size` tokens; equal documents in equal order give an equal tokenizer.

    Raises:
        DataError: the text has too few different pairs for that many tokens, or `size` cannot hold the 256 bytes.
    """
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if size < 257:
        raise DataError(
            f"data.tokenizer.size is {size}; a byte-level tokenizer needs at least 257 (256 bytes, end of text)"
        )
    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(_first_pieces(documents), trainer)
    return Tokenizer(inner, _end_of_text(inner, "the trained tokenizer"))


def load_tokenizer(path: Path) -> Tokenizer:
    """From a `tokenizer.json`, or from a folder that has one (every transformers folder with a fast tokenizer does).

    Raises:
        DataError: there is none, it cannot be read, or it has no token that ends a text.
    """
    from tokenizers import Tokenizer as Inner

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"no tokenizer at {file}; give a tokenizer.json or a folder that holds one")
    try:
        inner = Inner.from_file(str(file))
    except Exception as error:  # the Rust side raises plain Exception
        raise DataError(f"{file} is no tokenizer that can be read: {error}") from error
    return Tokenizer(inner, _end_of_text(inner, file))


def _end_of_text(inner: Any, name: object) -> int:
    vocabulary = inner.get_vocab(with_added_tokens=True)
    for name in (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]"):
        if name in vocabulary:
            return int(vocabulary[name])
    raise DataError(
        f"{name} has no token that ends a text (looked for {END_OF_TEXT}, </s>, <eos> and the like); add one"
    )


def _first_pieces(documents: Sequence[Document]) -> Iterator[str]:
    room = _TRAINING_CHARS
    for document in documents:
        for piece in document.pieces():
            yield piece
            room -= len(piece)
        if room <= 0:
            return
