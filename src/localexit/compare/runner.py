"""Cells one after the other, or several at a time, until all are there or the time is over."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace

from localexit.compare.cells import Cell, CellFile, differing_settings
from localexit.compare.plans import Job
from localexit.compare.training import OutOfTimeError, run_cell


def missing_jobs(jobs: Sequence[Job], cells: CellFile) -> list[Job]:
    """The jobs whose cells are not there yet.

    Raises:
        ValueError: a cell is there that was trained with other settings.
    """
    missing = []
    for job in jobs:
        cell = cells.get(job.key)
        if cell is None:
            missing.append(job)
            continue
        odd = differing_settings(job.config.to_json(), cell.config)
        if odd:
            raise ValueError(
                f"cells: {job.method!r} with seed {job.config.seed} is there with another {', '.join(odd)} than is "
                f"asked for now; pass another --output, or move {cells.path} away"
            )
    return missing


def run_jobs(
    jobs: Sequence[Job],
    cells: CellFile,
    *,
    num_processes: int = 1,
    max_seconds: float = math.inf,
    say: Callable[[str], None],
) -> int:
    """Train the jobs and add their cells to the file as they come.

    Args:
        jobs: to be trained, in this order.
        cells: where to.
        num_processes: how many at a time.
        max_seconds: a cell that is not finished by then stops after the step it is at, and goes on in the next call;
            nothing is started any more.
        say: told a line about every cell.

    Returns:
        How many were not finished.

    Raises:
        ValueError: text, model or rule do not fit a job, or the text is not that of the cells that are there.
    """
    deadline = time.time() + max_seconds
    if cells.cells:
        jobs = [replace(job, text=cells.cells[0].corpus["sha256"]) for job in jobs]
    num_done = 0
    for result in _results(jobs, cells, deadline, num_processes):
        if isinstance(result, OutOfTimeError):
            say(f"out of time: {result}")
            continue
        cells.add([result])
        num_done += 1
        say(f"{num_done}/{len(jobs)}  {_line(result)}")
    return len(jobs) - num_done


def _results(
    jobs: Sequence[Job], cells: CellFile, deadline: float, num_processes: int
) -> Iterator[Cell | OutOfTimeError]:
    if num_processes > 1:
        yield from _in_processes(jobs, cells, deadline, num_processes)
        return
    for job in jobs:
        if time.time() >= deadline:
            return
        try:
            yield run_cell(job, deadline=deadline, unfinished=cells.unfinished(job.key))
        except OutOfTimeError as error:
            yield error


def _in_processes(
    jobs: Sequence[Job], cells: CellFile, deadline: float, num_processes: int
) -> Iterator[Cell | OutOfTimeError]:
    waiting, running = list(jobs), set[Future[Cell]]()
    # Started anew and not forked: a forked process inherits torch's threads half way through their work.
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        while waiting or running:
            while waiting and len(running) < num_processes:
                job = waiting.pop(0)
                if time.time() < deadline:
                    unfinished = cells.unfinished(job.key)
                    running.add(pool.submit(run_cell, job, deadline=deadline, unfinished=unfinished))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    yield future.result()
                except OutOfTimeError as error:
                    yield error


def _line(cell: Cell) -> str:
    """One cell in one line."""
    losses = " ".join(f"{loss:.3f}" for loss in cell.loss)
    result = f"{losses} nats/token" if losses else f"diverged: {cell.detail}"
    return (
        f"{cell.method} seed {cell.key.seed}, {cell.key.steps} steps: {result} "
        f"({1000 * cell.step_seconds:.0f} ms a step, {cell.wall_seconds:.0f} s)"
    )
