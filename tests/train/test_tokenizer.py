from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from localexit.train import tokenizer as module
from localexit.train.cache import default_cache_dir, written_atomically
from localexit.train.corpus import Corpus, load_corpus
from localexit.train.tokenizer import END_OF_TEXT, as_pretrained, encode_pieces, split_pieces, train_tokenizer
from localexit.train.tokens import load_tokens

SENTENCES = "The cat sat on the mat; the dog's log isn't 12345 wide.\n\n    def cat(self): return -1  # ünï\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(40):
        words = " ".join(f"word{index * step % 17}" for step in range(1, 30))
        (folder / f"{index}.txt").write_text(SENTENCES + words + f"\nend {index}\n")
    return load_corpus(str(folder))


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(corpus, vocab_size=320, cache_dir=tmp_path_factory.mktemp("cache"))


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return next(encode_pieces(tokenizer, [text]))


def test_the_vocabulary_has_the_size_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 320
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert len(ids_of(tokenizer, SENTENCES)) < len(SENTENCES.encode()) / 2


@given(text=st.text())
@settings(deadline=None)
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=False) == text


WORDS = st.text(alphabet="ab1.'é", min_size=1, max_size=5)
GAPS = st.sampled_from([" ", "\n", "  ", "\n\n ", " \t\u2028", "\u2028"])


@given(parts=st.lists(st.tuples(WORDS, GAPS), max_size=40), size=st.integers(10, 50))
@settings(max_examples=300, deadline=None)
def test_pieces_are_short_and_encode_as_the_whole_does(
    tokenizer: Tokenizer, parts: list[tuple[str, str]], size: int
) -> None:
    text = "".join(word + gap for word, gap in parts)
    pieces = list(split_pieces(text, size))
    assert "".join(pieces) == text
    assert all(len(piece) <= size for piece in pieces)
    windows = [text[start : start + size] for start in range(len(text) - size + 1)]
    if all(re.search(r"\S[ \n]", window) for window in windows):
        joined = [token for ids in encode_pieces(tokenizer, pieces) for token in ids]
        assert joined == ids_of(tokenizer, text)


def test_pieces_are_cut_where_words_begin(tokenizer: Tokenizer) -> None:
    text = SENTENCES * 50
    pieces = list(split_pieces(text, 100))
    assert len(pieces) > 40
    assert all(piece[0] in " \n" for piece in pieces[1:])
    assert [token for ids in encode_pieces(tokenizer, pieces) for token in ids] == ids_of(tokenizer, text)


def test_special_tokens_in_the_text_are_plain_text(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, f"a{END_OF_TEXT}b")
    assert 0 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"a{END_OF_TEXT}b"
    assert not tokenizer.encode_special_tokens


def test_encoding_leaves_truncation_and_padding_of_the_tokenizer_aside(tokenizer: Tokenizer) -> None:
    limited = Tokenizer.from_str(tokenizer.to_str())
    limited.enable_truncation(2)
    limited.enable_padding(length=300)
    assert ids_of(limited, SENTENCES) == ids_of(tokenizer, SENTENCES)
    assert limited.truncation is not None


def test_words_of_the_tokenizer_are_bounded(tokenizer: Tokenizer) -> None:
    for text in ("a" * 1000, " " * 1000, "." * 1000, "1" * 1000):
        words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert max(map(len, words)) <= 65, text[0]


def test_training_is_the_same_in_another_process_with_one_thread(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for document in corpus.train + corpus.valid:
        (tmp_path / "text" / document.name).write_text(document.text)
    script = (
        "import sys, pathlib\n"
        "from localexit.train.corpus import load_corpus\n"
        "from localexit.train.tokenizer import train_tokenizer\n"
        "corpus = load_corpus(sys.argv[1])\n"
        "sys.stdout.write(train_tokenizer(corpus, vocab_size=320, cache_dir=pathlib.Path(sys.argv[2])).to_str())\n"
    )
    environment = {"RAYON_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", script, str(tmp_path / "text"), str(tmp_path / "cache")]
    other = subprocess.run(command, env=environment, capture_output=True, check=True, encoding="utf-8").stdout
    assert other == train_tokenizer(corpus, vocab_size=320, cache_dir=tmp_path / "mine").to_str()


def test_a_cached_tokenizer_is_not_trained_again(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_tokenizer(corpus, vocab_size=300, cache_dir=tmp_path)

    def refuse(corpus: Corpus, vocab_size: int) -> Tokenizer:
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_train", refuse)
        assert train_tokenizer(corpus, vocab_size=300, cache_dir=tmp_path).to_str() == first.to_str()
        with pytest.raises(AssertionError, match="trained again"):
            train_tokenizer(corpus, vocab_size=301, cache_dir=tmp_path)
    (cached,) = (tmp_path / "tokenizers").iterdir()
    cached.write_text(first.to_str()[:500])
    assert train_tokenizer(corpus, vocab_size=300, cache_dir=tmp_path).to_str() == first.to_str()
    assert cached.read_text() == first.to_str()


def test_validation_text_is_not_trained_on(corpus: Corpus, tokenizer: Tokenizer) -> None:
    pieces = "".join(module._training_pieces(corpus.train))
    assert pieces == "".join(document.text for document in corpus.train)


def test_training_text_is_thinned_evenly(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    total = sum(len(document.text) for document in corpus.train)
    monkeypatch.setattr(module, "TRAINING_CHARACTERS", total // 3)
    pieces = list(module._training_pieces(corpus.train))
    assert 0.2 < sum(map(len, pieces)) / total < 0.4
    assert pieces[0] in corpus.train[0].text
    assert pieces[-1] in {document.text for document in corpus.train[-4:]}


def test_a_vocabulary_that_the_text_cannot_fill_names_the_largest(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^vocab_size: expected at most \d+, .* got 100000; pass") as caught:
        train_tokenizer(corpus, vocab_size=100_000, cache_dir=tmp_path)
    assert not (tmp_path / "tokenizers").exists()
    largest = int(re.findall(r"\d+", str(caught.value))[0])
    assert train_tokenizer(corpus, vocab_size=largest, cache_dir=tmp_path).get_vocab_size() == largest
    with pytest.raises(ValueError, match="expected at least 257 .* got 256"):
        train_tokenizer(corpus, vocab_size=256, cache_dir=tmp_path)


def test_transformers_saves_and_loads_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    as_pretrained(tokenizer).save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token_id == loaded.pad_token_id == 0
    assert loaded(SENTENCES)["input_ids"] == ids_of(tokenizer, SENTENCES)
    assert loaded.decode(ids_of(tokenizer, SENTENCES)) == SENTENCES


def test_the_cache_follows_the_xdg_convention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "localexit"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_cache_dir() == tmp_path / "home" / ".cache" / "localexit"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with written_atomically(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), written_atomically(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_a_file_gets_the_mode_that_new_files_get(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with written_atomically(tmp_path / "file") as temporary:
            temporary.write_text("content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


@pytest.mark.slow
def test_the_default_corpus_is_tokenized_within_its_time(tmp_path: Path) -> None:
    corpus = load_corpus("stdlib")
    start = time.perf_counter()
    tokenizer = train_tokenizer(corpus, vocab_size=8192, cache_dir=tmp_path)
    assert time.perf_counter() - start < 25
    stream = load_tokens(corpus, tokenizer, split="train", cache_dir=tmp_path)
    assert stream.bytes_per_token > 3.5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_line_of_100_mb_is_tokenized(tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_bytes(b"one long line without an end, " * 3_333_334)
    corpus = load_corpus(str(tmp_path / "line.txt"))
    tokenizer = train_tokenizer(corpus, vocab_size=265, cache_dir=tmp_path)
    stream = load_tokens(corpus, tokenizer, split="train", cache_dir=tmp_path)
    assert corpus.num_bytes == 100_000_020
    assert stream.num_bytes == len(corpus.train[0].text)
