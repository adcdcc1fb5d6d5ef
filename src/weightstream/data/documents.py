"""Documents: where text comes from, told apart by what it says.

A document is one text file, or one line of a `.jsonl` file with a `"text"` key. Documents are read one piece at a
time, so that memory does not grow with the corpus. The split into training and validation goes by content, not by
name: a document that occurs twice is kept once and so cannot stand on both sides.
"""

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightstream.errors import DataError

STDLIB = "stdlib"  # the source that needs no file: the Python standard library's own modules
PIECE_CHARS = 1 << 18  # long documents are read, encoded and counted in pieces of about this many characters
# Tests and installed packages are no part of the language and differ between systems.
_NOT_STDLIB = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"})
_TEXT_SUFFIXES = {
    ".txt",
    ".md",
    ".rst",
    ".py",
    ".jsonl",
    ".json",
    ".html",
    ".c",
    ".h",
    ".cpp",
    ".rs",
    ".go",
    ".js",
    ".tex",
}


@dataclass(frozen=True, slots=True)
class Document:
    """One text: a file, or the bytes `[offset, offset + nbytes)` of a `.jsonl` file."""

    path: Path
    nbytes: int
    offset: int | None = None

    def pieces(self) -> Iterator[str]:
        """The text in pieces that end with a line, unless lines are endless; what is no UTF-8 becomes U+FFFD."""
        if self.offset is not None:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                text = _jsonl_text(file.read(self.nbytes), self.path)
            yield from (text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS))
            return
        with self.path.open(encoding="utf-8", errors="replace", newline="") as file:
            while piece := file.read(PIECE_CHARS):
                # Finish the line, but not a line of gigabytes: a minified file has one.
                yield piece if piece.endswith("\n") else piece + file.readline(PIECE_CHARS)

    def digest(self) -> bytes:
        """SHA-256 of the text; the name, the place and the date of a file do not matter."""
        state = hashlib.sha256()
        for piece in self.pieces():
            state.update(piece.encode())
        return state.digest()


@dataclass(frozen=True, slots=True)
class Split:
    """Documents for training and for validation, in order of their digest, none in both."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    digest: str  # of the texts of both sides


def find_documents(sources: Sequence[str], *, base: Path) -> list[Document]:
    """All documents of files, folders and glob patterns, in order of path; relative ones start at `base`.

    Raises:
        DataError: a source does not exist, or nothing in it is text.
    """
    found: dict[Path, None] = {}
    for source in sources:
        paths = _stdlib_files() if source == STDLIB else _expand(source, base)
        if not paths:
            raise DataError(
                f"no text found in data.sources: {source!r} (looked from {base}); give files, folders or patterns"
            )
        found.update(dict.fromkeys(paths))
    documents = [document for path in sorted(found) for document in _documents_of(path)]
    if not any(document.nbytes for document in documents):
        raise DataError(f"the text in data.sources is empty: {', '.join(sources)} ({len(documents)} files of 0 bytes)")
    return [document for document in documents if document.nbytes]


def split_documents(documents: Sequence[Document], validation_share: float) -> Split:
    """Cut the documents, each text once, into training and validation by content alone.

    Validation takes, in order of digest, every document that still fits into its share of the bytes; at least one.

    Raises:
        DataError: there are fewer than two different documents, so that nothing could be held out.
    """
    texts = {document.digest(): document for document in documents}
    ordered = [texts[digest] for digest in sorted(texts)]
    if len(ordered) < 2:
        raise DataError(
            f"validation holds out whole documents, and {documents[0].path} is the only one; give at least two files, "
            "or a .jsonl file with one text per line"
        )
    room = validation_share * sum(document.nbytes for document in ordered)
    held_out: set[Document] = set()
    for document in ordered:
        if document.nbytes <= room:
            held_out.add(document)
            room -= document.nbytes
    if not held_out:
        held_out = {min(ordered, key=lambda document: document.nbytes)}
    return Split(
        train=tuple(document for document in ordered if document not in held_out),
        validation=tuple(document for document in ordered if document in held_out),
        digest=hashlib.sha256(b"".join(sorted(texts))).hexdigest(),
    )


def fingerprint(documents: Sequence[Document]) -> str:
    """A quick stand-in for the digest: unchanged names, sizes and dates mean unchanged text."""
    state = hashlib.sha256()
    for path in sorted({document.path for document in documents}):
        status = path.stat()
        state.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return state.hexdigest()


def _stdlib_files() -> list[Path]:
    return _files_below(Path(sysconfig.get_path("stdlib")), {".py"}, skipped=_NOT_STDLIB)


def _expand(source: str, base: Path) -> list[Path]:
    path = Path(source).expanduser()
    path = path if path.is_absolute() else base / path
    if path.is_dir():
        return _files_below(path, _TEXT_SUFFIXES)
    if path.is_file():
        return [path.resolve()]
    return sorted(Path(match).resolve() for match in glob.glob(str(path), recursive=True) if Path(match).is_file())


def _files_below(folder: Path, suffixes: set[str], skipped: frozenset[str] = frozenset()) -> list[Path]:
    found: list[Path] = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in skipped]  # os.walk does not enter what is taken out
        found += [Path(where, name).resolve() for name in names if Path(name).suffix in suffixes]
    return sorted(path for path in found if path.is_file())


def _documents_of(path: Path) -> Iterator[Document]:
    if path.suffix != ".jsonl":
        yield Document(path, path.stat().st_size)
        return
    with path.open("rb") as file:
        offset = 0
        for line in file:
            if line.strip():
                yield Document(path, len(line), offset)
            offset += len(line)


def _jsonl_text(line: bytes, path: Path) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{path}: expected lines such as {{"text": "…"}}, found {line[:80]!r}') from error
    if not isinstance(text, str):
        raise DataError(f'{path}: expected a string under "text", found {type(text).__name__}')
    return text
