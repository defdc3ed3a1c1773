"""The benchmark as a command: what is measured, in which order, and what is shown of it."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from . import platforms
from .config import BenchConfig
from .gate import GateError
from .measure import measure
from .numerics import check_numerics, measure_numerics
from .plans import Case
from .platforms import Platform
from .record import Results, environment, read_results
from .shapes import SHAPES, Shape
from .shared import measure_shared
from .sweeps import Sweep
from .tables import losses_table, shown
from .timing import Say
from .updates import measure_updates

_MIRRORS = ("mirror_sampled:storage=fp32", "mirror_sampled:storage=bf16")
_SHARED_RULES = ("anchors", "anchors_shared", "dense", "sketch", "hybrid", "mirror_sampled", "transport_sampled")


def run_bench(config: BenchConfig) -> str:
    """Measure what the configuration asks for and return the tables.

    Raises:
        ValueError: an option does not fit the machine or the file of results.
        GateError: a loss or a gradient is wrong; nothing was timed.
    """
    if config.show is not None:
        content = read_results(config.show)
    else:
        use_cpu = config.cpu or not torch.cuda.is_available()
        platform = platforms.cpu(threads=config.threads, patience=config.patience) if use_cpu else platforms.cuda()
        circumstances = environment(platform.device, threads=torch.get_num_threads(), commit=config.commit)
        results = Results(config.output, circumstances)
        try:
            run_parts(config, platform, results, say=_say)
        except GateError:
            # What was found before, and what is wrong, can still be read.
            _say(shown(results.content))
            raise
        content = results.content
    if config.plots is not None or config.output is not None:
        _write_plots(content, config)
    return f"{shown(content)}\n\n{losses_table(content)}"


def run_parts(config: BenchConfig, platform: Platform, results: Results, *, say: Say) -> None:
    """The sweep, the shared exits, the mirrors' updates, the errors, or shapes: what the configuration names."""
    sweep = config.sweep_of(platform.device.type)
    if sweep is not None:
        measure_sweep(config, sweep, platform, results, say=say)
    if config.shared_exits:
        measure_exits(config, platform, results, say=say)
    if config.mirror_updates:
        measure_mirrors(config, platform, results, say=say)
    if config.numerics:
        measure_errors(config, platform, results, say=say)
    if sweep is None and not (config.shared_exits or config.mirror_updates or config.numerics):
        measure_shapes(config, platform, results, say=say)


def measure_shapes(config: BenchConfig, platform: Platform, results: Results, *, say: Say) -> None:
    """Every shape that is not in the results yet."""
    for name in config.shapes or platform.shapes:
        case = _case(config, platform, Shape.parse(name))
        _measure(case, platform, results, ("shapes", name), rounds=config.rounds or platform.rounds, say=say)


def measure_sweep(config: BenchConfig, sweep: Sweep, platform: Platform, results: Results, *, say: Say) -> None:
    """Every value that is not in the results yet."""
    case = _case(config, platform, sweep.base, rules=sweep.rules())
    if not config.modes:
        # Where all follow the same way, one is enough to see how it bends.
        first = case.plans[0].mode
        case = replace(case, plans=tuple(plan for plan in case.plans if plan.mode == first))
    if platform.device.type == "cpu":
        # A process for each contender and value would take longer than the rest.
        platform = replace(platform, peak_mib=_not_measured)
    for value in sweep.values:
        keys = ("sweeps", sweep.letter, str(value))
        rounds = config.rounds or platform.rounds
        _measure(sweep.at(value, case), platform, results, keys, rounds=rounds, say=say)


def measure_exits(config: BenchConfig, platform: Platform, results: Results, *, say: Say) -> None:
    """Exits that share one unembedding, unless they are in the results."""
    if platform.device.type == "cpu":
        platform = replace(platform, peak_mib=_not_measured)
    shape = Shape.parse(config.shapes[0]) if config.shapes else SHAPES["cpu" if platform.shapes == ("cpu",) else "gpt2"]
    case = _case(replace(config, modes=("step",)), platform, shape, rules=_SHARED_RULES)
    case = replace(case, peers=(), original=None)
    rounds = config.rounds or platform.rounds
    key = str(config.shared_exits)
    if not results.has("shared_exits", key, summary={**case.summary(), "rounds": rounds}):
        measured = measure_shared(case, platform, num_exits=config.shared_exits, rounds=rounds, say=say)
        results.add("shared_exits", key, measured=measured)


def measure_mirrors(config: BenchConfig, platform: Platform, results: Results, *, say: Say) -> None:
    """Updates of a mirror on every shape, unless they are in the results."""
    if platform.device.type == "cpu":
        platform = replace(platform, peak_mib=_not_measured)
    rounds = config.rounds or platform.rounds
    for name in config.shapes or platform.shapes:
        case = _case(replace(config, modes=("step",)), platform, Shape.parse(name), rules=_MIRRORS)
        case = replace(case, peers=(), original=None)
        if not results.has("updates", name, summary={**case.summary(), "rounds": rounds}):
            results.add("updates", name, measured=measure_updates(case, platform, rounds=rounds, say=say))
            platform.release()


def measure_errors(config: BenchConfig, platform: Platform, results: Results, *, say: Say) -> None:
    """Errors against fp64, unless they are in the results.

    Raises:
        GateError: one is outside its budget.
    """
    for name in config.shapes or (platform.numerics_shape,):
        shape = Shape.parse(name)
        if not results.has("numerics", name, summary={"shape": vars(shape), "backend": config.backend}):
            measured = measure_numerics(shape, platform, backend=config.backend, say=say)
            results.add("numerics", name, measured=measured)
            check_numerics(measured)


def _case(config: BenchConfig, platform: Platform, shape: Shape, *, rules: tuple[str, ...] = ()) -> Case:
    plans = config.plans(platform.device.type, rules=rules)
    return Case(shape=shape, plans=plans, peers=config.peers, original=config.original)


def _measure(case: Case, platform: Platform, results: Results, keys: tuple[str, ...], *, rounds: int, say: Say) -> None:
    if results.has(*keys, summary={**case.summary(), "rounds": rounds}):
        say(f"{' '.join(keys)}: measured before")
        return
    results.add(*keys, measured=measure(case, platform, rounds=rounds, say=say))
    platform.release()


def _not_measured(*_: object) -> None:
    return None


def _write_plots(content: dict[str, object], config: BenchConfig) -> None:
    if find_spec("matplotlib") is None:
        _say("no pictures without matplotlib; localexit bench --show FILE --plots FOLDER draws them elsewhere")
        return
    from .plots import write_plots

    file = config.output or config.show or Path("exit.json")
    for path in write_plots(content, config.plots or file.parent, stem=file.stem):
        _say(f"picture: {path}")


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
