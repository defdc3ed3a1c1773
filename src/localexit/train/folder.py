"""The run directory: its configuration, and the model that a run ends with."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from localexit.local import LocalModel
from localexit.train.cache import written_atomically
from localexit.train.config import TrainConfig
from localexit.train.models import (
    PRESETS,
    attach_exits,
    load_pretrained,
    load_tokenizer,
    model_config,
    resolve_name,
    without_progress_bars,
)
from localexit.train.tokenizer import as_pretrained, copy_pretrained

FORMAT = 1
_REMEDY = "pass a folder that `localexit train` wrote"
# Some network file systems are mounted without locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_PACKAGES = ("localexit", "torch", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where the files of one run are.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The configuration, `config.json`."""
        return self.path / "config.json"

    @property
    def corpus(self) -> Path:
        """What was read, `corpus.json`."""
        return self.path / "corpus.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, `metrics.jsonl`."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of `step-N` folders."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model, as `transformers` saves it, with `exits.safetensors`."""
        return self.path / "model"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    def check_new(self) -> None:
        """Refuse a folder with anything in it.

        Raises:
            ValueError: there is something.
        """
        if self.path.is_dir() and not any(self.path.iterdir()):
            return
        if self.path.exists() or self.path.is_symlink():
            raise self._exists_error()

    def write(self, config: TrainConfig, corpus: Mapping[str, Any], local: LocalModel, device: torch.device) -> None:
        """Make the folder with `config.json` and `corpus.json`.

        Raises:
            ValueError: another process has made it since `check_new`.
            OSError: it cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            # Whoever makes this file has the folder; that no second process gets it does not depend on locks.
            self.corpus.touch(exist_ok=False)
        except FileExistsError:
            raise self._exists_error() from None
        _write_json(self.corpus, corpus)
        # Last: the folder is a run from here on.
        _write_json(
            self.config,
            {
                "format": FORMAT,
                "train": config.to_json(),
                "model": model_config(local).to_dict(),
                "versions": versions(),
                "device": device_name(device),
            },
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this run, until the block or this process ends.

        The lock is on `config.json`, which is written once. Where the system or its file system has no `flock`,
        nothing is locked.

        Raises:
            ValueError: another process is training in it.
            OSError: `config.json` cannot be opened.
        """
        # Open for writing: NFS locks no other files.
        with self.config.open("r+b") as file:
            if not _lock(file.fileno()):
                raise ValueError(
                    f"run: expected a run that nobody is training, got {str(self.path)!r}, in which another process "
                    f"is; wait until it ends, or pass another folder"
                )
            yield

    def read_config(self) -> TrainConfig:
        """The configuration the run was started with.

        Raises:
            ValueError: this is not the folder of a run, or one of another version.
        """
        content = self._read_json(self.config)
        try:
            return TrainConfig.from_json(content["train"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.config}: not a configuration of a run ({error!r}); {_REMEDY}") from error

    def check_has_model(self) -> None:
        """Refuse a run that has not written its model yet.

        Raises:
            ValueError: so it is.
        """
        if not self.model.is_dir():
            raise ValueError(
                f"run: expected a finished or interrupted run with model/, got {str(self.path)!r}; continue it with "
                f"`localexit train {self.path} --resume`"
            )

    def check_corpus(self, corpus: Mapping[str, Any]) -> None:
        """Refuse to continue on other text.

        Raises:
            ValueError: the text is not that of the run.
        """
        before = self._read_json(self.corpus)
        for name in ("sha256", "vocab_size", "train_tokens"):
            if before.get(name) != corpus[name]:
                raise ValueError(
                    f"data: expected the text of the run ({name} {before.get(name)}), got {corpus['name']!r} with "
                    f"{name} {corpus[name]}; restore the text, or start a new run"
                )

    def _exists_error(self) -> ValueError:
        return ValueError(
            f"run: expected a new folder, got {str(self.path)!r}, which exists; add --resume to continue it, or "
            f"pass another folder"
        )

    def _read_json(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(
                f"run: expected a run directory with {path.name}, got {str(self.path)!r}; {_REMEDY}"
            ) from None
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"{path}: expected a JSON object, got {error}; the file is damaged") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path}: expected a JSON object of format {FORMAT}; {_REMEDY}")
        return content


def new_run_folder(config: TrainConfig) -> Path:
    """The first of `runs/NAME`, `runs/NAME-2`, … that does not exist, named after model and rule."""
    name = f"{Path(config.model).name}-{config.feedback.name}"
    path, number = Path("runs") / name, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path


def export_model(run: RunFolder, local: LocalModel, tokenizer: Tokenizer) -> None:
    """Write `model/`: what `transformers` loads, the tokenizer, the exits' own norms and the rule's state.

    Args:
        run: its configuration says which model it began with.
        local: the model.
        tokenizer: what a preset learned from the text; any other model passes its own on, special tokens and chat
            template included.
    """
    temporary, old = run.path / ".model", run.path / ".model-old"
    shutil.rmtree(temporary, ignore_errors=True)
    if old.exists() and not run.model.exists():
        # What a kill between the two renames below left.
        old.rename(run.model)
    save: Any = local.model
    with without_progress_bars():
        save.save_pretrained(temporary)
    source = run.read_config().model
    if source in PRESETS:
        as_pretrained(tokenizer).save_pretrained(temporary)
    else:
        copy_pretrained(resolve_name(source), temporary)
    save_file(_exit_tensors(local), temporary / "exits.safetensors")
    shutil.rmtree(old, ignore_errors=True)
    if run.model.exists():
        run.model.rename(old)
    temporary.rename(run.model)
    shutil.rmtree(old, ignore_errors=True)


def load_run(path: Path, *, device: torch.device) -> tuple[LocalModel, Tokenizer]:
    """The model that a run ended with, its exits attached, and its tokenizer.

    Raises:
        ValueError: not the folder of a run, or one that has not written its model yet.
    """
    run = RunFolder(path=path)
    config = run.read_config()
    run.check_has_model()
    local = attach_exits(load_pretrained(str(run.model)), config, device=device)
    try:
        tensors = load_file(run.model / "exits.safetensors", device=str(device))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"run: {run.model / 'exits.safetensors'} cannot be read ({error}); it is damaged") from error
    own = _exit_tensors(local)
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in tensors.items()}:
        raise ValueError(f"run: {run.model / 'exits.safetensors'} does not fit config.json; one of them is damaged")
    local.exit_norms.load_state_dict(_below("exit_norms.", tensors))
    local.feedback.load_state_dict(_below("feedback.", tensors))
    tokenizer, _ = load_tokenizer(str(run.model))
    return local.eval(), tokenizer


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_name(device: torch.device) -> str:
    """The device for people: `cuda (NVIDIA H100)`, `cpu (2 threads)`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def _lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; False when another process has."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _exit_tensors(local: LocalModel) -> dict[str, torch.Tensor]:
    parts = {"exit_norms": local.exit_norms, "feedback": local.feedback}
    return {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def _below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
