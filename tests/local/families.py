"""Every causal language model of `transformers`, tiny and with random weights.

`make families` tries to train each of them locally, and writes the table of docs/families.md.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from local.decoders import gradients
from localexit.local import attach

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
VOCAB, LENGTH = 61, 16
# What exceeds this kept a size of the published models: it needs an entry in OTHER_SIZES.
MOST_PARAMETERS = 30_000_000

BROKEN_AT_FIRST = ("phi", "jetmoe", "granitemoe")

# Passed to every configuration that has the field.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "num_layers": 2,
    "num_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "ffn_hidden_size": 48,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "n_shared_experts": 1,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "is_decoder": True,
    "add_cross_attention": False,
    **dict.fromkeys(
        (
            "dropout",
            "attention_dropout",
            "activation_dropout",
            "hidden_dropout",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "layerdrop",
            "decoder_layerdrop",
            "residual_dropout",
            "router_jitter_noise",
            "input_jitter_noise",
        ),
        0.0,
    ),
}
# Configurations inside of one that divide a block, not modalities.
PARTS_OF_A_BLOCK = {"attn_config", "ffn_config"}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
# Latent attention: the dimensions of its parts are fields of their own.
LATENT = {"head_dim": 4, "num_key_value_heads": 4}
OTHER_SIZES: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": {**HYBRID, **LATENT},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots3_note_text": LATENT,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0]},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**HYBRID, **LATENT},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": LATENT,
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "minicpm3": LATENT,
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "ngram_vocab_size_base": 100,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "reformer": {
        "attn_layers": ["local", "local"],
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [8, 24],
        "local_attn_chunk_length": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
    },
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "linear_attention"]},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A row of the table: what became of a family, and why or with which blocks."""

    family: str
    status: str
    detail: str


class NotTriedError(Exception):
    """No model to try: the family is more than text, or `transformers` itself cannot run it here."""


def family_names() -> list[str]:
    """Model types that `transformers` maps to a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(name: str, **changes: Any) -> nn.Module:
    """A model of a family at our sizes, seeded, in training mode.

    Raises:
        NotTriedError: it has parts that are not text, kept a published size, or cannot be made.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    parts = kind.sub_configs.keys() - PARTS_OF_A_BLOCK
    if parts:
        raise NotTriedError(f"more than text: {', '.join(sorted(parts))}")
    aliases = kind.attribute_map
    fields = {*kind().to_dict(), *aliases}
    sizes = {key: value for key, value in SIZES.items() if key in fields and aliases.get(key) not in SIZES}
    config = kind(**{**sizes, **OTHER_SIZES.get(name, {}), **changes})
    made = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    model_class = made[0] if isinstance(made, tuple) else made
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    if num_parameters > MOST_PARAMETERS:
        raise NotTriedError(f"{num_parameters:,} parameters at the smallest sizes this test knows")
    torch.manual_seed(0)
    return model_class(config).train()


def skip_if_broken(name: str) -> None:
    """End a test of a family that cannot be made, or records no router logits, in the first transformers 5."""
    import transformers

    if name in BROKEN_AT_FIRST and transformers.__version__.startswith("5.0."):
        pytest.skip(f"{name} is broken in transformers {transformers.__version__}")


def token_ids() -> Tensor:
    """Ids [2, LENGTH] without the special ones."""
    return torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def backprop_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the usual loss at the top, by the model's own forward."""
    ids = token_ids()
    logits = model(ids, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return gradients(model)


def local_gradients(model: nn.Module, exits: str | list[int]) -> tuple[dict[str, Tensor], str]:
    """Gradients of a local step with exact feedback, and the name of the list of blocks."""
    model.zero_grad()
    local = attach(model, feedback="transport", exits=exits, backward="stream")
    try:
        local(token_ids(), token_ids())
        return gradients(model), f"{len(local.anatomy.blocks)} in `{local.anatomy.blocks_name}`"
    finally:
        local.remove()


def judge(name: str) -> Verdict:
    """Try a family: backpropagation by one exit at the top, then an exit on every block.

    Works: with one exit at the top every gradient is backpropagation's, and with exits on every block the same
    parameters get gradients, without a warning.
    """
    try:
        model = tiny_model(name)
        with torch.no_grad():
            model.eval()(token_ids(), use_cache=False)
        expected = backprop_gradients(model.train())
    except NotTriedError as error:
        return Verdict(family=name, status="not tried", detail=str(error))
    except Exception as error:  # whatever stops transformers itself is no finding about us
        return Verdict(family=name, status="not tried", detail=f"`transformers` alone: {_short(error)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            whole, _ = local_gradients(model, [-1])
            by_units, blocks = local_gradients(model, "every")
    except UserWarning as warning:
        return Verdict(family=name, status="partly", detail=_short(warning))
    except (ValueError, TypeError, RuntimeError) as error:
        return Verdict(family=name, status="refused", detail=_short(error))
    wrong = [*differing(whole, expected), *(by_units.keys() ^ expected.keys())]
    if wrong:
        return Verdict(family=name, status="wrong", detail=f"gradients of {', '.join(sorted(wrong)[:3])}")
    return Verdict(family=name, status="works", detail=blocks)


def differing(got: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names whose gradients differ by more than rounding in fp32."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    return [
        name
        for name in {*got, *expected}
        if name not in got
        or name not in expected
        or float((got[name] - expected[name]).abs().max()) > 1e-4 * largest + 1e-3 * float(expected[name].abs().max())
    ]


def _short(error: Exception) -> str:
    """The first reason of a message, without numbers that depend on the machine."""
    text = re.sub(r"\d\.\de[-+]\d+", "…", " ".join(str(error).split()))
    text = text.rpartition("(tail(hidden) @ W.T + b)), tried ")[2].partition("; ")[0].partition(" with scale=")[0]
    return text if len(text) <= 200 else text[:199] + "…"


def page(verdicts: list[Verdict]) -> str:
    """The text of docs/families.md."""
    import transformers

    found = [verdict.status for verdict in verdicts]
    rows = [f"| {v.family} | {v.status} | {v.detail.replace('|', '/')} |" for v in verdicts]
    return (
        "# Model families\n\n"
        f"Every causal language model of transformers {transformers.__version__}, with random weights at a tiny size, "
        "on the CPU. Written by\n`make families`; a test makes it again and compares.\n\n"
        "- *works*: with one exit at the top and exact feedback every gradient is that of backpropagation, and with an "
        "exit on\n  every block the same parameters learn;\n"
        "- *partly*: it trains, with a warning that names parameters which nothing trains;\n"
        "- *refused*: `attach` or the first step says why, and the model is left as it was;\n"
        "- *not tried*: a model of more than text (its text part often has a row of its own), or one that "
        "`transformers` itself\n  does not run at this size.\n\n"
        f"{found.count('works')} work, {found.count('partly')} partly, {found.count('refused')} are refused, "
        f"{found.count('not tried')} were not tried.\n\n"
        "| family | | blocks, or the reason |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def main() -> None:
    """Write docs/families.md."""
    from transformers import logging

    logging.set_verbosity_error()
    PAGE.write_text(page([judge(name) for name in family_names()]), encoding="utf-8")


if __name__ == "__main__":
    main()
