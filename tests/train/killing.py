"""Kill a run again and again at random moments, as a script: `killing.py CONFIG RUN CACHE NUM_KILLS SEED`.

Every run is a child of this process, which imports once for all of them. Prints one JSON line a kill: the step of the
newest whole checkpoint, the last step in the log, and what was skipped on the way to that checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

# Imported here, and not by every child.
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

from localexit.train.checkpoint import load_newest
from localexit.train.config import TrainConfig
from localexit.train.folder import RunFolder
from train.small_runs import train_quietly


def start(config: TrainConfig, run: RunFolder, cache: Path) -> int:
    """Train in a child process; its id."""
    child = os.fork()
    if child == 0:
        # A kill before the folder was a run leaves nothing to continue.
        train_quietly(config, run.path, cache, resume=run.config.is_file())
        os._exit(0)
    return child


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def kill_some_time(child: int, run: RunFolder, rng: random.Random) -> bool:
    """Kill the child while it starts, trains or saves; False when it ended before."""
    written, moments = size(run.metrics), rng.randrange(8)
    while moments and os.waitpid(child, os.WNOHANG)[0] == 0:
        # A moment is a line of the log, however slow the machine is.
        if size(run.metrics) > written:
            written, moments = size(run.metrics), moments - 1
        time.sleep(0.001)
    if moments:
        return False
    time.sleep(rng.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def last_step(run: RunFolder) -> int:
    """Of the training records that are whole."""
    lines = run.metrics.read_bytes().splitlines(keepends=True) if run.metrics.exists() else []
    records: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return max((record["step"] for record in records if record["kind"] == "train"), default=0)


def main(content: str, run_dir: str, cache: str, num_kills: str, seed: str) -> None:
    config, run, rng = TrainConfig.from_json(json.loads(content)), RunFolder(path=Path(run_dir)), random.Random(seed)
    for _ in range(int(num_kills)):
        if not kill_some_time(start(config, run, Path(cache)), run, rng):
            sys.exit("the run ended before it was killed often enough; give it more steps")
        skipped: list[str] = []
        newest = load_newest(run.checkpoints, skipped.append)
        found = {"newest": newest.step if newest else 0, "logged": last_step(run), "skipped": skipped}
        sys.stdout.write(json.dumps(found) + "\n")
    _, status = os.waitpid(start(config, run, Path(cache)), 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(*sys.argv[1:])
