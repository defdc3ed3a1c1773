"""Train language models locally: every block has its own exit, and no gradient crosses between blocks.

Importing this needs neither CUDA nor Triton nor transformers, and takes no time: torch is imported with the first
name that is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localexit.exits import (
        DataParallel,
        DenseRandomCompressor,
        ExactParallelExitHead,
        ExitHead,
        ExitStats,
        ExitStep,
        FactorizedExitHead,
        HybridTopKTailSketchCompressor,
        VocabParallel,
        exit_cross_entropy,
        exit_step,
        orthonormal_columns,
    )
    from localexit.feedback import (
        Dense,
        ExactParallel,
        Feedback,
        Hybrid,
        LogitAnchors,
        SharedAnchors,
        Sketch,
        WeightMirror,
        WeightTransport,
        feedback_names,
        make_feedback,
    )
    from localexit.local import ExitSchedule, LocalModel, LocalOutput, Pipeline, StepInBackward, load_exits, save_exits
    from localexit.local.attach import attach
    from localexit.local.compiled import compile_units

__version__ = "0.1.0"

__all__ = [
    "DataParallel",
    "Dense",
    "DenseRandomCompressor",
    "ExactParallel",
    "ExactParallelExitHead",
    "ExitHead",
    "ExitSchedule",
    "ExitStats",
    "ExitStep",
    "FactorizedExitHead",
    "Feedback",
    "Hybrid",
    "HybridTopKTailSketchCompressor",
    "LocalModel",
    "LocalOutput",
    "LogitAnchors",
    "Pipeline",
    "SharedAnchors",
    "Sketch",
    "StepInBackward",
    "VocabParallel",
    "WeightMirror",
    "WeightTransport",
    "attach",
    "compile_units",
    "exit_cross_entropy",
    "exit_step",
    "feedback_names",
    "load_exits",
    "make_feedback",
    "orthonormal_columns",
    "save_exits",
]

# Rooms with public names; each lists its own in `__all__`.
_ROOMS = ("feedback", "exits", "local")


def __getattr__(name: str) -> object:
    for room in _ROOMS if name in __all__ else ():
        module = import_module(f"{__name__}.{room}")
        if name in module.__all__:
            # Kept: from now on the name is found without this function.
            return globals().setdefault(name, getattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
