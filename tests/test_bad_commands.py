"""Bad input to the command: one line that names it, exit code 2, within a second, and nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.commands import environment, refused
from train.small_runs import write_corpus

# Seconds of computing, ours and torch's: what other processes of the machine take is not counted.
LIMIT = 1.0

# What is not refused must not train for long.
pytestmark = pytest.mark.timeout(60)

# Every case: the arguments, and what the line must name. `text` is a folder with text, `binary` a file without, `pipe`
# a pipe, `notes` a folder that is no run, `damaged` a run whose configuration is cut off.
CASES: list[tuple[str, list[str]]] = [
    # The command itself.
    ("", ["train", "generate"]),
    ("fly", ["fly"]),
    ("Train", ["Train"]),
    ("--fast", ["--fast"]),
    ("train --fast 3", ["--fast"]),
    ("train one two", ["two"]),
    # Comparisons.
    ("compare --preset b9", ["--preset", "b9", "b0-sweep"]),
    ("compare --methods mirrors", ["method must be one of", "mirrors", "backprop"]),
    ("compare --methods dense:topk=3", ["dense", "topk"]),
    ("compare --methods dense@steps=3", ["setting of method 'dense'", "steps"]),
    ("compare --seeds -1", ["seed must be at least 0", "-1"]),
    ("compare --budgets 10", ["warmup_steps", "steps=10"]),
    ("compare --processes 0", ["processes must be at least 1"]),
    ("compare --methods frozen@lr=abc", ["lr must be a positive number", "abc"]),
    ("compare --methods frozen@betas=a/b", ["betas of a method", "1/2/3", "a/b"]),
    ("compare --max-minutes 0", ["max_minutes must be a positive number"]),
    ("compare --max-minutes nan", ["max_minutes must be a positive number", "nan"]),
    ("compare --output binary", ["output", "binary", "no folder that can be written to"]),
    ("compare --merge nowhere", ["cells", "nowhere"]),
    ("compare --merge binary", ["cells", "binary"]),
    ("compare --merge text/0.txt", ["cells", "expected a cell", "in line 1 of 'text/0.txt'"]),
    ("train --steps 10", ["warmup_steps", "steps=10", "60", "fewer warmup_steps"]),
    # Benchmarks.
    ("bench --shapes 64x64", ["shapes must be NxDxV", "64x64"]),
    ("bench --shapes 0x8x8", ["shapes must be NxDxV", "0x8x8"]),
    ("bench --rules denz", ["feedback must be one of", "denz"]),
    ("bench --rounds 1", ["rounds must be at least 5", "1"]),
    ("bench --threads 100000", ["threads must be at most 1024", "100000"]),
    ("bench --patience -1", ["patience must be"]),
    ("bench --sweep Z", ["--sweep", "Z"]),
    ("bench --values 3", ["values", "--sweep"]),
    ("bench --peers numpy", ["--peers", "numpy"]),
    ("bench --show nowhere", ["results", "nowhere"]),
    ("bench --show binary", ["results", "binary"]),
    ("bench --original nowhere", ["original", "nowhere"]),
    ("bench --cpu --output notes", ["output", "expected a file", "notes"]),
    ("bench --cpu --output binary/results.json", ["output", "binary", "no folder that can be written to"]),
    # Options that are not of their type.
    ("train --lr quick", ["--lr", "quick"]),
    ("train --lr", ["--lr"]),
    ("train --steps 1.5", ["--steps", "1.5"]),
    ("train --steps many", ["--steps", "many"]),
    ("train --batch-size x", ["--batch-size", "x"]),
    ("train --betas 0.9", ["--betas"]),
    ("train --betas 0.9 x", ["--betas", "x"]),
    ("train --exit-norm batch", ["--exit-norm", "batch", "shared"]),
    ("train --backward later", ["--backward", "later", "stream"]),
    ("train --decay exponential", ["--decay", "exponential", "cosine"]),
    ("train --precision fp8", ["--precision", "fp8", "bf16"]),
    ("train --non-finite ignore", ["--non-finite", "ignore", "skip"]),
    ("train here --track yes", ["track", "yes", "wandb"]),
    # Options out of range.
    ("train --lr -1", ["lr must be a positive number", "-1"]),
    ("train --lr nan", ["lr must be a positive number", "nan"]),
    ("train --lr inf", ["lr must be a positive number", "inf"]),
    ("train --clip 0", ["clip must be a positive number"]),
    ("train --steps 0", ["steps must be at least 1"]),
    ("train --steps -5", ["steps must be at least 1", "-5"]),
    ("train --steps 10 --warmup-steps 10", ["warmup_steps", "steps=10"]),
    ("train --warmup-steps -1", ["warmup_steps must be at least 0"]),
    ("train --batch-size 0", ["batch_size must be at least 1"]),
    ("train --accumulate 0", ["accumulate must be at least 1"]),
    ("train --context 1", ["context must be at least 2"]),
    ("train --vocab-size 0", ["vocab_size must be at least 1"]),
    ("train --threads 0", ["threads must be at least 1"]),
    ("train --threads 100000", ["threads must be at most 1024", "100000"]),
    ("train --weight-decay -0.1", ["weight_decay must be"]),
    ("train --final-lr 0", ["final_lr must be in"]),
    ("train --final-lr 1.5", ["final_lr must be in"]),
    ("train --betas 0.9 1.0", ["betas must be two numbers"]),
    ("train --betas -0.1 0.9", ["betas must be two numbers"]),
    ("train --label-smoothing 1", ["label_smoothing must be in"]),
    ("train --label-smoothing nan", ["label_smoothing must be in"]),
    ("train --z-loss -1", ["z_loss must be"]),
    ("train --seed -1", ["seed must be at least 0"]),
    ("train --sample-tokens -1", ["sample_tokens must be at least 0"]),
    ("train --max-skipped -1", ["max_skipped must be at least 0"]),
    ("train --log-every 0", ["log_every must be at least 1"]),
    ("train --eval-every 0", ["eval_every must be at least 1"]),
    ("train --eval-tokens 0", ["eval_tokens must be at least 1"]),
    ("train --checkpoint-every 0", ["checkpoint_every must be at least 1"]),
    # Rules and exits.
    ("train --feedback backprop", ["--feedback", "backprop", "mirror_sampled"]),
    ("train --feedback dense:rang=3", ["--feedback", "rang", "rank"]),
    ("train --feedback dense:rank", ["--feedback", "NAME:OPTION=VALUE"]),
    ("train --feedback dense:rank=3,rank=4", ["--feedback", "rank", "given twice"]),
    ("train --feedback dense:rank=9999 --data text", ["rank=9999", "hidden size 192"]),
    ("train --feedback dense:rank=two --data text", ["rank must be an integer", "two"]),
    ("train --feedback anchors:num_anchors=0 --data text", ["num_anchors must be at least 1"]),
    ("train --exits some", ["exits", "some", "every"]),
    ("train --exits everything", ["exits", "everything", "every:K"]),
    ("train --exits every:0", ["exits", "every:0", "every:K"]),
    ("train --exits 1,,2", ["exits", "1,,2"]),
    ("train --exits 9 --data text", ["exits has block 9", "4 blocks"]),
    ("train --exits every:9 --data text", ["every:9", "4 blocks"]),
    ("train --exit-weights --data text", ["exit_weights must be 4 positive numbers", "[]"]),
    ("train --exit-weights 1 2 --data text", ["exit_weights must be 4 positive numbers", "[1.0, 2.0]"]),
    ("train --exit-weights 1 1 1 0 --data text", ["exit_weights must be 4 positive numbers", "0.0"]),
    ("train --exit-weights 1 1 1 nan --data text", ["exit_weights must be 4 positive numbers", "nan"]),
    ("train --cuda-graph --device cpu --data text", ["cuda_graph", "CUDA device", "cpu"]),
    ("train --cuda-graph --feedback mirror:update_every=2 --data text", ["cuda_graph", "'mirror'", "update_every"]),
    ("train --cuda-graph --exits-per-step 1 --data text", ["cuda_graph", "exits_per_step"]),
    ("train --exits-per-step 5 --data text", ["exits_per_step must be at most 4", "5"]),
    # Models, devices, texts.
    ("train --model damaged --data text", ["model", "damaged", "is a run", "'damaged/model'"]),
    ("train --model notes --data text", ["model", "notes", "its tokenizer could not be loaded", "save_pretrained"]),
    ("train --model enormous", ["model", "enormous", "demo"]),
    ("train --model ./nowhere", ["model", "./nowhere"]),
    ("train --model text/../nowhere", ["model", "nowhere"]),
    ("train --device abacus --data text", ["device", "abacus"]),
    ("train --device cuda:99 --data text", ["device", "cuda:99"]),
    ("train --data no/such/text", ["data", "no/such/text"]),
    ("train --data hf:", ["data", "hf:NAME"]),
    ("train --data pipe", ["data", "pipe", "a device, pipe or socket"]),
    ("train --data /dev/zero", ["data", "/dev/zero", "a device, pipe or socket"]),
    ("train --data ~nobody-here/text", ["data", "~nobody-here"]),
    ("train --data binary", ["data", "binary", "1 binary"]),
    ("train --data text --vocab-size 300 --context 100000", ["data", "one context of 100000"]),
    ("train --data text --vocab-size 60000", ["vocab_size", "expected at most", "60000"]),
    # Folders of runs.
    ("train --resume", ["run", "--resume"]),
    ("train nowhere --resume", ["run", "nowhere", "config.json"]),
    ("train notes --resume", ["run", "notes", "config.json"]),
    ("train damaged --resume", ["config.json", "damaged"]),
    ("train notes --data text", ["run", "notes", "exists", "--resume"]),
    ("train binary --data text", ["run", "binary", "exists"]),
    ("generate nowhere --prompt x", ["run", "nowhere"]),
    ("generate nowhere", ["--prompt"]),
    ("generate", ["RUN"]),
    ("generate notes --prompt x", ["run", "notes", "config.json"]),
    ("generate damaged --prompt x", ["config.json", "damaged"]),
    ("generate nowhere --prompt x --exit last", ["--exit", "last"]),
    ("generate nowhere --prompt x --temperature -1", ["temperature"]),
    ("generate nowhere --prompt x --temperature nan", ["temperature"]),
    ("generate nowhere --prompt x --max-new-tokens -1", ["max_new_tokens"]),
    ("generate nowhere --prompt x --exit sure", ["exit", "sure"]),
    ("generate nowhere --prompt x --exit confidence --threshold 2", ["threshold", "2"]),
    ("generate nowhere --prompt x --draft-exit 0 --draft-tokens 0", ["draft_tokens"]),
    ("generate nowhere --prompt x --draft-exit 0 --exit 1", ["draft_exit", "exit 1"]),
    ("generate nowhere --prompt x --top-k -1", ["top_k"]),
    ("generate nowhere --prompt x --seed -1", ["seed"]),
    ("generate nowhere --prompt x --seed 99999999999999999999", ["seed must be a 64-bit integer"]),
    ("generate nowhere --prompt x --threshold 0.5", ["threshold", "exit -1", "--exit confidence"]),
    ("generate nowhere --prompt x --exit 2 --sure-exits 1", ["sure_exits", "exit 2", "--exit confidence"]),
    ("generate nowhere --prompt x --draft-tokens 3", ["draft_tokens", "--draft-exit"]),
    ("generate nowhere --prompt x --exit confidence --draft-tokens 3", ["draft_tokens", "--draft-exit"]),
    ("generate nowhere --prompt x --exit confidence --sure-exits", ["exits", "at least one"]),
    ("generate nowhere --prompt x --exit confidence --draft-exit 0", ["draft_exit", "exit confidence"]),
    ("eval", ["RUN"]),
    ("eval nowhere", ["run", "nowhere"]),
    ("eval notes", ["run", "notes", "config.json"]),
    ("eval damaged", ["config.json", "damaged"]),
    ("eval nowhere --tokens 0", ["tokens must be at least 1"]),
    ("eval nowhere --tokens many", ["--tokens", "many"]),
    ("eval nowhere --thresholds 0.5 2", ["thresholds", "2"]),
    ("report", ["runs"]),
    ("report nowhere", ["run", "nowhere"]),
    ("report notes", ["run", "notes", "config.json"]),
    ("report damaged", ["config.json", "damaged"]),
    ("report binary", ["run", "binary"]),
    ("audit", ["MODEL_OR_RUN"]),
    ("audit enormous", ["model", "enormous", "demo"]),
    ("audit tiny --feedback backprop", ["feedback", "backprop"]),
    ("audit tiny --exits none", ["exits", "none"]),
    ("audit tiny --exits 7", ["exits has block 7", "2 blocks"]),
    ("audit tiny --seed -1", ["seed must be at least 0"]),
]
# A process of its own, whose start counts: refused without torch.
FRESH = [
    "train --fast 3",
    "train --lr 0",
    "train --feedback dense:rang=3",
    "train --model enormous",
    "train --data no/such/text",
    "train notes --data text",
    "train nowhere --resume",
    "generate nowhere --prompt x",
    "generate nowhere --prompt x --temperature -1",
    "report",
    "audit enormous",
    "audit tiny --feedback backprop",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where commands run; everything that work imports is imported before anything is timed."""
    from transformers import LlamaForCausalLM  # noqa: F401

    import localexit.measure
    import localexit.report
    import localexit.train.loop  # noqa: F401

    folder = tmp_path_factory.mktemp("here")
    write_corpus(folder / "text", num_files=4)
    (folder / "binary").write_bytes(b"\x7fELF\0\0")
    os.mkfifo(folder / "pipe")
    (folder / "notes").mkdir()
    (folder / "notes" / "todo.txt").write_text("mine")
    (folder / "damaged").mkdir()
    for name in ("config.json", "corpus.json", "metrics.jsonl"):
        (folder / "damaged" / name).write_text('{"format": 1, "train": {')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # What is derived from a text is kept, whether the run begins or not.
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield folder


def files(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


@pytest.mark.skipif(os.name != "posix", reason="has a case with a pipe")
@pytest.mark.parametrize(("arguments", "names"), CASES, ids=[arguments or "nothing" for arguments, _ in CASES])
def test_bad_input_is_one_line_that_names_it(
    arguments: str, names: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, start = files(folder), time.process_time()
    line = refused(arguments.split(), capsys)
    assert time.process_time() - start < LIMIT
    assert all(name in line for name in names), line
    assert files(folder) == before


def test_there_are_enough_cases() -> None:
    assert len({arguments for arguments, _ in CASES}) == len(CASES) >= 80


@pytest.mark.skipif(os.name != "posix", reason="needs wait4")
@pytest.mark.parametrize("arguments", FRESH)
def test_a_fresh_process_refuses_within_a_second(arguments: str, folder: Path) -> None:
    status, seconds = run_fresh(arguments)
    assert status == 2
    assert seconds < LIMIT


@pytest.mark.skipif(os.name != "posix", reason="needs wait4")
@pytest.mark.parametrize("command", ["", "train", "generate", "eval", "report", "audit", "bench", "compare"])
def test_help_comes_within_a_second(command: str, folder: Path) -> None:
    status, seconds = run_fresh(f"{command} --help")
    assert status == 0
    assert seconds < LIMIT


def run_fresh(arguments: str) -> tuple[int, float]:
    """Exit code of a command in a process of its own, and the seconds of computing it took, its start included."""
    process = subprocess.Popen(
        [sys.executable, "-m", "localexit", *arguments.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime
