"""Byte-level BPE vocabularies, trained by the `tokenizers` package and cached on disk.

`train_tokenizer(corpus, vocab_size=…)` returns a `tokenizers.Tokenizer`; `as_pretrained` wraps it for
`save_pretrained`, and `copy_pretrained` passes on one that came with a model; `encode_pieces` is the bulk encoder
that token streams are made with. Every text can be encoded and comes back unchanged: the 256 bytes are always in
the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from localexit.train.cache import default_cache_dir, written_atomically
from localexit.train.corpus import Corpus
from localexit.train.documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257
# enough to settle the merges; more text costs time and changes hardly any of them
TRAINING_CHARACTERS = 32 * 2**20
PIECE_CHARACTERS = 16 * 2**10

_FORMAT = 1
# GPT-2's words, with their length bounded: a line of 100 MB without a space stays cheap to train on and encode
_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,64}| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,64}|\s{1,64}(?!\S)|\s{1,64}"


def train_tokenizer(corpus: Corpus, *, vocab_size: int, cache_dir: Path | None = None) -> Tokenizer:
    """Byte-level BPE of `corpus.train`, the same for the same corpus, size and version of `tokenizers`.

    Args:
        corpus: the text; its sha256 is part of the cache's key.
        vocab_size: number of tokens: `<|endoftext|>` (id 0), the 256 bytes and the merges.
        cache_dir: where to keep the result; `default_cache_dir()` when None.

    Raises:
        ValueError: `vocab_size` leaves no room for the bytes, or is more than the text can fill.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(
            f"vocab_size: expected at least {SMALLEST_VOCAB} (256 bytes and {END_OF_TEXT}); got {vocab_size}; "
            "pass a larger one"
        )
    path = _cache_path(corpus, vocab_size, cache_dir or default_cache_dir())
    cached = _read_cached(path, vocab_size)
    if cached is not None:
        return cached
    tokenizer = _train(corpus, vocab_size)
    with written_atomically(path) as temporary:
        temporary.write_text(tokenizer.to_str(), encoding="utf-8")
    return tokenizer


def as_pretrained(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """`tokenizer` as transformers know it, for `save_pretrained`; `<|endoftext|>` begins, ends and pads."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def copy_pretrained(name: str, folder: Path) -> None:
    """Save the tokenizer of the model `name`, a local folder or a hub name, to `folder` as it is."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(name, trust_remote_code=False).save_pretrained(folder)


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[str], *, batch_size: int = 256) -> Iterator[list[int]]:
    """Token ids of each piece of text, encoded in parallel; special tokens in the text count as plain text."""
    # a copy: the flag is state of the caller's tokenizer
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    plain.no_truncation()
    plain.no_padding()
    batch: list[str] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == batch_size:
            yield from _encode_batch(plain, batch)
            batch = []
    yield from _encode_batch(plain, batch)


def split_pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """`text` in pieces of at most `size` characters, cut where a word of the tokenizer begins.

    Encoding the pieces gives the ids of the whole text, unless `size` characters hold no beginning of a word
    at white space.
    """
    start = 0
    while len(text) - start > size:
        end = _word_start(text, start, start + size)
        yield text[start:end]
        start = end
    yield text[start:]


def _word_start(text: str, start: int, end: int) -> int:
    """The last position in (start, end] where white space follows something else; `end` if there is none."""
    for position in range(end, start, -1):
        if text[position] in " \n" and not text[position - 1].isspace():
            return position
    return end


def _encode_batch(tokenizer: Tokenizer, batch: list[str]) -> Iterator[list[int]]:
    for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
        yield encoding.ids


def _cache_path(corpus: Corpus, vocab_size: int, cache_dir: Path) -> Path:
    key = f"{_FORMAT} {tokenizers.__version__} {corpus.sha256} {vocab_size} {TRAINING_CHARACTERS} {_WORDS}"
    return cache_dir / "tokenizers" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _read_cached(path: Path, vocab_size: int) -> Tokenizer | None:
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:
        # tokenizers raises bare Exception for a damaged file; training again replaces it
        return None
    return tokenizer if tokenizer.get_vocab_size() == vocab_size else None


def _train(corpus: Corpus, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_pieces(corpus.train), trainer)
    _check_filled(tokenizer, corpus, vocab_size)
    return tokenizer


def _training_pieces(documents: Iterable[Document]) -> Iterator[str]:
    """Pieces of all documents, thinned evenly to at most `TRAINING_CHARACTERS`."""
    documents = tuple(documents)
    total = sum(len(document.text) for document in documents)
    every = -(-total // TRAINING_CHARACTERS)
    pieces = (piece for document in documents for piece in split_pieces(document.text))
    return (piece for index, piece in enumerate(pieces) if index % every == 0)


def _check_filled(tokenizer: Tokenizer, corpus: Corpus, vocab_size: int) -> None:
    possible = tokenizer.get_vocab_size()
    if possible < vocab_size:
        raise ValueError(
            f"vocab_size: expected at most {possible}, all that the {corpus.num_bytes} bytes of {corpus.name!r} "
            f"can fill; got {vocab_size}; pass {possible} or less, or more text"
        )
