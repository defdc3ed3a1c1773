"""The exit: logits, eq. (1); loss and error, eq. (2); the exact dW and db, eq. (3); the call of the feedback rule."""

from localexit.exits.functional import ExitStats, ExitStep, exit_cross_entropy, exit_step
from localexit.exits.heads import (
    DenseRandomCompressor,
    ExactParallelExitHead,
    ExitHead,
    FactorizedExitHead,
    HybridTopKTailSketchCompressor,
    orthonormal_columns,
)
from localexit.exits.ranks import DataParallel, VocabParallel

__all__ = [
    "DataParallel",
    "DenseRandomCompressor",
    "ExactParallelExitHead",
    "ExitHead",
    "ExitStats",
    "ExitStep",
    "FactorizedExitHead",
    "HybridTopKTailSketchCompressor",
    "VocabParallel",
    "exit_cross_entropy",
    "exit_step",
    "orthonormal_columns",
]
