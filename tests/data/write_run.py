"""Write a small run in the format of the code at hand: `python tests/data/write_run.py tests/data/run-format-N`.

For `tests/train/test_migration.py`, which continues runs of every format that was ever written. Run it before a
change of the format, not after.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from localexit.train.checkpoint import checkpoint_folders
from localexit.train.config import FeedbackSpec
from train.small_runs import small_config, train_quietly, write_corpus

END = "<|endoftext|>"


def write_model(folder: Path) -> None:
    """The smallest decoder with the bytes for a vocabulary."""
    alphabet = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 257}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    LlamaForCausalLM(
        LlamaConfig(**sizes, **heads, max_position_embeddings=16, bos_token_id=None, eos_token_id=0)
    ).save_pretrained(folder)


def main(folder: Path) -> None:
    folder.mkdir()
    # Names in the configuration are relative to here.
    os.chdir(folder)
    write_model(Path("model"))
    write_corpus(Path("text"), num_files=2, num_sentences=40)
    config = small_config(
        Path("text"), model="model", vocab_size=None, feedback=FeedbackSpec.parse("mirror_sampled:topk=2,num_draws=2")
    )
    train_quietly(config, Path("run"), Path("cache").resolve())
    newest, older = checkpoint_folders(Path("run/checkpoints"))
    for path in (*newest.iterdir(), *Path("run/model").iterdir(), *Path("cache").rglob("*.*")):
        path.unlink()
    for path in (newest, Path("run/model"), Path("cache/tokens"), Path("cache")):
        path.rmdir()
    assert older.name == "step-3"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
