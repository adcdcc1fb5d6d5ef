"""Text to sequences: the tokenizer, the token files, the cache beside the store, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from weightstream.data.dataset import DataConfig, Dataset, TokenizerConfig, prepare
from weightstream.data.documents import find_documents
from weightstream.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from weightstream.data.tokens import open_tokens, write_tokens
from weightstream.errors import DataError

CONFIG = DataConfig(sources=("text",), tokenizer=TokenizerConfig(size=300), validation_share=0.2)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for number in range(30):
        body = f"def function_{number}(argument):\n    return argument + {number}  # naïve\n" * (3 + number % 5)
        (tmp_path / "text" / f"{number}.py").write_text(body)
    return tmp_path


def test_training_a_tokenizer_is_deterministic_and_lossless(corpus: Path) -> None:
    documents = find_documents(["text"], base=corpus)
    one, two = train_tokenizer(documents, 320), train_tokenizer(documents, 320)
    assert one.digest == two.digest
    assert one.size == 320
    text = "for naïve in λ:\n\treturn\x00 🙂"
    assert one.decode(one.encode([text])[0]) == text


def test_a_tokenizer_can_be_given_as_file_or_folder(corpus: Path) -> None:
    trained = train_tokenizer(find_documents(["text"], base=corpus), 300)
    trained.save(corpus / "tokenizer.json")
    for path in (corpus, corpus / "tokenizer.json"):
        assert load_tokenizer(path).digest == trained.digest
        assert load_tokenizer(path).end_of_text == trained.end_of_text
    given = CONFIG.model_copy(update={"tokenizer": TokenizerConfig(path=Path("tokenizer.json"))})
    assert prepare(given, corpus / "data", base=corpus).tokenizer.digest == trained.digest


def test_token_files_hold_every_document_closed_by_end_of_text(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "weightstream.data.tokens._BATCH_CHARS", 700
    )  # so that batches end inside and at ends of documents
    monkeypatch.setattr("weightstream.data.documents.PIECE_CHARS", 64)
    documents = find_documents(["text"], base=corpus)
    tokenizer = train_tokenizer(documents, 300)
    file = write_tokens(corpus / "ids.bin", documents, tokenizer)
    assert file.ids.dtype == np.uint16
    ends = np.flatnonzero(file.ids == tokenizer.end_of_text)
    texts = np.split(np.asarray(file.ids), ends + 1)
    assert len(ends) == len(documents) == file.facts.documents
    assert [tokenizer.decode(ids.tolist()) for ids in texts[:-1]] == ["".join(d.pieces()) for d in documents]
    assert texts[-1].size == 0


def test_preparing_again_opens_what_is_there(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(CONFIG, corpus / "data", base=corpus)
    monkeypatch.setattr("weightstream.data.dataset.write_tokens", lambda *_: pytest.fail("encoded twice"))
    assert prepare(CONFIG, corpus / "data", base=corpus).digest == first.digest


def test_touched_files_with_the_same_text_are_the_same_data(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(CONFIG, corpus / "data", base=corpus)
    file = corpus / "text" / "3.py"
    file.write_text(file.read_text())
    monkeypatch.setattr("weightstream.data.dataset.write_tokens", lambda *_: pytest.fail("encoded twice"))
    assert prepare(CONFIG, corpus / "data", base=corpus).digest == first.digest


def test_changed_text_or_settings_are_other_data(corpus: Path) -> None:
    first = prepare(CONFIG, corpus / "data", base=corpus)
    other = prepare(CONFIG.model_copy(update={"validation_share": 0.3}), corpus / "data", base=corpus)
    (corpus / "text" / "3.py").write_text("changed")
    changed = prepare(CONFIG, corpus / "data", base=corpus)
    assert len({first.digest, other.digest, changed.digest}) == 3


def test_sequences_are_packed_end_to_end(corpus: Path) -> None:
    dataset = prepare(CONFIG, corpus / "data", base=corpus)
    sequences = dataset.train_sequences(16)
    assert len(sequences) == dataset.train.facts.tokens // 16
    rows = sequences.rows([2, 0])
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(rows, [dataset.train.ids[32:48], dataset.train.ids[:16]])


def test_too_few_tokens_are_refused_with_figures(corpus: Path) -> None:
    dataset = prepare(CONFIG, corpus / "data", base=corpus)
    with pytest.raises(
        DataError, match=r"training text has \d+ tokens = \d+ sequences of 16; at least 100000 are needed"
    ):
        dataset.train_sequences(16, at_least=100_000)
    with pytest.raises(DataError, match="validation text has"):
        dataset.validation_sequences(100_000)


def test_a_token_id_beyond_the_vocabulary_is_refused(corpus: Path) -> None:
    dataset = prepare(CONFIG, corpus / "data", base=corpus)
    dataset.train.check_vocabulary(300)
    with pytest.raises(DataError, match="token id 299, the model's vocabulary ends at 255"):
        dataset.train.check_vocabulary(256)


def test_what_is_refused_leaves_nothing_behind(corpus: Path) -> None:
    def check(dataset: Dataset) -> None:
        dataset.train.check_vocabulary(200)

    before = sorted(corpus.rglob("*"))
    with pytest.raises(DataError, match="vocabulary ends at 199"):
        prepare(CONFIG, corpus / "runs" / "one" / "data", base=corpus, check=check)
    assert sorted(corpus.rglob("*")) == before
    prepare(CONFIG, corpus / "data", base=corpus)
    with pytest.raises(DataError, match="vocabulary ends at 199"):
        prepare(CONFIG, corpus / "data", base=corpus, check=check)


def test_a_cut_or_changed_token_file_is_refused(corpus: Path) -> None:
    dataset = prepare(CONFIG, corpus / "data", base=corpus)
    path = dataset.train.path
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    with pytest.raises(DataError, match="bytes, .* were written"):
        open_tokens(path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match="differs from what was written"):
        open_tokens(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(DataError, match="does not describe a token file"):
        open_tokens(path)


def test_large_vocabularies_get_wide_ids(corpus: Path) -> None:
    documents = find_documents(["text"], base=corpus)
    tokenizer = train_tokenizer(documents, 300)
    tokenizer.inner.add_tokens([f"<{number}>" for number in range(70_000)])
    assert write_tokens(corpus / "ids.bin", documents, tokenizer).ids.dtype == np.uint32


def test_bad_tokenizers_are_named(corpus: Path) -> None:
    documents = find_documents(["text"], base=corpus)
    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(corpus / "absent.json")
    (corpus / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is no tokenizer that can be read"):
        load_tokenizer(corpus)
    trained = train_tokenizer(documents, 300)
    text = json.loads(trained.inner.to_str())
    text["added_tokens"] = []
    text["model"]["vocab"] = {k: v for k, v in text["model"]["vocab"].items() if k != END_OF_TEXT}
    (corpus / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(DataError, match="no token that ends a text"):
        load_tokenizer(corpus)
    with pytest.raises(DataError, match="at least 257"):
        train_tokenizer(documents, 200)
