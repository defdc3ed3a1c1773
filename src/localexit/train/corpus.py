"""Text to train on: read, cleaned, deduplicated, split and hashed the same way on every machine.

`load_corpus(spec)` takes

- `"stdlib"`: the sources of Python's standard library, without tests, encodings and generated tables;
- `"docstrings"`: the docstrings of installed scientific packages, read without importing them;
- a path: a text file, or a folder of them;
- `"hf:NAME"` or `"hf:NAME:CONFIG"`: a data set through the `datasets` package: of the hub, or a local folder of parquet
  or JSON files or one that `save_to_disk` wrote.

The whole text is held in memory while a tokenizer and token streams are made from it.
"""

from __future__ import annotations

import hashlib
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from localexit.train.docstrings import docstring_documents
from localexit.train.documents import TEST_FOLDERS, Document, clean_text, is_not_hidden, read_folder, read_text

VALID_SHARE = 0.07
# a document above this share of the corpus gives its own tail to validation; the others go whole to one side
LARGE_SHARE = 0.05
_STDLIB_FOLDERS_LEFT_OUT = TEST_FOLDERS | {"encodings", "pydoc_data", "site-packages", "dist-packages"}
# tables written by programs, and files that differ from machine to machine
_STDLIB_FILES_LEFT_OUT = frozenset({"html/entities.py", "stringprep.py", "sitecustomize.py"})


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """How many files were left out, and why; `invalid_utf8` counts files kept with bytes replaced."""

    binary: int = 0
    duplicate: int = 0
    empty: int = 0
    linked_folder: int = 0
    special: int = 0
    unreadable: int = 0
    invalid_utf8: int = 0

    def describe(self) -> str:
        """One line for people, e.g. `2 binary, 1 duplicate`; empty when nothing was left out."""
        return ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in asdict(self).items() if count)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents to train on and to validate on.

    Attributes:
        name: the specification it was loaded from.
        train: documents to train on, in a fixed order.
        valid: documents to validate on; no document is in both, a large one gives its tail.
        sha256: hex digest over names, contents and split: equal digests mean equal data.
        num_files: documents before the split.
        num_bytes: UTF-8 bytes of both splits.
        skipped: what was left out.
    """

    name: str
    train: tuple[Document, ...]
    valid: tuple[Document, ...]
    sha256: str
    num_files: int
    num_bytes: int
    skipped: Skipped


def load_corpus(spec: str) -> Corpus:
    """Load the corpus that `spec` names; see the module's docstring for the forms it takes.

    About 7 % is set aside for validation: documents by the hash of their name, the tail of a document that is
    more than 5 % of the corpus. Files starting with a dot are left out of folders; links to folders are not
    followed.

    Raises:
        ValueError: unknown specification, a path that is no regular file or folder, or no text in it.
        FileNotFoundError: the path does not exist.
        ImportError: `hf:` without the `datasets` package.
    """
    if spec == "stdlib":
        return _load_stdlib(spec)
    if spec == "docstrings":
        return _make_corpus(spec, docstring_documents(), Counter())
    if spec.startswith("hf:"):
        return _load_hf(spec)
    return _load_path(spec)


def check_source(spec: str) -> None:
    """Refuse what cannot be the name of a corpus, without reading it.

    Raises:
        ValueError: an unknown specification, or a path that is no regular file or folder.
        FileNotFoundError: the path does not exist.
    """
    if spec.startswith("hf:"):
        _hf_name(spec)
    elif spec not in ("stdlib", "docstrings"):
        _source_path(spec)


def _load_stdlib(spec: str) -> Corpus:
    counts: Counter[str] = Counter()
    root = Path(sysconfig.get_path("stdlib"))
    return _make_corpus(spec, read_folder(root, counts, is_wanted=_is_stdlib_source), counts)


def _is_stdlib_source(relative: PurePosixPath, is_folder: bool) -> bool:
    if is_folder:
        return relative.name not in _STDLIB_FOLDERS_LEFT_OUT
    is_machine_made = relative.name.startswith("_sysconfigdata") or str(relative) in _STDLIB_FILES_LEFT_OUT
    return relative.suffix == ".py" and not is_machine_made


def _load_path(spec: str) -> Corpus:
    path = _source_path(spec)
    counts: Counter[str] = Counter()
    if path.is_dir():
        return _make_corpus(spec, read_folder(path, counts, is_wanted=is_not_hidden), counts)
    text = read_text(path, counts)
    return _make_corpus(spec, [] if text is None else [Document(name=path.name, text=text)], counts)


def _source_path(spec: str) -> Path:
    """The regular file or folder that `spec` is the path of."""
    expected = "data: expected 'stdlib', 'docstrings', 'hf:NAME' or the path of a text file or folder"
    if not spec.strip() or "\0" in spec:
        raise ValueError(f"{expected}; got {spec!r}; pass one of these")
    try:
        path = Path(spec).expanduser()
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{expected}; got {spec!r}, which does not exist; check the spelling") from error
    except (OSError, RuntimeError) as error:
        # RuntimeError: the home folder of somebody unknown
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{expected}; got {spec!r}: {reason}; check the path") from error
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise ValueError(f"{expected}; got {spec!r}, a device, pipe or socket; save the text to a file first")
    return path


def _hf_name(spec: str) -> tuple[str, str]:
    """Name and configuration of a data set; the second may be empty."""
    name, _, config = spec.removeprefix("hf:").partition(":")
    if not name:
        raise ValueError(f"data: expected 'hf:NAME' or 'hf:NAME:CONFIG'; got {spec!r}; name a data set")
    return name, config


def _load_hf(spec: str) -> Corpus:
    name, config = _hf_name(spec)
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"data: {spec!r} needs the `datasets` package; pip install 'localexit[data]'") from error
    try:
        splits = _hf_splits(datasets, Path(name).expanduser(), name, config)
    except Exception as error:
        # the package raises its own, its network client's and its readers' errors alike
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"data: could not load {spec!r} through `datasets`: {reason}") from error
    train_name = "train" if "train" in splits else next(iter(splits))
    valid_name = next((key for key in ("validation", "valid", "dev", "test") if key in splits), None)
    train = _hf_documents(spec, train_name, splits[train_name])
    if valid_name in (None, train_name):
        return _make_corpus(spec, train, Counter())
    return _finish(spec, train, _hf_documents(spec, valid_name, splits[valid_name]), Counter())


def _hf_splits(datasets: Any, folder: Path, name: str, config: str) -> Mapping[str, Iterable[dict[str, object]]]:
    """Rows by split: of a folder that `save_to_disk` wrote, or of whatever else `load_dataset` reads."""
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(folder))
    if (folder / "state.json").is_file():
        return {"train": datasets.load_from_disk(str(folder))}
    return datasets.load_dataset(name, config or None)


def _hf_documents(spec: str, split: str, rows: Iterable[dict[str, object]]) -> list[Document]:
    documents = []
    column = None
    for index, row in enumerate(rows):
        column = column or _text_column(spec, row)
        text = clean_text(str(row[column] or ""))
        if text and not text.isspace():
            documents.append(Document(name=f"{split}/{index}", text=text))
    return documents


def _text_column(spec: str, row: dict[str, object]) -> str:
    if "text" in row:
        return "text"
    columns = [name for name, value in row.items() if isinstance(value, str)]
    if not columns:
        raise ValueError(f"data: expected a column of text in {spec!r}; got {', '.join(row)}; choose another data set")
    return columns[0]


def _make_corpus(name: str, documents: Iterable[Document], counts: Counter[str]) -> Corpus:
    """Drop empty and repeated documents, split the rest."""
    kept: dict[bytes, Document] = {}
    for document in documents:
        if not document.text or document.text.isspace():
            counts["empty"] += 1
            continue
        digest = hashlib.sha256(document.text.encode()).digest()
        counts["duplicate"] += digest in kept
        kept.setdefault(digest, document)
    train, valid = _split(list(kept.values()))
    return _finish(name, train, valid, counts, num_files=len(kept))


def _split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    train, valid = [], []
    total = sum(len(document.text) for document in documents)
    for document in documents:
        if len(document.text) > LARGE_SHARE * total:
            head, tail = _cut(document.text)
            train += [Document(name=document.name, text=head)] if head else []
            valid += [Document(name=document.name, text=tail)] if tail else []
        elif _name_hash(document) < VALID_SHARE:
            valid.append(document)
        else:
            train.append(document)
    if not valid and len(train) > 1:
        chosen = min(train, key=_name_hash)
        train.remove(chosen)
        valid.append(chosen)
    return train, valid


def _cut(text: str) -> tuple[str, str]:
    """`text` in two, the second part `VALID_SHARE` of it, between two lines where one ends nearby."""
    position = len(text) - max(1, round(VALID_SHARE * len(text)))
    line_end = text.find("\n", position, position + position // 100)
    position = position if line_end < 0 else line_end + 1
    return text[:position], text[position:]


def _name_hash(document: Document) -> float:
    """A number in [0, 1) that depends on the document's name alone."""
    return int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8], "big") / 2**64


def _finish(
    name: str,
    train: Sequence[Document],
    valid: Sequence[Document],
    counts: Counter[str],
    *,
    num_files: int | None = None,
) -> Corpus:
    skipped = Skipped(**counts)
    if not train or not valid:
        left_out = skipped.describe()
        raise ValueError(
            f"data: expected text to train and to validate on in {name!r}; "
            f"got {len(train) + len(valid)} documents{f' (left out: {left_out})' if left_out else ''}; "
            "pass text files with more than a few characters"
        )
    digest, num_bytes = _digest(train, valid)
    return Corpus(
        name=name,
        train=tuple(train),
        valid=tuple(valid),
        sha256=digest,
        num_files=len(train) + len(valid) if num_files is None else num_files,
        num_bytes=num_bytes,
        skipped=skipped,
    )


def _digest(train: Sequence[Document], valid: Sequence[Document]) -> tuple[str, int]:
    """Hex digest over split, names and contents, and the number of bytes of the contents."""
    digest, num_bytes = hashlib.sha256(), 0
    for split, documents in (("train", train), ("valid", valid)):
        for document in documents:
            data = document.text.encode()
            digest.update(f"{split}\0{document.name}\0{len(data)}\0".encode())
            digest.update(data)
            num_bytes += len(data)
    return digest.hexdigest(), num_bytes
