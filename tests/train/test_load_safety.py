"""What a stranger could hand over is read as data, within bounds, and from where it says; or it is refused."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import localexit
from localexit._files import LARGEST_JSON
from localexit.report import read_run, write_report
from localexit.train import checkpoint
from localexit.train.checkpoint import CheckpointError, load_checkpoint
from localexit.train.corpus import load_corpus
from localexit.train.export import load_run
from localexit.train.models import load_pretrained, load_tokenizer
from train.small_runs import small_config, train_quietly

assert localexit.__file__ is not None
SOURCES = sorted(Path(localexit.__file__).parent.rglob("*.py"))
CPU = torch.device("cpu")
BOMB_BYTES = 10 * 2**30


@pytest.fixture(scope="module")
def trained(text: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_quietly(small_config(text), tmp_path_factory.mktemp("runs") / "run", cache_dir).run.path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run of its own, to be forged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _within_a_few_seconds() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < 20


# Source


def forbidden(tree: ast.AST) -> Iterator[str]:
    """What of a source could run code that comes with data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("eval", "exec", "compile", "torch.load", "np.load", "numpy.load", "yaml.load", "os.system"):
                yield name
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            yield from (f"{key}={given[key]}" for key, safe in SAFE_VALUES.items() if given.get(key, safe) != safe)


UNSAFE_MODULES = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
SAFE_VALUES = {"weights_only": "True", "trust_remote_code": "False", "allow_pickle": "False", "shell": "False"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-2:]))
def test_no_source_runs_what_it_reads(path: Path) -> None:
    assert list(forbidden(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "f(path, weights_only=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_search_of_the_source_finds(code: str) -> None:
    assert list(forbidden(ast.parse(code)))


# Tensors


def header(**tensors: dict[str, Any]) -> bytes:
    content = json.dumps(tensors).encode()
    return len(content).to_bytes(8, "little") + content


def floats(start: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


FORGED: dict[str, bytes] = {
    "ten gigabytes declared": header(weight=floats(0, BOMB_BYTES, [BOMB_BYTES // 4])) + b"\0" * 16,
    "a header longer than the file": (2**40).to_bytes(8, "little") + b"{}",
    "a header of 2^64 bytes": b"\xff" * 8 + b"{}",
    "overlapping": header(a=floats(0, 16, [4]), b=floats(8, 24, [4])) + b"\0" * 24,
    "negative": header(weight=floats(-16, 0, [4])) + b"\0" * 16,
    "a hole": header(a=floats(0, 4, [1]), b=floats(12, 16, [1])) + b"\0" * 16,
    "end before start": header(weight=floats(16, 0, [4])) + b"\0" * 16,
    "a shape that overflows": header(weight=floats(0, 16, [2**62, 2**62])) + b"\0" * 16,
    "a shape of another size": header(weight=floats(0, 16, [5])) + b"\0" * 16,
    "an unknown dtype": header(weight={"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}) + b"\0" * 8,
    "nested without end": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "not JSON": (4).to_bytes(8, "little") + b"\xff\xfe{}",
    "a pickle": pickle.dumps({"weight": [1.0]}),
    "nothing": b"",
}


@pytest.mark.parametrize("content", FORGED.values(), ids=FORGED)
def test_forged_tensors_are_refused(run: Path, content: bytes) -> None:
    newest = run / "checkpoints" / "step-6"
    (newest / "model.safetensors").write_bytes(content)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["sha256"]["model.safetensors"] = checkpoint._digest(newest / "model.safetensors")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="checkpoint step-6: "):
        load_checkpoint(newest)
    (run / "model" / "exits.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"exits\.safetensors cannot be read"):
        load_run(run, device=CPU)
    (run / "model" / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="its model could not be loaded"):
        load_run(run, device=CPU)


def test_a_checkpoint_with_other_tensors_is_refused(run: Path, text: Path, cache_dir: Path) -> None:
    """Names are compared with the model's, and never become paths."""
    for newest in (run / "checkpoints").iterdir():
        tensors = load_file(newest / "model.safetensors")
        save_file({**tensors, "../../outside": torch.zeros(1)}, newest / "model.safetensors")
        manifest = json.loads((newest / "manifest.json").read_text())
        manifest["sha256"]["model.safetensors"] = checkpoint._digest(newest / "model.safetensors")
        (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="other parameters than the model .*outside"):
        train_quietly(small_config(text), run, cache_dir, resume=True)


def test_a_pickled_model_is_not_opened(run: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    (run / "model" / "model.safetensors").unlink()
    with zipfile.ZipFile(run / "model" / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
    for name in ("pytorch_model.bin", "model.bin", "exits.bin"):
        (run / "model" / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="its model could not be loaded"):
        load_run(run, device=CPU)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "..", ["a"], None])
def test_an_index_that_names_files_elsewhere_is_refused(run: Path, shard: object) -> None:
    model = run / "model"
    (model / "model.safetensors").rename(run / "outside.safetensors")
    names = list(load_file(run / "outside.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not map weights to files beside it"):
        load_pretrained(str(model))


# Links


def link_file(path: Path, outside: Path) -> None:
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "checkpoints/step-6",
        "checkpoints/step-6/model.safetensors",
        "model",
        "model/model.safetensors",
    ],
)
def test_links_out_of_a_run_are_refused(run: Path, tmp_path: Path, text: Path, cache_dir: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    link_file(run / name, outside)
    before = sorted(outside.rglob("*"))
    calls: list[Callable[[], object]] = [
        lambda: train_quietly(small_config(text), run, cache_dir, resume=True),
        lambda: load_run(run, device=CPU),
        lambda: read_run(run),
        lambda: write_report([run]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"run: expected a folder whose links stay in it, got .*'{name}' leads to"):
            call()
    assert sorted(outside.rglob("*")) == before


@pytest.mark.parametrize("name", ["plots", "report.html"])
def test_a_report_is_not_written_through_a_link(run: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (run / name).symlink_to(outside)
    with pytest.raises(ValueError, match=f"'{name}' leads to"):
        write_report([run])
    assert list(outside.iterdir()) == []


def test_a_run_may_lie_behind_a_link_and_have_links_of_its_own(run: Path, tmp_path: Path) -> None:
    (run / "newest").symlink_to("checkpoints/step-6")
    (tmp_path / "short").symlink_to(run)
    assert read_run(tmp_path / "short").num_exits == 2
    load_run(tmp_path / "short", device=CPU)


# Bombs


def grow(path: Path) -> None:
    """As large as a bomb, without taking the room on the disk."""
    with path.open("r+b") as file:
        file.truncate(BOMB_BYTES)


def nest(path: Path) -> None:
    path.write_text('{"format": 1, "train": ' + "[" * 10**6 + "]" * 10**6 + "}")


@pytest.mark.parametrize("make_bomb", [grow, nest])
@pytest.mark.parametrize("name", ["config.json", "corpus.json", "checkpoints/step-6/state.json"])
def test_json_bombs_are_refused(
    run: Path, text: Path, cache_dir: Path, name: str, make_bomb: Callable[[Path], None]
) -> None:
    make_bomb(run / name)
    if name.endswith("state.json"):
        manifest = run / "checkpoints" / "step-6" / "manifest.json"
        make_bomb(manifest)
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            load_checkpoint(manifest.parent)
    else:
        with pytest.raises(ValueError, match="the file is damaged"):
            read_run(run)
        with pytest.raises(ValueError, match="the file is damaged"):
            train_quietly(small_config(text), run, cache_dir, resume=True)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_bombs_in_a_model_are_refused(run: Path, name: str) -> None:
    grow(run / "model" / name)
    with pytest.raises(ValueError, match=rf"could not be loaded: {name}: expected at most 268435456 bytes"):
        load_run(run, device=CPU)
    nest(run / "model" / name)
    with pytest.raises(ValueError, match="could not be loaded: "):
        load_run(run, device=CPU)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_a_model_whose_configuration_is_no_file_is_refused(run: Path, make: Callable[[Path], None]) -> None:
    (run / "model" / "config.json").unlink()
    make(run / "model" / "config.json")
    for load in (load_pretrained, load_tokenizer):
        with pytest.raises(ValueError, match=r"could not be loaded: config\.json: expected a file"):
            load(str(run / "model"))


def test_a_line_of_the_log_without_end_is_refused(run: Path, text: Path, cache_dir: Path) -> None:
    (run / "metrics.jsonl").write_bytes(b"\0")
    grow(run / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1: longer than any that was written"):
        read_run(run)
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1: longer than any that was written"):
        train_quietly(small_config(text), run, cache_dir, resume=True)
    assert (run / "metrics.jsonl").stat().st_size == BOMB_BYTES


def test_a_line_of_the_log_without_bottom_is_refused_or_dropped(run: Path, text: Path, cache_dir: Path) -> None:
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"kind": "event", "step": 6, "event": ' + "[" * 10**6 + "]" * 10**6 + "}\n")
    with pytest.raises(ValueError, match="expected a JSON object, got .*nested deeper than any"):
        read_run(run)
    assert train_quietly(small_config(text), run, cache_dir, resume=True).status == "finished"
    read_run(run)


def test_a_number_without_end_is_refused(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": ' + "9" * (LARGEST_JSON // 2) + "}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1: expected a JSON object"):
        read_run(run)


def test_an_archive_in_a_corpus_is_not_unpacked(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("some text\n" * 50)
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.txt", b"\0" * 50_000_000)
    corpus = load_corpus(str(folder))
    assert corpus.num_files == 1
    assert corpus.skipped.describe() == "1 binary"


def test_a_device_in_a_corpus_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("some text\n" * 50)
    (folder / "endless").symlink_to("/dev/zero")
    assert load_corpus(str(folder)).skipped.describe() == "1 special"
