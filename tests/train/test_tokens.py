from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from localexit.train.corpus import Corpus, load_corpus
from localexit.train.tokenizer import train_tokenizer
from localexit.train.tokens import TokenStream, load_tokens


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(60):
        (folder / f"{index}.txt").write_text(f"document number {index} says ünïcode {index * 7}\n" * 4)
    (folder / "long.txt").write_text("a long document in several pieces\n" * 2000)
    return load_corpus(str(folder))


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(corpus, vocab_size=300, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_stream_holds_every_document_and_its_end(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, split: str
) -> None:
    documents = corpus.train if split == "train" else corpus.valid
    stream = load_tokens(corpus, tokenizer, split=split, cache_dir=tmp_path)  # type: ignore[arg-type]
    expected = [token for document in documents for token in [*tokenizer.encode(document.text).ids, 0]]
    assert stream.tokens.dtype == np.uint16
    assert stream.tokens.tolist() == expected
    assert len(stream) == stream.header.num_tokens == len(expected)
    assert stream.split == split
    assert stream.num_bytes == sum(len(document.text.encode()) for document in documents)


def test_bits_per_byte_are_nats_per_token_in_other_units(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    stream = load_tokens(corpus, tokenizer, split="valid", cache_dir=tmp_path)
    nats_of_the_split = 2.5 * len(stream)
    assert stream.bits_per_byte(2.5) == pytest.approx(nats_of_the_split / math.log(2) / stream.num_bytes)


def test_a_stream_is_made_once(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = load_tokens(corpus, tokenizer, split="train", cache_dir=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}
    again = load_tokens(corpus, tokenizer, split="train", cache_dir=tmp_path)
    assert again.path == first.path
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}
    assert len(before) == 2


def test_streams_of_other_inputs_are_other_files(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = train_tokenizer(corpus, vocab_size=290, cache_dir=tmp_path)
    streams = [
        load_tokens(corpus, tokenizer, split="train", cache_dir=tmp_path),
        load_tokens(corpus, tokenizer, split="valid", cache_dir=tmp_path),
        load_tokens(corpus, other, split="valid", cache_dir=tmp_path),
        load_tokens(corpus, tokenizer, split="valid", end_of_text_id=7, cache_dir=tmp_path),
    ]
    assert len({stream.path for stream in streams}) == 4
    assert streams[3].tokens[-1] == 7


def test_large_ids_take_32_bits(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    stream = load_tokens(corpus, tokenizer, split="valid", end_of_text_id=2**16, cache_dir=tmp_path)
    assert stream.tokens.dtype == np.uint32
    assert stream.tokens[-1] == 2**16
    largest = load_tokens(corpus, tokenizer, split="valid", end_of_text_id=2**16 - 1, cache_dir=tmp_path)
    assert largest.tokens.dtype == np.uint16
    assert largest.tokens[-1] == 2**16 - 1


def test_a_stream_cannot_be_written_to(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    stream = load_tokens(corpus, tokenizer, split="valid", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        stream.tokens[0] = 1


def test_a_failed_write_is_begun_anew(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("localexit.train.tokens.json.dumps", fail)
        load_tokens(corpus, tokenizer, split="valid", cache_dir=tmp_path)
    assert not list((tmp_path / "tokens").glob("*.json"))
    assert len(load_tokens(corpus, tokenizer, split="valid", cache_dir=tmp_path)) > 0


def damage(path: Path, what: str) -> None:
    header = path.with_suffix(".json")
    content = json.loads(header.read_text())
    if what == "short":
        path.write_bytes(path.read_bytes()[:-2])
    elif what == "one bit":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    elif what == "gone":
        path.unlink()
    elif what == "not json":
        header.write_text("{")
    elif what == "other keys":
        header.write_text(json.dumps(content | {"more": 1}))
    elif what == "other format":
        header.write_text(json.dumps(content | {"format": 99}))
    elif what == "other dtype":
        header.write_text(json.dumps(content | {"dtype": "float64"}))


DAMAGES = ["short", "one bit", "gone", "not json", "other keys", "other format", "other dtype"]


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_files_are_refused_with_a_remedy(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, what: str
) -> None:
    path = load_tokens(corpus, tokenizer, split="valid", cache_dir=tmp_path).path
    damage(path, what)
    with pytest.raises(ValueError, match=r"^token stream: expected .*; got .*; delete .* they are made again$"):
        TokenStream(path)


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_files_in_the_cache_are_made_again(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, what: str
) -> None:
    first = load_tokens(corpus, tokenizer, split="valid", cache_dir=tmp_path)
    expected, header = first.tokens.tolist(), first.header
    # A file that is mapped must not shrink.
    del first
    path = next((tmp_path / "tokens").glob("*.bin"))
    damage(path, what)
    again = load_tokens(corpus, tokenizer, split="valid", cache_dir=tmp_path)
    assert again.tokens.tolist() == expected
    assert again.header == header


def test_a_file_too_large_to_hash_is_judged_by_its_size(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = load_tokens(corpus, tokenizer, split="valid", cache_dir=tmp_path).path
    damage(path, "one bit")
    monkeypatch.setattr("localexit.train.tokens.LARGEST_HASHED", path.stat().st_size)
    with pytest.raises(ValueError, match="sha256"):
        TokenStream(path)
    monkeypatch.setattr("localexit.train.tokens.LARGEST_HASHED", path.stat().st_size - 1)
    assert len(TokenStream(path)) > 0


def test_windows_do_not_overlap_and_leave_the_rest_out(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    stream = load_tokens(corpus, tokenizer, split="valid", cache_dir=tmp_path)
    windows = stream.windows(7)
    assert windows.shape == (len(stream) // 7, 7)
    assert windows.ravel().tolist() == stream.tokens[: windows.size].tolist()


def test_a_stream_shorter_than_a_context_is_refused(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    stream = load_tokens(corpus, tokenizer, split="valid", cache_dir=tmp_path)
    assert len(stream.windows(len(stream))) == 1
    with pytest.raises(ValueError, match=rf"^data: .* context of {len(stream) + 1} tokens in the valid split; got"):
        stream.windows(len(stream) + 1)
    with pytest.raises(ValueError, match=r"^context: expected at least 2 .*; got 1"):
        stream.windows(1)
