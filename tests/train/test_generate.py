from __future__ import annotations

from pathlib import Path

import pytest
import torch

from localexit.inference.decoder import Decoder
from localexit.inference.sampling import Sampling
from localexit.inference.strategies import FixedExit, Token
from localexit.inference.text import choose, generate, generate_ids, sample_text
from localexit.local import LocalModel
from localexit.train.export import load_run
from train.small_runs import small_config, train_quietly


@pytest.fixture(scope="module")
def run(text: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose vocabulary has merges, and whose exits have norms of their own."""
    config = small_config(text, steps=30, lr=1e-2, exit_norm="copy", eval_every=100, checkpoint_every=100)
    return train_quietly(config, tmp_path_factory.mktemp("runs") / "run", cache_dir).run.path


@pytest.fixture(scope="module")
def local(run: Path) -> LocalModel:
    return load_run(run, device=torch.device("cpu"))[0]


def plain_greedy(local: LocalModel, ids: list[int], exit_index: int, num: int) -> list[int]:
    """The most likely continuation without a cache: every token from the whole text so far."""
    for _ in range(num):
        ids = [*ids, int(local.exit_logits(exit_index, torch.tensor([ids]))[0, -1].argmax())]
    return ids[-num:]


def continuation(local: LocalModel, ids: list[int], sampling: Sampling, exit_index: int = -1) -> list[int]:
    """What one exit writes after `ids`."""
    tokens = generate_ids(Decoder(local, ids), strategy=FixedExit(exit_index=exit_index), sampling=sampling)
    return [token.id for token in tokens]


@pytest.mark.parametrize("exit_index", [0, 1, -1])
def test_the_cache_changes_nothing(local: LocalModel, exit_index: int) -> None:
    greedy = Sampling(temperature=0.0, max_new_tokens=9)
    ids = [5, 9, 40, 7]
    assert continuation(local, ids, greedy, exit_index) == plain_greedy(local, ids, exit_index, 9)


def test_later_blocks_are_not_run_for_an_early_exit(local: LocalModel) -> None:
    ran: list[int] = []
    layers = local.model.model.layers
    handles = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(layers)]
    continuation(local, [3, 4], Sampling(max_new_tokens=3), 0)
    for handle in handles:
        handle.remove()
    assert ran == [0, 0, 0]


def test_an_exit_that_is_not_there_is_refused(local: LocalModel) -> None:
    with pytest.raises(ValueError, match=r"exit must be in -2\.\.1, got 2"):
        continuation(local, [3], Sampling(max_new_tokens=1), 2)


def test_the_last_exit_of_a_loaded_run_is_its_model(run: Path, local: LocalModel) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[1, 2, 3, 4, 5]])
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert torch.equal(model(ids).logits, local.exit_logits(-1, ids))


def test_a_loaded_run_has_the_exits_and_the_mirror_it_ended_with(run: Path, local: LocalModel) -> None:
    from safetensors.torch import load_file

    saved = load_file(run / "checkpoints" / "step-30" / "model.safetensors")
    loaded = local.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in saved.items())


def test_text_past_the_longest_context_goes_on(local: LocalModel) -> None:
    limit = local.model.config.max_position_embeddings
    assert limit == 16
    written = continuation(local, list(range(5, 30)), Sampling(max_new_tokens=40))
    assert len(written) == 40


def test_the_pieces_are_the_text(run: Path) -> None:
    local, tokenizer = load_run(run, device=torch.device("cpu"))
    sampling = Sampling(max_new_tokens=40, seed=3)
    pieces = list(generate(local, tokenizer, "the parser", sampling=sampling))
    ids = continuation(local, tokenizer.encode("the parser").ids, sampling)
    end = local.model.config.eos_token_id
    until_end = list(ids)
    until_end = until_end[: until_end.index(end)] if end in until_end else until_end
    assert "".join(pieces) == tokenizer.decode(until_end)
    assert len(pieces) > 5


def test_the_same_seed_writes_the_same_text(run: Path) -> None:
    local, tokenizer = load_run(run, device=torch.device("cpu"))
    texts = [
        "".join(generate(local, tokenizer, "", sampling=Sampling(max_new_tokens=30, seed=seed, temperature=1.5)))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_character_of_several_tokens_comes_out_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local, tokenizer = load_run(run, device=torch.device("cpu"))
    ids = tokenizer.encode("aé€😀b").ids
    monkeypatch.setattr("localexit.inference.text.generate_ids", lambda *_, **__: (Token(i, 0) for i in ids))
    assert list(generate(local, tokenizer, "x")) == ["a", "é", "€", "😀", "b"]
    monkeypatch.setattr("localexit.inference.text.generate_ids", lambda *_, **__: (Token(i, 0) for i in ids[:-2]))
    assert "".join(generate(local, tokenizer, "x")) == "aé€\ufffd"


def test_a_sample_leaves_the_mode_of_training(run: Path) -> None:
    local, tokenizer = load_run(run, device=torch.device("cpu"))
    local.train()
    sample_text(local, tokenizer, "a", sampling=Sampling(max_new_tokens=2))
    assert all(module.training for module in local.modules())


def test_top_k_and_temperature_choose() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    assert {choose(logits, Sampling(top_k=2, temperature=2.0), generator) for _ in range(200)} == {1, 2}
    assert {choose(logits, Sampling(top_k=None, temperature=9.0), generator) for _ in range(200)} == {0, 1, 2, 3}
    assert {choose(logits, Sampling(temperature=0.0), generator) for _ in range(9)} == {1}
    assert {choose(logits, Sampling(top_k=50, temperature=0.01), generator) for _ in range(50)} == {1}
    assert {choose(1e3 * logits, Sampling(temperature=1e-40), generator) for _ in range(9)} == {1}


@pytest.mark.parametrize(
    ("field", "value"), [("max_new_tokens", -1), ("temperature", -0.1), ("temperature", float("nan")), ("top_k", 0)]
)
def test_bad_sampling_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Sampling(**{field: value})  # type: ignore[arg-type]


def test_a_run_without_its_model_says_how_to_get_one(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(ValueError, match="--resume"):
        load_run(tmp_path, device=torch.device("cpu"))


@pytest.mark.parametrize("content", [b"", b"\xff" * 64])
def test_a_damaged_model_is_refused(run: Path, tmp_path: Path, content: bytes) -> None:
    import shutil

    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    (damaged / "model" / "exits.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"exits\.safetensors cannot be read"):
        load_run(damaged, device=torch.device("cpu"))
    (damaged / "model" / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="its model could not be loaded"):
        load_run(damaged, device=torch.device("cpu"))
