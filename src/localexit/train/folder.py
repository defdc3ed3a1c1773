"""The run directory: what is where in it, its configuration, and the lock on it. Without torch."""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from localexit._files import check_links, read_json
from localexit.train.cache import written_atomically
from localexit.train.config import TrainConfig

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
    def evaluation(self) -> Path:
        """What `localexit eval` measured, `eval.json`."""
        return self.path / "eval.json"

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

    def write(self, config: TrainConfig, corpus: Mapping[str, Any], *, model: Mapping[str, Any], device: str) -> None:
        """Make the folder with `config.json` and `corpus.json`.

        Args:
            config: of the run.
            corpus: what was read.
            model: the configuration that `transformers` keeps with the model.
            device: where it runs, for people.

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
        write_json(self.corpus, corpus)
        # Last: the folder is a run from here on.
        write_json(
            self.config,
            {
                "format": FORMAT,
                "train": config.to_json(),
                "model": model,
                "versions": versions(),
                "device": device,
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
            ValueError: this is not the folder of a run, or one of another version, or a link leads out of it.
        """
        if self.path.is_dir():
            check_links(self.path)
        content = self._read_json(self.config)
        try:
            return TrainConfig.from_json(content["train"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.config}: not a configuration of a run ({error!r}); {_REMEDY}") from error

    def check_has_model(self) -> None:
        """Refuse what is not a run, or one that has not written its model yet.

        Raises:
            ValueError: so it is.
        """
        self.read_config()
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
        self._check_corpus(corpus, ("sha256", "vocab_size", "train_tokens"))

    def check_text(self, corpus: Mapping[str, Any]) -> None:
        """Refuse text that is not that of the run, however it is cut into tokens.

        Raises:
            ValueError: it is not.
        """
        self._check_corpus(corpus, ("sha256",))

    def _check_corpus(self, corpus: Mapping[str, Any], names: Sequence[str]) -> None:
        before = self._read_json(self.corpus)
        for name in names:
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
            content = read_json(path)
        except FileNotFoundError:
            raise ValueError(
                f"run: expected a run directory with {path.name}, got {str(self.path)!r}; {_REMEDY}"
            ) from None
        except (ValueError, OSError) as error:
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


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all, and wait until it is on disk."""
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
