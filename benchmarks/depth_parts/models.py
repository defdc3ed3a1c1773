"""The decoder that all contenders train, and where it runs."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depth_parts.shapes import Shape


class Block(nn.Module):
    """Causal attention and a gated MLP, both behind a norm and residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = max(1, width // 64)
        inner = -(-width * 8 // 3 // 64) * 64
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        heads = self.qkv(self.attention_norm(hidden)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """Embedding, blocks, norm, unembedding; position is left to the causal mask."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape.hidden_size) for _ in range(shape.num_blocks))
        self.norm = nn.RMSNorm(shape.hidden_size)
        self.unembed = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.unembed(self.norm(hidden))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it runs: the device, and whether products are in bf16 and blocks are compiled."""

    device: torch.device
    is_fast: bool

    def model(self, shape: Shape, *, is_compiled: bool = False) -> Decoder:
        torch.manual_seed(0)
        with torch.device(self.device):
            model = Decoder(shape).train()
        if is_compiled and self.is_fast:
            for block in model.blocks:
                block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]
        return model

    def ids(self, shape: Shape, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(shape.vocab_size, (shape.batch_size, shape.context), generator=generator).to(self.device)

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.is_fast else nullcontext()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def free(machine: Machine) -> None:
    # Models and their hooks refer to each other.
    gc.collect()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
