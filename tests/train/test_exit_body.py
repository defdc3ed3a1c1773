"""Runs whose exits have a block of their own: trained, resumed, measured, and written with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from localexit import cli
from localexit.report import read_run, write_report
from localexit.train.export import load_run
from train.small_runs import small_config, train_quietly
from train.test_trainer import make_trainer, parameters


def test_a_resumed_run_trains_the_same_blocks() -> None:
    whole, first, second = (make_trainer(exit_body="block") for _ in range(3))
    start = {name: tensor.clone() for name, tensor in parameters(whole).items()}
    for _ in range(4):
        whole.train_step()
    for _ in range(2):
        first.train_step()
    second.restore(first.snapshot())
    for _ in range(2):
        second.train_step()
    expected = parameters(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters(second).items())
    own = [name for name in expected if name.startswith("exit_bodies.")]
    assert own
    assert not any(torch.equal(start[name], expected[name]) for name in own)


def test_blocks_that_are_spread_over_processes_are_not_copied(text: Path) -> None:
    with pytest.raises(ValueError, match="exit_body='block' copies blocks, and shard spreads them over processes"):
        small_config(text, exit_body="block", shard=True)


def test_a_run_is_measured_reported_and_written_with(
    text: Path, cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_quietly(small_config(text, exit_body="block"), tmp_path / "run", cache_dir).run.path
    assert cli.run(["eval", str(run), "--tokens", "128", "--device", "cpu"]) == 0
    exits = json.loads((run / "eval.json").read_text())["exits"]
    assert [exit_["num_blocks"] for exit_ in exits] == [2, 2]
    assert read_run(run).evaluation is not None
    assert "Grey: one exit for all tokens" in write_report([run]).read_text(encoding="utf-8")
    capsys.readouterr()
    prompt = ["generate", str(run), "--prompt", "the parser", "--max-new-tokens", "6", "--temperature", "0"]
    texts = []
    for way in ([], ["--draft-exit", "0"], ["--exit", "confidence", "--threshold", "1"], ["--exit", "0"]):
        assert cli.run([*prompt, *way]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    local, tokenizer = load_run(run, device=torch.device("cpu"))
    ids, end = tokenizer.encode("the parser").ids, local.model.config.eos_token_id
    for _ in range(6):
        token = int(local.exit_logits(0, torch.tensor([ids]))[0, -1].argmax())
        if token == end:
            break
        ids.append(token)
    assert texts[3].strip() == tokenizer.decode(ids).strip()
