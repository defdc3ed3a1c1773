"""Models of `transformers`: gradients by an explicit loop over their blocks, and the table of all families."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from local import families
from local.decoders import gradients
from local.families import family_names, judge, skip_if_broken, tiny_model, token_ids
from localexit.local import attach
from localexit.local.trace import cache_argument

# The norm in front of the unembedding, by hand: on purpose unlike discovery.
NORMS = {
    "llama": "model.norm",
    "qwen3": "model.norm",
    "mistral": "model.norm",
    "gemma2": "model.norm",
    "gemma3_text": "model.norm",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
    "phi": "model.final_layernorm",
    "mixtral": "model.norm",
    "qwen3_moe": "model.norm",
    "mamba": "backbone.norm_f",
    "bamba": "model.final_layernorm",
}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks by the names that families give their list."""
    lists = [module for name, module in model.named_modules() if name.split(".")[-1] in ("layers", "h")]
    return list(lists[0].children())


def detached(value: Any) -> Any:
    """A nested value of a block's arguments without its graph."""
    if isinstance(value, Tensor):
        return value.detach()
    return tuple(map(detached, value)) if isinstance(value, tuple) else value


def explicit_units(name: str, model: Any, labels: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
    """One loop over the blocks, run one by one on detached arguments: leaves gradients, returns the exits' losses."""
    calls: list[tuple[nn.Module, Any, Any]] = []
    handles = [
        block.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((module, args, kwargs)), with_kwargs=True
        )
        for block in blocks_of(model)
    ]
    model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    target = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1).flatten()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    losses = []
    for index, (block, args, kwargs) in enumerate(calls):
        if index > 0:
            args, kwargs = detached(args), {key: detached(value) for key, value in kwargs.items()}
        output = block(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        logits = model.get_output_embeddings()(model.get_submodule(NORMS[name])(hidden))
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target)
        loss.backward()
        losses.append(loss.detach())
    return losses


def assert_equals_explicit_units(
    name: str, model: nn.Module, labels: Tensor, inputs: dict[str, Any], *, modes: Sequence[str] = ("stream",)
) -> None:
    reference = copy.deepcopy(model)
    losses = explicit_units(name, reference, labels, inputs)
    for mode in modes:
        model.zero_grad()
        local = attach(model, feedback="transport", backward=mode)
        out = local(labels=labels, **inputs)
        if mode == "deferred":
            out.loss.backward()
        local.remove()
        torch.testing.assert_close(out.exit_losses, torch.stack(losses).to(out.exit_losses.dtype))
        expected = gradients(reference)
        assert expected
        assert families.differing(gradients(model), expected) == []


@pytest.mark.parametrize("name", NORMS)
def test_named_families_equal_an_explicit_loop(name: str) -> None:
    skip_if_broken(name)
    ids = token_ids()
    assert_equals_explicit_units(name, tiny_model(name), ids, {"input_ids": ids})


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "opt", "qwen3_moe"])
def test_tied_embeddings(name: str) -> None:
    model = tiny_model(name, tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = token_ids()
    assert_equals_explicit_units(name, model, ids, {"input_ids": ids}, modes=("stream", "deferred"))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "opt", "mamba", "mixtral"])
def test_attention_masks_on_either_side(name: str) -> None:
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, 12:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert_equals_explicit_units(name, tiny_model(name), labels, inputs, modes=("stream", "deferred"))


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2"])
def test_packed_sequences(name: str) -> None:
    """Positions that start anew keep the texts of a row apart, as the model itself does it."""
    model = tiny_model(name)
    ids = token_ids()[:1]
    positions = torch.cat([torch.arange(6), torch.arange(10)])[None]
    labels = ids.clone()
    labels[0, 6] = -100
    assert_equals_explicit_units(name, model, labels, {"input_ids": ids, "position_ids": positions})
    packed = attach(model, feedback="transport")(ids, labels, position_ids=positions).exit_losses
    apart = [model(part, labels=part).exit_losses * (part.shape[1] - 1) for part in (ids[:, :6], ids[:, 6:])]
    torch.testing.assert_close(packed, sum(apart) / 14)


# peft reads an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", ["stream", "deferred"])
def test_low_rank_adapters(mode: str) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.0, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    reference = copy.deepcopy(wrapped)
    ids = token_ids()
    explicit_units("llama", reference.base_model.model, ids, {"input_ids": ids})
    caches: list[object] = []
    for block in blocks_of(wrapped):
        block.register_forward_pre_hook(
            lambda _module, _args, kwargs: caches.append(kwargs[str(cache_argument(wrapped))]), with_kwargs=True
        )
    local = attach(wrapped, feedback="transport", backward=mode)
    caches.clear()
    out = local(ids, ids)
    # Keys and values in a cache would keep the activations of all units alive.
    assert caches == [None] * len(local.blocks)
    if mode == "deferred":
        out.loss.backward()
    got, expected = gradients(wrapped), gradients(reference)
    assert got
    assert all("lora_" in name for name in got)
    assert families.differing(got, expected) == []


def test_a_wrong_gradient_is_noticed() -> None:
    expected = {"a": torch.ones(3), "b": torch.full((2,), 1e-3)}
    assert families.differing(dict(expected), expected) == []
    for wrong in ({"a": torch.ones(3)}, {**expected, "b": 2 * expected["b"]}, {**expected, "c": torch.ones(1)}):
        assert families.differing(wrong, expected) != []


def test_a_family_that_is_refused_says_why() -> None:
    verdict = judge("roberta")
    assert verdict.status == "refused"
    assert "Linear, LayerNorm" in verdict.detail


@pytest.mark.slow
def test_the_table_of_families_is_up_to_date() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    written = families.PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," not in written:
        pytest.skip("docs/families.md is about another version of transformers than the one installed")
    verdicts = [judge(name) for name in family_names()]
    assert [verdict for verdict in verdicts if verdict.status == "wrong"] == []
    assert families.page(verdicts) == written
