"""What each process of tests/gpu/test_ranks.py does: `python on_ranks.py WHAT [CONFIG RUN CACHE]`."""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from local.decoders import build
from local.rules import RULES, rule
from local.test_data_parallel import EXACT, batches
from localexit import DataParallel
from localexit.local import attach
from localexit.train import ranks
from localexit.train.config import TrainConfig
from localexit.train.trainer import Trainer
from train.small_runs import die_in_save, train_quietly


def trained(name: str, form: str) -> dict[str, torch.Tensor]:
    """Parameters after 5 steps in fp64: "alone", "data" parallel or "vocab" parallel."""
    device = torch.device("cuda", dist.get_rank())
    model = build("llama").to(device)
    if form == "vocab":
        mesh = init_device_mesh("cuda", (dist.get_world_size(),))
        parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    data = DataParallel() if form == "data" else None
    local = attach(model, feedback=rule(name).double().to(device), backward="stream", data_parallel=data)
    optimizer = torch.optim.SGD(local.parameters(), lr=0.02, foreach=False)
    for whole in batches(5):
        ids, labels = (t.to(device) if data is None else t.to(device).chunk(data.size)[data.rank] for t in whole)
        local(ids, labels=labels)
        local.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        local.update()
    return {
        key: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for key, p in local.model.named_parameters()
    }


def parity() -> None:
    """Every rule, in both forms, against this process by itself."""
    device = torch.device("cuda", int(os.environ["RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, timeout=timedelta(seconds=60))
    for name in RULES:
        alone = trained(name, "alone")
        for form in ("data", "vocab"):
            for key, tensor in trained(name, form).items():
                where = f"{name}, {form}, {key}"
                torch.testing.assert_close(tensor, alone[key], **EXACT, msg=lambda text, at=where: f"{at}: {text}")
    dist.destroy_process_group()


def killed_in_step() -> None:
    """The second process is killed in the middle of its fifth step, after the forward."""
    made = Trainer.train_step

    def train_step(self: Trainer) -> Any:
        if self.step == 4 and dist.get_rank() == 1:
            self.local.clip_grad_norm_ = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        return made(self)

    Trainer.train_step = train_step  # type: ignore[method-assign]


def main(what: str, *run: str) -> None:
    if what == "parity":
        parity()
        return
    ranks.TIMEOUT = timedelta(seconds=20)  # type: ignore[misc]
    if what != "resume":
        {"step": killed_in_step, "save": die_in_save}[what]()
    config, folder, cache = run
    made = TrainConfig.from_json(json.loads(config))
    train_quietly(made, Path(folder), Path(cache), resume=what == "resume")


if __name__ == "__main__":
    main(*sys.argv[1:])
