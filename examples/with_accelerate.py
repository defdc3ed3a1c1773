"""Local training of a causal language model in a loop of `accelerate`, with gradient accumulation.

    python examples/with_accelerate.py FOLDER FILE [--steps 100]
    torchrun --nproc-per-node 2 examples/with_accelerate.py FOLDER FILE

FOLDER is a model that `save_pretrained` wrote, with its tokenizer; FILE a text. The tuned model and its exits go to
FOLDER-tuned.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import localexit

LENGTH, BATCH, ACCUMULATE = 32, 4, 2


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="folder of a model")
    parser.add_argument("file", type=Path, help="text to learn")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    ids = torch.tensor(tokenizer(options.file.read_text(encoding="utf-8"))["input_ids"])
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE)
    torch.manual_seed(0)
    # fp32, whatever the folder has: AdamW's small steps are lost in bf16 weights.
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    ranks = localexit.DataParallel() if accelerator.num_processes > 1 else None
    local = localexit.attach(model.train(), data_parallel=ranks)
    loader = DataLoader(windows, batch_size=BATCH, shuffle=True, drop_last=True)  # type: ignore[arg-type]
    # Of several processes what comes back is a wrapper: it is called, and `local` has everything else.
    called, optimizer, loader = accelerator.prepare(local, torch.optim.AdamW(local.parameters(), lr=1e-3), loader)

    step = 0
    while step < options.steps:
        for batch in loader:
            with accelerator.accumulate(called):
                output = called(batch, labels=batch)
                accelerator.backward(output.loss)
                if accelerator.sync_gradients:
                    # Per unit: accelerator.clip_grad_norm_ would take one norm over all of them.
                    local.clip_grad_norm_(1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                local.update()
                step += 1
                if step % 20 == 0 or step == options.steps:
                    losses = [round(loss, 3) for loss in output.exit_losses.tolist()]
                    accelerator.print(f"step {step}: nats/token by exit {losses}")
            if step == options.steps:
                break

    if accelerator.is_main_process:
        tuned = options.folder.with_name(f"{options.folder.name}-tuned")
        local.model.save_pretrained(tuned)
        tokenizer.save_pretrained(tuned)
        localexit.save_exits(local, tuned)
        print(f"saved to {tuned}")


if __name__ == "__main__":
    main()
