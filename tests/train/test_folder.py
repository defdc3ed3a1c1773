from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from localexit.inference.architecture import model_config
from localexit.local import LocalModel
from localexit.train.export import export_model
from localexit.train.folder import RunFolder
from localexit.train.models import attach_exits, build_model
from train.small_runs import small_config, train_quietly

CHAT_TEMPLATE = "{% for message in messages %}<s>{{ message.content }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def pretrained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of `transformers` whose tokenizer has other special tokens than ours, as large as its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", "<tool>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(text.iterdir())], trainer)
    folder = tmp_path_factory.mktemp("pretrained")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<tool>"],
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=300, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, **sizes, **heads)
    ).save_pretrained(folder)
    return folder


def test_a_pretrained_model_keeps_its_tokenizer(pretrained: Path, text: Path, cache_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = small_config(text, model=str(pretrained), vocab_size=None, steps=3)
    run = train_quietly(config, tmp_path / "run", cache_dir).run
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (pretrained, run.model))
    assert len(after) == 300
    assert after.get_vocab() == before.get_vocab()
    assert after.special_tokens_map == before.special_tokens_map
    assert (after.eos_token, after.bos_token, after.pad_token) == ("</s>", "<s>", None)
    assert after.chat_template == CHAT_TEMPLATE
    sentence = "<s>every block counts <tool> two numbers</s>"
    assert after(sentence)["input_ids"] == before(sentence)["input_ids"]
    again = small_config(text, model=str(run.model), vocab_size=None, steps=3)
    assert train_quietly(again, tmp_path / "again", cache_dir).status == "finished"


def write_folder(run: RunFolder, text: Path, *, name: str) -> LocalModel:
    config = small_config(text)
    local = attach_exits(build_model(config, vocab_size=300, end_of_text_id=0), config, device=torch.device("cpu"))
    run.write(config, {"format": 1, "name": name}, model=model_config(local).to_dict(), device="cpu")
    return local


def test_two_runs_cannot_claim_one_folder(text: Path, tmp_path: Path) -> None:
    run = RunFolder(path=tmp_path / "run")
    for _ in range(2):
        run.check_new()
    write_folder(run, text, name="first")
    with pytest.raises(ValueError, match="run: expected a new folder, got .*run', which exists; add --resume"):
        write_folder(run, text, name="second")
    assert json.loads(run.corpus.read_text())["name"] == "first"
    assert run.read_config() == small_config(text)


@pytest.mark.skipif(os.name != "posix", reason="needs flock")
def test_a_run_is_locked_until_its_process_ends(tmp_path: Path) -> None:
    run = RunFolder(path=tmp_path)
    run.config.write_text("{}")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with run.locked():
            os.write(writing, b"!")
            signal.pause()
        os._exit(1)
    message = f"^run: .*{tmp_path.name}', in which another process is; wait"
    try:
        assert os.read(reading, 1) == b"!"
        with pytest.raises(ValueError, match=message), run.locked():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for descriptor in (reading, writing):
            os.close(descriptor)
    for _ in range(2):
        with run.locked():
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_file_system_without_locks_can_be_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    run = RunFolder(path=tmp_path)
    run.config.write_text("{}")

    def refuse(number: int) -> None:
        def flock(descriptor: int, operation: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    refuse(errno.ENOSYS)
    with run.locked():
        pass
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output"), run.locked():
        pass


class KilledError(BaseException):
    """Stands for a kill."""


def test_a_kill_during_an_export_leaves_a_whole_model(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(path=tmp_path / "run")
    local = write_folder(run, text, name="run")
    tokenizer = Tokenizer(models.BPE())
    export_model(run, local, tokenizer)
    whole = {path.name for path in run.model.iterdir()}
    deaths = 0
    for moment in range(20):
        with monkeypatch.context() as patch:
            _die_before(patch, moment)
            try:
                export_model(run, local, tokenizer)
            except KilledError:
                deaths += 1
            else:
                break
        # The next export deletes what it finds under its temporary name, `.model`.
        kept = [path for path in (run.model, run.path / ".model-old") if path.exists()]
        assert any({file.name for file in path.iterdir()} == whole for path in kept)
    assert deaths >= 4
    assert {file.name for file in run.model.iterdir()} == whole
    assert {path.name for path in run.path.iterdir()} == {"config.json", "corpus.json", "model"}


def _die_before(patch: pytest.MonkeyPatch, moment: int) -> None:
    """Die before the `moment`-th rename or deletion; a deletion has begun by then."""
    rename, rmtree, calls = Path.rename, shutil.rmtree, 0

    def is_time() -> bool:
        nonlocal calls
        calls += 1
        return calls > moment

    def dying_rename(path: Path, target: Path) -> Path:
        if is_time():
            raise KilledError
        return rename(path, target)

    def dying_rmtree(path: Path, ignore_errors: bool = False) -> None:
        if is_time():
            for file in list(path.glob("*"))[:1]:
                file.unlink()
            raise KilledError
        rmtree(path, ignore_errors=ignore_errors)

    patch.setattr(Path, "rename", dying_rename)
    patch.setattr("localexit.train.export.shutil.rmtree", dying_rmtree)
