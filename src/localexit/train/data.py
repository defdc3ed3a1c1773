"""The text of a run as two token streams, and what `corpus.json` says about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from localexit.train.config import TrainConfig
from localexit.train.corpus import load_corpus
from localexit.train.models import load_tokenizer
from localexit.train.presets import PRESETS
from localexit.train.tokenizer import END_OF_TEXT, train_tokenizer
from localexit.train.tokens import TokenStream, load_tokens

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run reads.

    Attributes:
        tokenizer: text to ids and back.
        end_of_text_id: id after each document.
        train, valid: the two splits.
        record: the content of `corpus.json`.
    """

    tokenizer: Tokenizer
    end_of_text_id: int
    train: TokenStream
    valid: TokenStream
    record: dict[str, Any]


def load_data(config: TrainConfig, *, cache_dir: Path | None = None) -> RunData:
    """Text, vocabulary and token streams of a run; a preset learns its vocabulary from the text.

    Raises:
        ValueError: the text cannot be read, or is too short for one context or for the vocabulary.
        FileNotFoundError: there is no such text.
        ImportError: a data set of the hub without the package it needs.
    """
    # A model without a tokenizer is refused before minutes go into reading the text.
    of_model = None if config.model in PRESETS else load_tokenizer(config.model)
    corpus = load_corpus(config.data)
    if of_model is None:
        vocab_size = config.vocab_size or PRESETS[config.model].vocab_size
        tokenizer = train_tokenizer(corpus, vocab_size=vocab_size, cache_dir=cache_dir)
        known_id = tokenizer.token_to_id(END_OF_TEXT)
        assert known_id is not None, "our own tokenizers have it"
        end_of_text_id = known_id
    else:
        tokenizer, end_of_text_id = of_model
    train, valid = (
        load_tokens(corpus, tokenizer, split=split, end_of_text_id=end_of_text_id, cache_dir=cache_dir)
        for split in ("train", "valid")
    )
    for stream in (train, valid):
        stream.windows(config.context)
    return RunData(
        tokenizer=tokenizer,
        end_of_text_id=end_of_text_id,
        train=train,
        valid=valid,
        record={
            "format": FORMAT,
            "name": corpus.name,
            "sha256": corpus.sha256,
            "num_files": corpus.num_files,
            "num_bytes": corpus.num_bytes,
            "train_tokens": len(train),
            "valid_tokens": len(valid),
            "vocab_size": tokenizer.get_vocab_size(),
            "valid_bytes_per_token": valid.bytes_per_token,
        },
    )
