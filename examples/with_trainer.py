"""Local training of a causal language model in `transformers.Trainer`, on a text read with `datasets`.

    python examples/with_trainer.py FOLDER FILE [--steps 100] [--lora] [--resume]

FOLDER is a model that `save_pretrained` wrote, with its tokenizer; FILE a text, whose last tenth is for validation.
Every checkpoint in FOLDER-trainer holds the model and its exits; `--resume` continues from the newest one. With
`--lora` only low-rank adapters (`peft`) learn, each from the exit of its unit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import localexit
from localexit.inference.sampling import Sampling
from localexit.inference.strategies import ConfidentExit
from localexit.inference.text import generate
from localexit.integrations.trainer import LocalCallback

LENGTH, BATCH, ACCUMULATE = 32, 4, 2


def windows(tokenizer: Any, file: Path) -> DatasetDict:
    """The text in windows of LENGTH tokens, in two parts: train and test."""

    def cut(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = [token for text in rows["text"] for token in tokenizer(text)["input_ids"]]
        whole = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
        # The labels are the ids themselves: attach() shifts them.
        return {"input_ids": whole, "labels": whole}

    text = Dataset.from_dict({"text": [file.read_text(encoding="utf-8")]})
    return text.map(cut, batched=True, remove_columns="text").train_test_split(test_size=0.1, shuffle=False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="folder of a model")
    parser.add_argument("file", type=Path, help="text to learn")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps")
    parser.add_argument("--lora", action="store_true", help="train low-rank adapters only")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    data = windows(tokenizer, options.file)
    local = localexit.attach(model)
    trainer = Trainer(
        model,
        TrainingArguments(
            f"{options.folder}-trainer",
            max_steps=options.steps,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATE,
            eval_strategy="steps",
            eval_steps=50,
            save_steps=50,
            # The callback clips, each unit by itself.
            max_grad_norm=0,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=default_data_collator,
        optimizers=(torch.optim.AdamW([p for p in local.parameters() if p.requires_grad], lr=1e-3), None),
        callbacks=[LocalCallback(local, max_grad_norm=1.0)],
    )
    trainer.train(resume_from_checkpoint=options.resume)

    ids = torch.tensor(data["test"]["input_ids"], device=local.unembedding.weight.device)
    losses = [round(loss, 3) for loss in local.evaluate(ids, ids).loss.tolist()]
    print(f"after {trainer.state.global_step} steps: validation nats/token by exit {losses}")
    text = generate(
        local.eval(),
        tokenizer.backend_tokenizer,
        "the",
        strategy=ConfidentExit(threshold=0.5),
        sampling=Sampling(max_new_tokens=8),
    )
    print(f"written by the first exit that is sure: the{''.join(text)}")


if __name__ == "__main__":
    main()
