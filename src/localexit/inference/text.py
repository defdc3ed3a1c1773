"""Text from the exits of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor

from localexit.inference.architecture import end_ids, model_config
from localexit.inference.decoder import Decoder
from localexit.inference.sampling import Sampling
from localexit.inference.strategies import FixedExit, Strategy, Token
from localexit.local import LocalModel
from localexit.local.trace import eval_mode


def generate(
    local: LocalModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    strategy: Strategy | None = None,
    sampling: Sampling | None = None,
    on_token: Callable[[Token], None] | None = None,
) -> Iterator[str]:
    """What a model writes after `prompt`, piece by piece, until it ends the text.

    Args:
        local: the model, in eval mode.
        tokenizer: its tokenizer.
        prompt: text to continue; an empty one starts a new text.
        strategy: which exit writes; the last one by default.
        sampling: how tokens are chosen.
        on_token: called with each token.

    Raises:
        ValueError: the strategy does not go with the model, or there is nothing to begin with; before the first piece
            is asked for.
    """
    strategy, sampling = strategy or FixedExit(), sampling or Sampling()
    strategy.check(local, sampling)
    ends = end_ids(model_config(local))
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or ends[:1]
    if not ids:
        raise ValueError("prompt: expected text, got none, and the model has no token that begins a text; pass some")
    tokens = generate_ids(Decoder(local, ids), strategy=strategy, sampling=sampling)
    return _pieces(_until(tokens, ends, on_token), tokenizer)


def generate_ids(decoder: Decoder, *, strategy: Strategy, sampling: Sampling) -> Iterator[Token]:
    """Go on with a decoder's text; past the model's longest context from the last half of it.

    Args:
        decoder: the text so far, at least one token.
        strategy: which exit writes.
        sampling: how tokens are chosen, and how many.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    num_left = sampling.max_new_tokens
    while num_left > 0:
        if decoder.room < 0:
            decoder.restart(decoder.ids[-(decoder.limit // 2) :])
        tokens = strategy.write(decoder, lambda logits: choose(logits, sampling, generator))
        yield from tokens[:num_left]
        num_left -= len(tokens)


def _until(tokens: Iterable[Token], ends: list[int], on_token: Callable[[Token], None] | None) -> Iterator[int]:
    """Token ids until one that ends a text."""
    for token in tokens:
        if token.id in ends:
            return
        if on_token is not None:
            on_token(token)
        yield token.id


def _pieces(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Text of token ids, each piece as soon as its characters are whole."""
    written: list[int] = []
    shown = ""
    for token in tokens:
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


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from logits [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    # The generator is the CPU's: what it draws does not depend on the device.
    logits = logits.float().cpu()
    if sampling.top_k is not None and sampling.top_k < logits.shape[0]:
        smallest = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    # Below the largest one, so that nothing overflows however low the temperature is.
    probabilities = torch.softmax((logits - logits.max()) / sampling.temperature, -1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
