"""Many steps take no more memory than few, and the figures of the long run are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import environment
from train.steps import read_figures

SHORT = """
import sys
from functools import partial
from pathlib import Path
from localexit.train import loop
from train.steps import many_steps, run_steps
loop.compile_units = partial(loop.compile_units, backend="eager")
folder, text, cache = map(Path, sys.argv[1:])
run_steps(many_steps(text, 1200, compile=True), folder, cache_dir=cache)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_does_not_grow_with_steps(text: Path, cache_dir: Path, tmp_path: Path) -> None:
    """A short form of `make long-run`, in a process of its own; times of a busy machine say nothing.

    The compiler traces what is trained, and it runs as it is: blocks after the first have another kind of input.
    """
    arguments = [str(tmp_path), str(text), str(cache_dir)]
    subprocess.run([sys.executable, "-c", SHORT, *arguments], env=environment(), check=True, capture_output=True)
    figures = read_figures(tmp_path / "samples.jsonl", warm_up=400)
    assert (figures.num_steps, figures.num_processes, figures.recompilations) == (1200, 1, 1)
    # 1 % of what a process takes is some 5 MB, or 5 kB a step here.
    assert figures.growth < 0.01


def write_samples(path: Path, *, leak: int = 0, slower: float = 0.0, gpu_leak: int = 0) -> None:
    samples = [
        {
            "process": process,
            "step": step,
            "step_of_process": step - start,
            "rss": 10**9 + leak * (step > 2000) * step,
            "gpu": 10**6 * (step - start >= 50) + gpu_leak * step,
            "gpu_reserved": 2 * 10**6 * (step - start >= 50),
            "seconds": 1 + slower * step / 100_000,
            "recompilations": 1,
        }
        for process, start, steps in (
            (7, 0, (50, *range(100, 5_000, 100))),
            (8, 4_070, (4_100, 4_120, *range(4_200, 100_001, 100))),
        )
        for step in steps
    ]
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))


@pytest.mark.parametrize(("leak", "growth"), [(0, 0.0), (400, 0.035)])
@pytest.mark.parametrize(("slower", "drift"), [(0.0, 1.0), (0.2, 1.174)])
def test_figures_find_leaks_and_drift(tmp_path: Path, leak: int, growth: float, slower: float, drift: float) -> None:
    write_samples(tmp_path / "samples.jsonl", leak=leak, slower=slower)
    figures = read_figures(tmp_path / "samples.jsonl", warm_up=2000)
    assert (figures.num_steps, figures.num_processes, figures.recompilations) == (100_000, 2, 1)
    assert figures.growth == pytest.approx(growth, abs=2e-3)
    assert figures.drift == pytest.approx(drift, abs=5e-3)


@pytest.mark.parametrize("gpu_leak", [0, 1])
def test_figures_find_what_grows_on_a_gpu_after_the_50th_step_of_a_process(tmp_path: Path, gpu_leak: int) -> None:
    write_samples(tmp_path / "samples.jsonl", gpu_leak=gpu_leak)
    figures = read_figures(tmp_path / "samples.jsonl", warm_up=2000)
    assert (figures.gpu_growth, figures.reserved_growth) == (gpu_leak * (100_000 - 4_120), 0)
