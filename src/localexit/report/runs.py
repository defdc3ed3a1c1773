"""Read a run directory into plain values. Nothing in it is executed or unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localexit._files import check_links, read_json

from .evaluation import Evaluation, evaluation_of
from .records import Records, read_records

FORMAT = 1

_REMEDY = "pass a folder that `localexit train` wrote"


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One run directory, read.

    Attributes:
        path: the folder.
        train_config: every field of the training configuration.
        model_config: the model's configuration.
        versions: library versions, by name.
        device: where it ran.
        corpus: the content of `corpus.json`, but `format`.
        records: the content of `metrics.jsonl`.
        evaluation: the content of `eval.json`, or None.
    """

    path: Path
    train_config: Mapping[str, Any]
    model_config: Mapping[str, Any]
    versions: Mapping[str, Any]
    device: str
    corpus: Mapping[str, Any]
    records: Records
    evaluation: Evaluation | None = None

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def num_exits(self) -> int:
        """L; 0 before anything was logged."""
        return int(max(self.records.train.loss.shape[1], self.records.valid.loss.shape[1]))


def read_run(path: Path) -> Run:
    """Read the run directory `path`: `config.json`, `corpus.json`, `metrics.jsonl`, and `eval.json` if there is one.

    A last line of `metrics.jsonl` that was cut off in the middle of a write is left out and noted.

    Raises:
        ValueError: not a run directory, a missing or malformed file, another format version, or a link that leads
            out of it. The message names the file, the line and the field.
    """
    path = Path(path).resolve()
    if not path.is_dir():
        raise ValueError(f"run: expected a run directory, got {str(path)!r}; {_REMEDY}")
    check_links(path)
    config, corpus = _read_json(path, "config.json"), _read_json(path, "corpus.json")
    if not (path / "metrics.jsonl").is_file():
        raise ValueError(
            f"run: expected metrics.jsonl in {str(path)!r}, got none; wait until the run has logged a step"
        )
    return Run(
        path=path,
        train_config=_section(config, "train", path),
        model_config=_section(config, "model", path),
        versions=_section(config, "versions", path),
        device=str(config.get("device", "unknown")),
        corpus={key: value for key, value in corpus.items() if key != "format"},
        records=read_records(path / "metrics.jsonl"),
        evaluation=read_evaluation(path / "eval.json") if (path / "eval.json").is_file() else None,
    )


def read_evaluation(path: Path) -> Evaluation:
    """Read the file that `localexit eval` wrote.

    Raises:
        ValueError: it is missing, malformed or of another format version.
    """
    return evaluation_of(_read_json(path.parent, path.name), path)


def _read_json(folder: Path, name: str) -> Mapping[str, Any]:
    """Read one versioned JSON object."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"run: expected a run directory with {name}, got {str(folder)!r}; {_REMEDY}")
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}; the file is damaged") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}; the file is damaged")
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected format {FORMAT}, got {content.get('format')!r}; read it with the version of "
            "localexit that wrote it"
        )
    return content


def _section(config: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    section = config.get(key)
    if not isinstance(section, dict):
        raise ValueError(
            f"{path / 'config.json'}: expected an object in {key!r}, got {type(section).__name__}; {_REMEDY}"
        )
    return section
