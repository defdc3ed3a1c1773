"""Benchmarks of the exit: time, memory and errors against the heads a user would take instead."""

from .config import BenchConfig

__all__ = ["BenchConfig"]
