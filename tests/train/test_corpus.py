from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from localexit.train.corpus import Corpus, load_corpus
from localexit.train.docstrings import docstring_documents


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def many(count: int = 100) -> dict[str, str | bytes]:
    return {f"{index:03}.txt": f"text number {index:03}\n" for index in range(count)}


def names(corpus: Corpus) -> set[str]:
    return {document.name for document in corpus.train + corpus.valid}


def test_stdlib_is_source_code_without_tests_encodings_and_generated_tables() -> None:
    corpus = load_corpus("stdlib")
    found = names(corpus)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= found
    assert all(name.endswith(".py") for name in found)
    for part in ("test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages"):
        assert not [name for name in found if part in name.split("/")], part
    assert not found & {"html/entities.py", "stringprep.py", "sitecustomize.py"}
    assert corpus.num_bytes > 5_000_000


def test_stdlib_is_the_same_each_time_and_split_without_overlap() -> None:
    corpus = load_corpus("stdlib")
    assert corpus == load_corpus("stdlib")
    texts = [document.text for document in corpus.train + corpus.valid]
    assert len(set(texts)) == len(texts) == corpus.num_files
    assert 0.03 < sum(len(document.text) for document in corpus.valid) / corpus.num_bytes < 0.12
    assert [document.name for document in corpus.train] == sorted(document.name for document in corpus.train)


def test_a_folder_counts_what_it_leaves_out(tmp_path: Path) -> None:
    write(
        tmp_path / "text",
        {
            "good.txt": "a text\n" * 20,
            "deep/er.md": "another text\n" * 20,
            "copy.txt": "a text\n" * 20,
            "latin.txt": b"caf\xe9 au lait\n" * 20,
            "bom.txt": b"\xef\xbb\xbf" + b"begins with a mark\n" * 20,
            "zeros.bin": b"text\0with zeros",
            "empty.txt": "",
            "blank.txt": " \n\n",
            ".hidden": "not read\n",
            ".git/config": "not read\n",
        },
    )
    outside = write(tmp_path / "outside", {"secret.txt": "elsewhere\n" * 20})
    os.mkfifo(tmp_path / "text" / "pipe")
    (tmp_path / "text" / "loop").symlink_to("loop")
    (tmp_path / "text" / "up").symlink_to("..")
    (tmp_path / "text" / "linked.txt").symlink_to(outside / "secret.txt")

    corpus = load_corpus(str(tmp_path / "text"))

    assert names(corpus) == {"bom.txt", "copy.txt", "deep/er.md", "latin.txt", "linked.txt"}
    assert corpus.num_files == 5
    assert corpus.skipped.describe() == (
        "1 binary, 1 duplicate, 2 empty, 1 linked folder, 1 special, 1 unreadable, 1 invalid utf8"
    )
    texts = {document.name: document.text for document in corpus.train}
    assert texts["bom.txt"].startswith("begins")
    assert texts["latin.txt"].startswith("caf\ufffd au")


@pytest.mark.parametrize("text", ["line of text\n" * 1000, "no line end " * 1000], ids=["lines", "one line"])
def test_a_single_file_gives_its_tail_to_validation(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"book.txt": text})
    corpus = load_corpus(str(tmp_path / "book.txt"))
    (train,), (valid,) = corpus.train, corpus.valid
    assert train.text + valid.text == text
    assert 0.05 < len(valid.text) / len(text) < 0.1
    assert corpus.num_bytes == len(text)
    assert ("\n" in text) == train.text.endswith("\n")


def test_the_side_of_a_small_file_depends_on_its_name_alone(tmp_path: Path) -> None:
    before = load_corpus(str(write(tmp_path / "a", many(100))))
    after = load_corpus(str(write(tmp_path / "b", many(200))))
    assert {document.name for document in before.valid} <= {document.name for document in after.valid}
    assert 0 < len(after.valid) < 40


def test_some_file_validates_when_no_name_falls_there(tmp_path: Path) -> None:
    unlucky: dict[str, str | bytes] = {}
    for index in range(200):
        name = f"{index}.txt"
        if hashlib.sha256(name.encode()).digest()[0] > 128:
            unlucky[name] = f"text {index:03}\n"
    corpus = load_corpus(str(write(tmp_path, dict(list(unlucky.items())[:30]))))
    assert (len(corpus.train), len(corpus.valid)) == (29, 1)


def test_the_digest_tells_contents_apart_and_ignores_where_they_lie(tmp_path: Path) -> None:
    first = load_corpus(str(write(tmp_path / "a", many())))
    same = load_corpus(str(write(tmp_path / "b", many())))
    changed = load_corpus(str(write(tmp_path / "c", many() | {"000.txt": "text number 00x\n"})))
    renamed = load_corpus(str(write(tmp_path / "d", {f"x{name}": text for name, text in many().items()})))
    assert first.sha256 == same.sha256
    assert len({first.sha256, changed.sha256, renamed.sha256}) == 3


def test_names_that_are_not_utf8_can_be_hashed(tmp_path: Path) -> None:
    write(tmp_path, many(30))
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("a strange name\n")
    assert "caf\ufffd.txt" in names(load_corpus(str(tmp_path)))


def test_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, {"book.txt": "a line\n" * 100})
    assert load_corpus("~/book.txt").num_bytes == 700


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("", ValueError, "''"),
        ("a\0b", ValueError, "a\\x00b"),
        ("stdlb", FileNotFoundError, "'stdlb', which does not exist"),
        ("x" * 5000, ValueError, "too long"),
        ("~nobody-of-this-name/x", ValueError, "home directory"),
        ("hf:", ValueError, "name a data set"),
        ("{tmp}/none", FileNotFoundError, "does not exist"),
        ("{tmp}/pipe", ValueError, "a device, pipe or socket"),
        ("/dev/null", ValueError, "a device, pipe or socket"),
        ("{tmp}/nothing", ValueError, "0 documents"),
        ("{tmp}/binary", ValueError, "left out: 1 binary"),
        ("{tmp}/binary/only.bin", ValueError, "left out: 1 binary"),
        ("{tmp}/short.txt", ValueError, "more than a few characters"),
    ],
)
def test_bad_specifications_say_what_to_do(tmp_path: Path, spec: str, error: type[Exception], words: str) -> None:
    (tmp_path / "nothing").mkdir()
    write(tmp_path, {"binary/only.bin": b"\0\1", "short.txt": "x"})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(error) as caught:
        load_corpus(spec.replace("{tmp}", str(tmp_path)))
    message = str(caught.value)
    assert "\n" not in message
    assert words in message
    for word in ("data: expected", "got", ";"):
        assert word in message


def test_unreadable_files_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, many(30))
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "007.txt":
            raise PermissionError
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    corpus = load_corpus(str(tmp_path))
    assert (corpus.num_files, corpus.skipped.unreadable) == (29, 1)


def test_docstrings_are_read_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = '''"""About the module."""
raise RuntimeError("must not be imported")
class Thing:
    """About the class."""
    async def act(self):
        r"""About \\d the method."""
        def inner():
            """Not public."""
    def silent(self): ...
def surrogate():
    """Half a pair: \\ud800."""
'''
    files: dict[str, str | bytes] = {
        "fakepackage/__init__.py": module,
        "fakepackage/broken.py": "def (",
        "fakepackage/silent.py": "x = '\\d'\n",
        "fakepackage/tests/test_it.py": '"""A test."""',
    }
    monkeypatch.syspath_prepend(str(write(tmp_path, files)))
    (document,) = docstring_documents(("fakepackage", "notinstalledpackage"))
    assert document.name == "fakepackage/__init__.py"
    assert document.text.split("\n\n") == [
        "About the module.",
        "Thing",
        "About the class.",
        "Thing.act",
        "About \\d the method.",
        "surrogate",
        "Half a pair: ?.\n",
    ]


def test_docstrings_without_a_package_name_what_to_install() -> None:
    with pytest.raises(ValueError, match="pip install notinstalledpackage"):
        docstring_documents(("notinstalledpackage", "json.decoder"))


def test_docstrings_of_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localexit.train.corpus.docstring_documents", lambda: docstring_documents(("numpy",)))
    corpus = load_corpus("docstrings")
    assert any("numpy/" in name for name in names(corpus))
    assert corpus.num_bytes > 100_000


def fake_datasets(monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[dict[str, object]]]) -> list[object]:
    calls: list[object] = []

    def load_dataset(name: str, config: str | None) -> dict[str, list[dict[str, object]]]:
        calls.append((name, config))
        if not splits:
            raise RuntimeError("cannot reach it\nwith details")
        return splits

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def rows(count: int, column: str = "text") -> list[dict[str, object]]:
    return [{"id": index, "title": "same", column: f"row {index:04}"} for index in range(count)]


def test_hf_uses_the_validation_split_of_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"test": rows(3), "train": [{"id": 50, "title": "same", "text": None}, *rows(50)], "validation": rows(5)}
    calls = fake_datasets(monkeypatch, splits)
    corpus = load_corpus("hf:owner/name:raw")
    assert calls == [("owner/name", "raw")]
    assert (len(corpus.train), len(corpus.valid), corpus.num_files) == (50, 5, 55)
    assert corpus.valid[0].name == "validation/0"


def test_hf_makes_a_validation_split_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_datasets(monkeypatch, {"everything": [{"content": f"row {index}"} for index in range(100)]})
    corpus = load_corpus("hf:name")
    assert calls == [("name", None)]
    assert len(corpus.train) + len(corpus.valid) == 100
    assert corpus.valid


def test_hf_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, {"train": [{"id": 1, "label": 2}]})
    with pytest.raises(ValueError, match="a column of text .* got id, label"):
        load_corpus("hf:name")
    fake_datasets(monkeypatch, {})
    with pytest.raises(ValueError, match="could not load 'hf:name' through `datasets`: cannot reach it$"):
        load_corpus("hf:name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'localexit\[data\]'$"):
        load_corpus("hf:name")


@pytest.mark.parametrize("kind", ["parquet", "json", "dict on disk", "one on disk"])
def test_a_local_data_set_is_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows(40)), "validation": datasets.Dataset.from_list(rows(4))}
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    if kind == "dict on disk":
        splits.save_to_disk(str(folder))
    elif kind == "one on disk":
        splits["train"].save_to_disk(str(folder))
    else:
        for name, split in splits.items():
            getattr(split, f"to_{kind}")(str(folder / f"{name}.{kind}"))
    corpus = load_corpus(f"hf:{folder}")
    texts = [document.text for document in (*corpus.train, *corpus.valid)]
    if kind == "one on disk":
        assert sorted(texts) == [row["text"] for row in rows(40)]
        assert corpus.valid
    else:
        assert texts == [row["text"] for row in (*rows(40), *rows(4))]
        assert len(corpus.valid) == 4
