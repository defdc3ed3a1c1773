"""Text from one exit of a model; the blocks after the exit are not run."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor

from localexit.local import LocalModel
from localexit.local.trace import eval_mode
from localexit.train.models import longest_context, model_config
from localexit.train.sampling import Sampling


def generate(
    local: LocalModel, tokenizer: Tokenizer, prompt: str, *, exit_index: int = -1, sampling: Sampling | None = None
) -> Iterator[str]:
    """What exit `exit_index` writes after `prompt`, piece by piece, until it ends the text.

    Args:
        local: the model, in eval mode.
        tokenizer: its tokenizer.
        prompt: text to continue; an empty one starts a new text.
        exit_index: which exit; negative ones count from the last.
        sampling: how tokens are chosen.

    Raises:
        ValueError: there is no such exit, or nothing to begin with; before the first piece is asked for.
    """
    exit_index = local.exit_position(exit_index)
    end_ids = _end_ids(local)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or end_ids[:1]
    if not ids:
        raise ValueError("prompt: expected text, got none, and the model has no token that begins a text; pass some")
    tokens = generate_ids(local, ids, exit_index=exit_index, sampling=sampling or Sampling())
    return _pieces(tokens, tokenizer, end_ids)


def _pieces(tokens: Iterable[int], tokenizer: Tokenizer, end_ids: list[int]) -> Iterator[str]:
    """Text of token ids until one that ends it, each piece as soon as its characters are whole."""
    written: list[int] = []
    shown = ""
    for token in tokens:
        if token in end_ids:
            break
        written.append(token)
        text = tokenizer.decode(written)
        # The last character may still lack some of its bytes.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    if len(tokenizer.decode(written)) > len(shown):
        yield tokenizer.decode(written)[len(shown) :]


def sample_text(local: LocalModel, tokenizer: Tokenizer, prompt: str, *, sampling: Sampling) -> str:
    """What the last exit writes after `prompt`, in the middle of training: the model's mode is put back."""
    with eval_mode(local):
        return "".join(generate(local, tokenizer, prompt, sampling=sampling))


def generate_ids(local: LocalModel, ids: list[int], *, exit_index: int, sampling: Sampling) -> Iterator[int]:
    """Yield token ids; past the model's longest context it goes on from the last half of it."""
    from transformers import DynamicCache

    limit = longest_context(model_config(local)) or sys.maxsize
    device = local.unembedding.weight.device
    generator = torch.Generator().manual_seed(sampling.seed)
    cache, num_cached = DynamicCache(), 0
    ids = ids[-limit:]
    for _ in range(sampling.max_new_tokens):
        if len(ids) > limit:
            ids = ids[-(limit // 2) :]
            cache, num_cached = DynamicCache(), 0
        new = torch.tensor([ids[num_cached:]], device=device)
        num_cached = len(ids)
        logits = local.exit_logits(exit_index, new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids.append(choose(logits[0, -1].float().cpu(), sampling, generator))
        yield ids[-1]


def _end_ids(local: LocalModel) -> list[int]:
    """The ids that end a text; configurations have one, several or none."""
    ids = model_config(local).eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from logits [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    if sampling.top_k is not None and sampling.top_k < logits.shape[0]:
        smallest = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = torch.softmax(logits / sampling.temperature, -1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
