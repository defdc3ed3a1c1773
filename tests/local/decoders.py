"""Small decoders for the tests of local training: a plain one, and configurations of `transformers`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

VOCAB, WIDTH, CONTEXT = 37, 12, 16


class Block(nn.Module):
    """Causal mixing and an MLP, both residual; no dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor, decay: Tensor) -> Tensor:
        length = hidden.shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        mask = torch.where(distance >= 0, torch.sigmoid(decay) ** distance.clamp_min(0), 0.0).to(hidden.dtype)
        hidden = hidden + mask @ self.mix(self.norm(hidden))
        return hidden + self.down(torch.tanh(self.up(hidden)))


class PlainDecoder(nn.Module):
    """A decoder with nothing of `transformers` in it: `forward(tokens) -> logits`.

    `decay` is learned, made before block 1 and an argument of every block: through it, a careless detach would let
    later units train the first one.
    """

    def __init__(self, num_blocks: int = 3, *, width: int = WIDTH, is_tied: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.decay = nn.Parameter(torch.zeros(()))
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=bias)
        if is_tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        decay = 1.5 * self.decay
        for block in self.blocks:
            hidden = block(hidden, decay)
        return self.head(self.norm(hidden))


def plain(num_blocks: int = 3, *, is_tied: bool = False) -> nn.Module:
    return PlainDecoder(num_blocks, is_tied=is_tied, bias=not is_tied)


def llama(num_blocks: int = 3, *, is_tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=20,
        num_hidden_layers=num_blocks,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=is_tied,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def gpt2(num_blocks: int = 3, *, is_tied: bool = False) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=num_blocks,
        n_head=2,
        n_positions=CONTEXT,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=is_tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


DECODERS: dict[str, Callable[..., nn.Module]] = {"plain": plain, "llama": llama, "gpt2": gpt2}


def build(name: str, num_blocks: int = 3, *, is_tied: bool = False, seed: int = 0) -> nn.Module:
    """A decoder in fp64 with weights large enough for its blocks to matter, in training mode."""
    torch.manual_seed(seed)
    model = DECODERS[name](num_blocks, is_tied=is_tied).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def batch(seed: int = 1, *, rows: int = 2, length: int = 7) -> tuple[Tensor, Tensor]:
    """Token ids, and labels of which some are left out."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, 2] = -100
    return ids, labels


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients of a module's parameters that have one, by name."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def count_hooks(model: nn.Module) -> int:
    """How many forward hooks there are on a model's modules."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
