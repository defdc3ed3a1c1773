"""Train language models locally: every block has its own exit, and no gradient crosses between blocks.

Importing this needs neither CUDA nor Triton nor transformers.
"""

from localexit.exits import (
    DenseRandomCompressor,
    ExactParallelExitHead,
    ExitHead,
    ExitStats,
    ExitStep,
    FactorizedExitHead,
    HybridTopKTailSketchCompressor,
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
    Sketch,
    WeightMirror,
    WeightTransport,
    feedback_names,
    make_feedback,
)
from localexit.local import LocalModel, LocalOutput, attach

__version__ = "0.1.0"

__all__ = [
    "Dense",
    "DenseRandomCompressor",
    "ExactParallel",
    "ExactParallelExitHead",
    "ExitHead",
    "ExitStats",
    "ExitStep",
    "FactorizedExitHead",
    "Feedback",
    "Hybrid",
    "HybridTopKTailSketchCompressor",
    "LocalModel",
    "LocalOutput",
    "LogitAnchors",
    "Sketch",
    "WeightMirror",
    "WeightTransport",
    "attach",
    "exit_cross_entropy",
    "exit_step",
    "feedback_names",
    "make_feedback",
    "orthonormal_columns",
]
