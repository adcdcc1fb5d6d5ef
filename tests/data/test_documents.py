"""Where text comes from: files, folders, patterns, lines; and the split by content."""

import json
from pathlib import Path

import pytest

from weightstream.data.documents import Document, find_documents, split_documents
from weightstream.errors import DataError


def _corpus(folder: Path, count: int = 20) -> None:
    for number in range(count):
        (folder / f"{number:02}.txt").write_text(f"text {number}\n" * (number + 1))


def test_files_folders_and_patterns_give_each_file_once(tmp_path: Path) -> None:
    _corpus(tmp_path)
    found = find_documents(["00.txt", ".", "*.txt"], base=tmp_path)
    assert [document.path.name for document in found] == [f"{number:02}.txt" for number in range(20)]


def test_the_standard_library_needs_no_file(tmp_path: Path) -> None:
    found = find_documents(["stdlib"], base=tmp_path)
    names = {document.path.name for document in found}
    assert {"sysconfig.py", "argparse.py"} <= names
    assert not any("site-packages" in document.path.parts for document in found)


def test_a_line_of_a_jsonl_file_is_a_document(tmp_path: Path) -> None:
    texts = ["first\nof two lines", "second – not ASCII"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n\n" for text in texts))
    found = find_documents(["a.jsonl"], base=tmp_path)
    assert ["".join(document.pieces()) for document in found] == texts


def test_pieces_join_to_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightstream.data.documents.PIECE_CHARS", 10)
    text = "ab\r\ncd\n" * 7 + "x" * 35
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = list(Document(tmp_path / "a.txt", len(text)).pieces())
    assert "".join(pieces) == text
    assert all(len(piece) <= 20 for piece in pieces)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.4])
def test_split_is_disjoint_whole_and_about_the_share(tmp_path: Path, share: float) -> None:
    _corpus(tmp_path, 40)
    documents = find_documents(["."], base=tmp_path)
    split = split_documents(documents, share)
    assert set(split.train) | set(split.validation) == set(documents)
    assert not set(split.train) & set(split.validation)
    held_out = sum(document.nbytes for document in split.validation)
    assert 0 < held_out <= max(share * sum(d.nbytes for d in documents), min(d.nbytes for d in documents))


def test_split_goes_by_content_and_takes_copies_once(tmp_path: Path) -> None:
    _corpus(tmp_path)
    first = split_documents(find_documents(["."], base=tmp_path), 0.2)
    for path in sorted(tmp_path.glob("*.txt")):
        path.rename(tmp_path / f"renamed-{path.name}")
    (tmp_path / "copy.txt").write_text((tmp_path / "renamed-07.txt").read_text())
    again = split_documents(find_documents(["."], base=tmp_path), 0.2)
    assert again.digest == first.digest
    assert len(again.train) + len(again.validation) == 20


def test_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no text found in data.sources: 'absent/\*\.txt'"):
        find_documents(["absent/*.txt"], base=tmp_path)


def test_empty_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="is empty"):
        find_documents(["."], base=tmp_path)


def test_a_single_document_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="is the only one"):
        split_documents(find_documents(["."], base=tmp_path), 0.1)


@pytest.mark.parametrize("line", ['{"body": "x"}', "not json", '{"text": 3}', "[1]"])
def test_a_bad_jsonl_line_is_shown(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    (document,) = find_documents(["a.jsonl"], base=tmp_path)
    with pytest.raises(DataError, match="expected"):
        list(document.pieces())
