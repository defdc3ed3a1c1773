"""Train any model unit by unit: find its blocks, give them exits, keep their gradients apart."""

from localexit.local.attach import attach
from localexit.local.compiled import compile_units
from localexit.local.discover import Anatomy, discover
from localexit.local.exits import Exit
from localexit.local.in_backward import StepInBackward
from localexit.local.model import LocalModel
from localexit.local.pipeline import Pipeline
from localexit.local.saving import load_exits, restore_exits, save_exits
from localexit.local.schedule import ExitSchedule
from localexit.local.steps import ExitEvaluation, LocalOutput
from localexit.local.units import Unit

__all__ = [
    "Anatomy",
    "Exit",
    "ExitEvaluation",
    "ExitSchedule",
    "LocalModel",
    "LocalOutput",
    "Pipeline",
    "StepInBackward",
    "Unit",
    "attach",
    "compile_units",
    "discover",
    "load_exits",
    "restore_exits",
    "save_exits",
]
