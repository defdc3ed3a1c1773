"""Models to train: presets with random weights, and what `transformers` loads from a folder or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch.distributed.fsdp import fully_shard

from localexit._files import check_model_files, read_json
from localexit.exits import DataParallel
from localexit.feedback import Dense
from localexit.inference.architecture import longest_context
from localexit.local import ExitSchedule, LocalModel, attach, discover
from localexit.train.config import TrainConfig, exit_indices
from localexit.train.presets import PRESETS, Preset, resolve_name

if TYPE_CHECKING:
    from tokenizers import Tokenizer


# Of all matrices of a preset but the unembedding, whose size is the configuration's.
INITIAL_STD = 0.02


def build_model(config: TrainConfig, *, vocab_size: int, end_of_text_id: int) -> Any:
    """The model of a configuration, in fp32 on the CPU.

    Args:
        config: names the model and seeds its weights.
        vocab_size: tokens the text uses.
        end_of_text_id: one of them.

    Raises:
        ValueError: unknown preset, a folder or hub name that cannot be loaded, or a vocabulary that does not fit.
    """
    if config.model in PRESETS:
        return _from_preset(PRESETS[config.model], config, vocab_size=vocab_size, end_of_text_id=end_of_text_id)
    if config.vocab_size is not None:
        raise ValueError(
            f"vocab_size is for presets, which learn their vocabulary from the text; got {config.vocab_size} with "
            f"model {config.model!r}, which has its own; leave it out"
        )
    model = load_pretrained(config.model)
    model_vocab_size = model.get_output_embeddings().weight.shape[0]
    if vocab_size > model_vocab_size:
        raise ValueError(
            f"model {config.model!r} has an unembedding of {model_vocab_size} tokens, but its tokenizer has "
            f"{vocab_size}; resize the model's embeddings, or save it with its own tokenizer"
        )
    longest = longest_context(model.config)
    if longest is not None and config.context > longest:
        raise ValueError(
            f"context: expected at most the {longest} tokens that model {config.model!r} takes, got {config.context}; "
            f"pass {longest} or less"
        )
    return model


def attach_exits(
    model: Any, config: TrainConfig, *, device: torch.device, data_parallel: DataParallel | None = None
) -> LocalModel:
    """The model on `device` with the exits, the rule and the frozen parts that a configuration asks for.

    Args:
        model: the model, of `transformers`.
        config: the configuration.
        device: where to.
        data_parallel: the ranks that share each batch, if there are several.

    Raises:
        ValueError: exits or rule do not fit the model.
    """
    model = model.to(device).train()
    if config.shard and data_parallel is not None:
        for block in discover(model, seed=config.seed).blocks:
            fully_shard(block)
    vocab_size, hidden_size = model.get_output_embeddings().weight.shape
    rule = config.feedback.build(hidden_size=hidden_size, vocab_size=vocab_size, seed=config.seed).to(device)
    local = attach(
        model,
        feedback=rule,
        exits=exit_indices(config.exits),
        exit_norm=config.exit_norm,
        exit_body=config.exit_body,
        exit_weights=config.exit_weights,
        schedule=exit_schedule(config),
        backward=config.backward,
        seed=config.seed,
        label_smoothing=config.label_smoothing,
        z_loss=config.z_loss,
        data_parallel=data_parallel,
    )
    if not config.train_blocks:
        freeze_blocks(local)
    return local


def exit_schedule(config: TrainConfig) -> ExitSchedule:
    """What the exits of a run do from step to step."""
    return ExitSchedule(exits_per_step=config.exits_per_step, token_share=config.token_share, warmup=config.exit_warmup)


def freeze_blocks(local: LocalModel) -> None:
    """Leave only the unembedding and the exits' norms to be trained."""
    local.requires_grad_(False)
    readout = [local.unembedding, *(module for exit_ in local.exits for module in exit_.norm)]
    for module in readout:
        module.requires_grad_(True)


def load_pretrained(name: str) -> Any:
    """The causal language model in a local folder or on the hub, in fp32; safetensors weights only.

    Raises:
        ValueError: it cannot be found or loaded.
    """
    source = resolve_name(name)
    from transformers import AutoModelForCausalLM

    try:
        check_model_files(Path(source))
        _check_shards(Path(source))
        with without_progress_bars() if Path(source).is_dir() else nullcontext():
            return AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise _cannot_load(name, "model", error) from error


def _check_shards(folder: Path) -> None:
    """Refuse a local model whose index of shards names files outside its folder."""
    for index in folder.glob("*.index.json"):
        content = read_json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not all(map(_is_shard, shards.values())):
            raise ValueError(f"{index.name} does not map weights to files beside it")


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep the bars of `transformers` out of our own output; for work that takes no time worth one."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def load_tokenizer(name: str) -> tuple[Tokenizer, int]:
    """The fast tokenizer that belongs to a model, and the id it ends a text with.

    Raises:
        ValueError: it cannot be found, has no fast form, or no end-of-text token.
    """
    source = resolve_name(name)
    from transformers import AutoTokenizer

    try:
        check_model_files(Path(source))
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise _cannot_load(name, "tokenizer", error) from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError(
            f"model {name!r}: expected a fast tokenizer (tokenizer.json) with an end-of-text token, got "
            f"{type(tokenizer).__name__} with eos_token={tokenizer.eos_token!r}; convert it and set one"
        )
    # Some families' tokenizers can be made out of nothing.
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()):
        raise _cannot_load(name, "tokenizer", ValueError("it has no tokens but those that were added to it"))
    return tokenizer.backend_tokenizer, tokenizer.eos_token_id


def _from_preset(preset: Preset, config: TrainConfig, *, vocab_size: int, end_of_text_id: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    architecture = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=preset.hidden_size,
        intermediate_size=-(-preset.hidden_size * 8 // 3 // 32) * 32,
        num_hidden_layers=preset.num_blocks,
        num_attention_heads=preset.num_heads,
        num_key_value_heads=preset.num_heads,
        max_position_embeddings=config.context,
        initializer_range=INITIAL_STD,
        tie_word_embeddings=False,
        bos_token_id=end_of_text_id,
        eos_token_id=end_of_text_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(architecture)
    with torch.no_grad():
        # Scaled, not drawn anew: another size of W changes nothing else.
        model.get_output_embeddings().weight.mul_(config.unembedding_std / INITIAL_STD)
        if config.unembedding_init == "codes":
            codes = config.feedback.build(hidden_size=preset.hidden_size, vocab_size=vocab_size, seed=config.seed)
            assert isinstance(codes, Dense), "the configuration has been checked"
            model.get_output_embeddings().weight.copy_(codes.initial_weight(std=config.unembedding_std))
    return model


_REMEDIES = {
    "model": "expected a causal language model that save_pretrained wrote, with safetensors weights",
    "tokenizer": "expected its tokenizer beside it, tokenizer.json; tokenizer.save_pretrained(FOLDER) writes it",
}


def _cannot_load(name: str, what: str, error: Exception) -> ValueError:
    reason = str(error).strip().partition("\n")[0].rstrip(" :") or type(error).__name__
    return ValueError(f"model {name!r}: its {what} could not be loaded: {reason}; {_REMEDIES[what]}")
