"""What `localexit compare` does: train what is missing, then show everything that is there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from localexit.compare.cells import CellFile, read_cells
from localexit.compare.page import write_page
from localexit.compare.plans import Job
from localexit.compare.results import best_settings, groups
from localexit.compare.runner import missing_jobs, run_jobs
from localexit.compare.table import group_table


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One call of the command.

    Attributes:
        jobs: the cells wanted.
        output: folder of `cells.jsonl` and the page.
        merge: folders or files with further cells, taken in first.
        num_processes: cells trained at a time.
        max_minutes: stop by then; cells that are not finished go on in the next call.
    """

    jobs: Sequence[Job]
    output: Path
    merge: Sequence[Path] = ()
    num_processes: int = 1
    max_minutes: float = math.inf

    def run(self, console: Console) -> int:
        """Train what is missing and print the tables; how many cells are still missing.

        Raises:
            ValueError: cells cannot be read, or were trained with other settings or on another text.
        """
        cells = CellFile(self.output)
        if self.merge:
            cells.add(cell for path in self.merge for cell in read_cells(path))
        missing = missing_jobs(self.jobs, cells)

        def say(line: str) -> None:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

        say(f"{len(self.jobs)} cells, {len(missing)} to be trained; they are kept in {cells.path}")
        num_left = run_jobs(
            missing, cells, num_processes=self.num_processes, max_seconds=60 * self.max_minutes, say=say
        )
        if not cells.cells:
            raise ValueError(
                f"cells: expected some in {self.output}, got none; train some, with more --max-minutes if there were "
                f"any, or take some in with --merge"
            )
        for group in groups(cells.cells):
            console.print(group_table(group))
        for name, settings in best_settings(cells.cells).items():
            say(f"best settings of {name}: {settings}")
        say(f"page: {write_page(cells.cells, self.output)}")
        if num_left:
            say(f"{num_left} cells are missing; the same command goes on with them")
        return num_left
