"""Token ids of a corpus as a memory-mapped array, made once and cached.

    train = load_tokens(corpus, tokenizer, split="train")
    train.tokens  # [num_tokens] uint16 or uint32

`localexit.train.batches` draws batches from it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from localexit.train.cache import default_cache_dir, written_atomically
from localexit.train.corpus import Corpus
from localexit.train.documents import Document
from localexit.train.tokenizer import encode_pieces, split_pieces

# Hashing this much takes a second or two; more would be felt at every start.
LARGEST_HASHED = 2**30

_FORMAT = 1
Split = Literal["train", "valid"]


@dataclass(frozen=True, kw_only=True)
class StreamHeader:
    """What the `.json` file beside a stream's `.bin` file says.

    Attributes:
        format: version of the files' layout.
        split: `"train"` or `"valid"`.
        dtype: `"uint16"` or `"uint32"`, little-endian.
        num_tokens: ids in the file, the end-of-text id after each document included.
        num_bytes: UTF-8 bytes of the text that the ids stand for.
        sha256: hex digest of the `.bin` file.
    """

    format: int
    split: str
    dtype: str
    num_tokens: int
    num_bytes: int
    sha256: str


class TokenStream:
    """Token ids of one split, memory-mapped and read-only.

    Attributes:
        path: the `.bin` file.
        header: what is known about it.
        tokens: [num_tokens] uint16 or uint32.
    """

    def __init__(self, path: Path) -> None:
        """Open the stream at `path`, a `.bin` file with its `.json` header beside it.

        The file's sha256 is compared with the header's; above 1 GiB only its size is.

        Raises:
            ValueError: header missing, of another format, or at odds with the file.
        """
        self.path = path
        self.header = _read_header(path)
        self.tokens: npt.NDArray[np.unsignedinteger[Any]] = np.memmap(path, mode="r", dtype=_dtype(self.header.dtype))
        if self.tokens.nbytes <= LARGEST_HASHED:
            self._check_sha256()

    def __len__(self) -> int:
        return self.header.num_tokens

    @property
    def split(self) -> str:
        """`"train"` or `"valid"`."""
        return self.header.split

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return self.header.num_bytes

    @property
    def bytes_per_token(self) -> float:
        """Mean UTF-8 bytes per token; bits/byte = nats/token / ln 2 / bytes_per_token."""
        return self.num_bytes / len(self)

    def bits_per_byte(self, loss: float) -> float:
        """Bits/byte of a mean loss in nats/token."""
        return loss / math.log(2) / self.bytes_per_token

    def windows(self, context: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """[num_windows, context] view of the ids; windows do not overlap, a shorter rest is left out.

        Raises:
            ValueError: `context` is below 2, or the stream is shorter than one context.
        """
        if context < 2:
            raise ValueError(f"context: expected at least 2 tokens, an input and its label; got {context}; pass more")
        num_windows = len(self) // context
        if num_windows == 0:
            raise ValueError(
                f"data: expected at least one context of {context} tokens in the {self.split} split; "
                f"got {len(self)} tokens; pass more text or a context of at most {len(self)}"
            )
        return self.tokens[: num_windows * context].reshape(num_windows, context)

    def _check_sha256(self) -> None:
        digest = hashlib.sha256(self.tokens.data).hexdigest()
        if digest != self.header.sha256:
            raise ValueError(
                f"token stream: expected {self.path} with sha256 {self.header.sha256}; got {digest}; "
                f"{_remedy(self.path)}"
            )


def load_tokens(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    split: Split,
    end_of_text_id: int = 0,
    cache_dir: Path | None = None,
) -> TokenStream:
    """Token stream of one split, from the cache when it was made before and is not damaged.

    Documents are encoded in pieces of 16 Ki characters cut at white space. Our own tokenizers give the ids of the
    whole document; one that joins words across white space may differ from it at the cuts.

    Args:
        corpus: the text.
        tokenizer: what encodes it, ours or the fast tokenizer of a model (`backend_tokenizer`).
        split: `"train"` or `"valid"`.
        end_of_text_id: id put after every document; 0 is `<|endoftext|>` of our own tokenizers.
        cache_dir: where to keep the stream; `default_cache_dir()` when None.
    """
    path = _cache_path(corpus, tokenizer, split, end_of_text_id, cache_dir or default_cache_dir())
    try:
        return TokenStream(path)
    except ValueError:
        # Not made yet, or damaged: the text is at hand, and gives the same ids again.
        documents = corpus.train if split == "train" else corpus.valid
        _write_stream(path, documents, tokenizer, split, end_of_text_id)
    return TokenStream(path)


def _write_stream(
    path: Path, documents: tuple[Document, ...], tokenizer: Tokenizer, split: Split, end_of_text_id: int
) -> None:
    """Write `path` and then its header, which makes it valid."""
    dtype = "uint16" if max(tokenizer.get_vocab_size(), end_of_text_id + 1) <= 2**16 else "uint32"
    digest, num_tokens = hashlib.sha256(), 0
    with written_atomically(path) as temporary, temporary.open("wb") as file:
        for ids in _document_ids(documents, tokenizer, end_of_text_id):
            data = np.asarray(ids, dtype=_dtype(dtype)).tobytes()
            file.write(data)
            digest.update(data)
            num_tokens += len(ids)
    header = StreamHeader(
        format=_FORMAT,
        split=split,
        dtype=dtype,
        num_tokens=num_tokens,
        num_bytes=sum(len(document.text.encode()) for document in documents),
        sha256=digest.hexdigest(),
    )
    with written_atomically(_header_path(path)) as temporary:
        temporary.write_text(json.dumps(asdict(header), indent=2) + "\n", encoding="utf-8")


def _document_ids(documents: tuple[Document, ...], tokenizer: Tokenizer, end_of_text_id: int) -> Iterator[list[int]]:
    """Ids piece by piece, the end-of-text id after the last piece of each document."""
    marked = (
        (piece, position == len(pieces) - 1)
        for pieces in (list(split_pieces(document.text)) for document in documents)
        for position, piece in enumerate(pieces)
    )
    texts, marks = itertools.tee(marked)
    encoded = encode_pieces(tokenizer, (piece for piece, _ in texts))
    for ids, (_, is_last) in zip(encoded, marks, strict=True):
        yield [*ids, end_of_text_id] if is_last else ids


def _cache_path(corpus: Corpus, tokenizer: Tokenizer, split: Split, end_of_text_id: int, cache_dir: Path) -> Path:
    vocabulary = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    key = f"{_FORMAT} {corpus.sha256} {split} {vocabulary} {end_of_text_id}"
    return cache_dir / "tokens" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"


def _header_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _dtype(name: str) -> np.dtype[np.unsignedinteger[Any]]:
    return np.dtype(name).newbyteorder("<")


def _remedy(path: Path) -> str:
    return f"delete {path} and {_header_path(path).name}, they are made again"


def _read_header(path: Path) -> StreamHeader:
    remedy = _remedy(path)
    try:
        header = StreamHeader(**json.loads(_header_path(path).read_text(encoding="utf-8")))
        size = path.stat().st_size
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"token stream: expected {path} and its header; got {error}; {remedy}") from error
    if header.format != _FORMAT or header.dtype not in ("uint16", "uint32"):
        raise ValueError(
            f"token stream: expected format {_FORMAT}, uint16 or uint32; got {header.format}, {header.dtype}; {remedy}"
        )
    if size != header.num_tokens * _dtype(header.dtype).itemsize:
        raise ValueError(
            f"token stream: expected {header.num_tokens} tokens of {header.dtype} in {path}; got {size} bytes; {remedy}"
        )
    return header
