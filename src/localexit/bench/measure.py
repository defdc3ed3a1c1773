"""One shape, from the gate to numbers."""

from __future__ import annotations

import os
import warnings
from functools import partial
from typing import Any

from .contenders import PRODUCT, Contender
from .gate import check_rules, errors_of
from .peers import EAGER
from .plans import Case
from .platforms import Platform
from .prepare import Prepared, prepare
from .timing import Say, Times


def measure(case: Case, platform: Platform, *, rounds: int, say: Say) -> dict[str, Any]:
    """Gate, peak memory and interleaved times of a case, as they are written to the results.

    Raises:
        GateError: a rule is wrong; nothing was timed.
    """
    # The rule with the longest nucleus is timed with the nucleus it has by default.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the nucleus of some tokens")
        say(f"{case.shape}: gate")
        check_rules(case.plans, case.shape.hidden_size, platform.device)
        prepared = prepare(case, dtype=platform.dtype, device=platform.device)
        errors = errors_of(prepared, platform, say=lambda line: say(f"{case.shape}: {line}"))
        say(f"{case.shape}: peak memory of {len(prepared.contenders)} contenders")
        peaks = _peaks(case, prepared, platform)
        say(f"{case.shape}: times of {len(prepared.contenders)} contenders")
        load = os.getloadavg()
        runs = {name: partial(contender, prepared.inputs) for name, contender in prepared.contenders.items()}
        times = platform.timer(runs, rounds=rounds, say=lambda line: say(f"{case.shape}: {line}"))
    return {
        **case.summary(),
        "dtype": str(platform.dtype).removeprefix("torch."),
        "rounds": rounds,
        "load_average": [round(value, 2) for value in load],
        "not_available": prepared.not_available,
        "results": [
            _result(contender, times, peaks.get(name), errors.get(name))
            for name, contender in prepared.contenders.items()
        ],
    }


def _peaks(case: Case, prepared: Prepared, platform: Platform) -> dict[str, float | None]:
    peaks = {}
    for name, contender in prepared.contenders.items():
        if contender.kind != "products":
            prepared.inputs.clear()
            peaks[name] = platform.peak_mib(case, name, partial(contender, prepared.inputs))
    prepared.inputs.clear()
    platform.release()
    return peaks


def _result(contender: Contender, times: dict[str, Times], peak: float | None, error: float | None) -> dict[str, Any]:
    own = times[contender.name]
    return {
        "name": contender.name,
        "kind": contender.kind,
        "backend": contender.backend,
        "median_ms": own.median,
        "min_ms": min(own.ms),
        "max_ms": max(own.ms),
        "times_ms": own.ms,
        "cores_used_by_others": own.others,
        "products": 1 / own.ratio_to(times[PRODUCT]),
        "vs_eager": own.ratio_to(times[EAGER]) if EAGER in times else None,
        "peak_mib": peak,
        "error": error,
        "note": contender.note,
    }
