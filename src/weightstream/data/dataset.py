"""From the configured text to sequences: prepare once, keep beside the store, then read by position."""

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import numpy as np
from pydantic import Field

from weightstream.data.documents import STDLIB, find_documents, fingerprint, split_documents
from weightstream.data.order import Order
from weightstream.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from weightstream.data.tokens import TokenFile, open_tokens, write_tokens
from weightstream.errors import DataError
from weightstream.section import Section

_FORMAT = 1  # of the folder; a change of what is written here makes old folders unused, not misread


class TokenizerConfig(Section):
    """`data.tokenizer`: train one with `size` tokens, or give one with `path`."""

    path: Path | None = None
    """A tokenizer.json or a folder that holds one; without it a byte-pair tokenizer is trained on the training text."""
    size: int = Field(default=8192, ge=257)
    """Tokens of a trained tokenizer; ignored where `path` is given."""


class DataConfig(Section):
    """`data`: which text, which tokenizer, how much of it is held out."""

    sources: tuple[str, ...] = Field(default=(STDLIB,), min_length=1)
    """Files, folders, patterns; a line of a .jsonl is a document; `stdlib` is the standard library's own source."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    validation_share: float = Field(default=0.02, gt=0, lt=0.5)
    """The share of the text's bytes, in whole documents, that is held out for validation."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token ids packed end to end and cut into sequences of one length; what remains at the end is left out."""

    tokens: TokenFile
    length: int

    def __len__(self) -> int:
        return len(self.tokens.ids) // self.length

    def rows(self, indices: list[int]) -> np.ndarray:
        """The sequences at these indices: (len(indices), length) int64."""
        ids = self.tokens.ids
        return np.stack([ids[i * self.length : (i + 1) * self.length] for i in indices]).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Prepared text: both sides, the tokenizer, and a digest that says whether two runs trained on the same."""

    train: TokenFile
    validation: TokenFile
    tokenizer: Tokenizer
    digest: str

    def train_sequences(self, length: int, *, at_least: int = 1) -> Sequences:
        return _sequences(self.train, length, at_least, "training")

    def validation_sequences(self, length: int) -> Sequences:
        return _sequences(self.validation, length, 1, "validation")

    def order(self, sequences: Sequences, seed: int) -> Order:
        return Order(len(sequences), seed)


def prepare(config: DataConfig, folder: Path, *, base: Path, check: Callable[[Dataset], None] | None = None) -> Dataset:
    """Find, split and encode the text, or open what an earlier call left in `folder` for the same text and settings.

    `check` may refuse the dataset by raising; whoever refuses, `folder` is then as it was before.

    Raises:
        DataError: text or tokenizer missing, empty or unreadable.
    """
    documents = find_documents(config.sources, base=base)
    given = None
    if config.tokenizer.path is not None:
        path = config.tokenizer.path.expanduser()
        given = load_tokenizer(path if path.is_absolute() else base / path)
    settings = {
        "format": _FORMAT,
        "tokenizer": given.digest if given else config.tokenizer.size,
        "validation_share": config.validation_share,
    }
    note = folder / "prepared.json"
    key = _digest({**settings, "files": fingerprint(documents)})
    place, checked = _place_of(note, key), check is None
    noted = place is not None
    if place is None:
        split = split_documents(documents, config.validation_share)
        place = folder / _digest({**settings, "text": split.digest})[:16]
        if not place.is_dir():
            with _appearing(place) as unfinished:
                tokenizer = given or train_tokenizer(split.train, config.tokenizer.size)
                tokenizer.save(unfinished / "tokenizer.json")
                write_tokens(unfinished / "train.bin", split.train, tokenizer)
                write_tokens(unfinished / "validation.bin", split.validation, tokenizer)
                if check is not None:
                    check(_open(unfinished))
                    checked = True
    dataset = _open(place)
    if check is not None and not checked:
        check(dataset)
    if not noted:
        note.write_text(json.dumps({"key": key, "place": place.name}), encoding="utf-8")
    return dataset


def tokenizer_of(folder: Path, digest: str) -> Path | None:
    """The tokenizer of the text with that digest, among all that was ever prepared in a folder."""
    for file in sorted(folder.glob("*/tokenizer.json")):
        try:
            if _open(file.parent).digest == digest:
                return file
        except (DataError, OSError):  # an unfinished or damaged one is not it
            continue
    return None


def _open(place: Path) -> Dataset:
    train, validation = open_tokens(place / "train.bin"), open_tokens(place / "validation.bin")
    tokenizer = load_tokenizer(place / "tokenizer.json")
    digest = _digest(
        {"train": train.facts.digest, "validation": validation.facts.digest, "tokenizer": tokenizer.digest}
    )
    return Dataset(train, validation, tokenizer, digest)


def _place_of(note: Path, key: str) -> Path | None:
    """The folder that the last preparation used, if files and settings are those of then."""
    try:
        seen = json.loads(note.read_text(encoding="utf-8"))
        place = note.parent / seen["place"]
        return place if seen["key"] == key and place.is_dir() else None
    except (OSError, ValueError, KeyError, TypeError):  # whatever stands in that file
        return None


@contextmanager
def _appearing(place: Path) -> Iterator[Path]:
    """A folder that is `place` when the block ends well; else nothing is left, nor folders made for it."""
    made = [parent for parent in (place.parent, *place.parent.parents) if not parent.exists()]
    unfinished = (
        place.parent / f"unfinished-{socket.gethostname()}-{os.getpid()}"
    )  # two processes may prepare the same text at once
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        try:
            unfinished.replace(place)
        except OSError:
            if not place.is_dir():
                raise
            rmtree(unfinished)  # another host was first, with the same text and settings
    except BaseException:
        rmtree(unfinished, ignore_errors=True)
        with suppress(OSError):  # another host may have something there
            for parent in made:
                parent.rmdir()
        raise


def _sequences(tokens: TokenFile, length: int, at_least: int, side: str) -> Sequences:
    sequences = Sequences(tokens, length)
    if len(sequences) < at_least:
        raise DataError(
            f"the {side} text has {tokens.facts.tokens} tokens = {len(sequences)} sequences of {length}; "
            f"at least {at_least} are needed: give more text, shorter sequences or fewer at once"
        )
    return sequences


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
