"""Local training of the test decoders as an explicit loop, with the oracle at every exit: what attach() must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localexit.exits.reference import reference_exit
from localexit.feedback import Feedback


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A decoder taken apart by hand: names and calls per family, on purpose unlike discovery."""

    embed: Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]]
    blocks: Sequence[nn.Module]
    run: Callable[..., Tensor]
    norm: nn.Module
    head: nn.Linear


def parts_of(name: str, model: Any) -> Parts:
    return {"plain": _plain_parts, "llama": _llama_parts, "gpt2": _gpt2_parts}[name](model)


def _plain_parts(model: Any) -> Parts:
    def embed(ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return model.embed(ids) + model.position(torch.arange(ids.shape[1])), (1.5 * model.decay,)

    return Parts(
        embed=embed, blocks=model.blocks, run=lambda b, h, decay: b(h, decay), norm=model.norm, head=model.head
    )


def _llama_parts(model: Any) -> Parts:
    body = model.model

    def embed(ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        hidden = body.embed_tokens(ids)
        return hidden, body.rotary_emb(hidden, position_ids=torch.arange(ids.shape[1])[None])

    def run(block: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return block(hidden, attention_mask=None, position_embeddings=(cos, sin))

    return Parts(embed=embed, blocks=body.layers, run=run, norm=body.norm, head=model.lm_head)


def _gpt2_parts(model: Any) -> Parts:
    body = model.transformer

    def embed(ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return body.wte(ids) + body.wpe(torch.arange(ids.shape[1])), ()

    def run(block: nn.Module, hidden: Tensor) -> Tensor:
        out: Tensor | tuple[Tensor, ...] = block(hidden)
        # The first versions of transformers 5 return a tuple.
        return out[0] if isinstance(out, tuple) else out

    return Parts(embed=embed, blocks=body.h, run=run, norm=body.ln_f, head=model.lm_head)


def explicit_step(
    parts: Parts,
    ids: Tensor,
    labels: Tensor,
    feedback: Feedback,
    *,
    exits_at: Sequence[int] | None = None,
    norms: Sequence[Callable[[Tensor], Tensor]] | None = None,
    bodies: Sequence[nn.Module] = (),
    weights: Sequence[float] | None = None,
    num_items: int | None = None,
    token_weight: Tensor | None = None,
    **loss_options: float,
) -> list[Tensor]:
    """One step: leaves the gradients in `.grad`, returns the exits' unweighted losses.

    `bodies` are blocks of the first exits' own, run with what the model's blocks are run with.
    """
    exits_at = range(len(parts.blocks)) if exits_at is None else exits_at
    norms = [parts.norm] * len(exits_at) if norms is None else norms
    weights = [1.0] * len(exits_at) if weights is None else weights
    target = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1).flatten()
    count = int((target != -100).sum()) if num_items is None else num_items
    row_weight = None if token_weight is None else token_weight.roll(-1, dims=1).flatten()
    weight_grad, bias_grad = torch.zeros_like(parts.head.weight), torch.zeros(len(parts.head.weight)).double()
    hidden, extras = parts.embed(ids)
    losses, rows = [], None
    for index, block in enumerate(parts.blocks):
        hidden = parts.run(block, hidden, *extras)
        if index not in exits_at:
            continue
        exit_index = list(exits_at).index(index)
        read = parts.run(bodies[exit_index], hidden, *extras) if exit_index < len(bodies) else hidden
        normed = norms[exit_index](read)
        result = reference_exit(
            normed.flatten(0, 1),
            parts.head.weight,
            target,
            feedback=feedback,
            linear_bias=parts.head.bias,
            num_items=count / weights[exit_index],
            token_weight=row_weight,
            exit_index=exit_index,
            rows=rows,
            **loss_options,
        )
        rows = result.rows
        if normed.requires_grad:
            normed.backward(result.feedback.view_as(normed))
        weight_grad += result.weight_grad
        bias_grad += result.bias_grad
        losses.append(result.loss / weights[exit_index])
        hidden, extras = hidden.detach(), tuple(extra.detach() for extra in extras)
    _add_grad(parts.head.weight, weight_grad)
    _add_grad(parts.head.bias, bias_grad)
    return losses


def _add_grad(parameter: nn.Parameter | None, grad: Tensor) -> None:
    if parameter is not None and parameter.requires_grad:
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad
