"""What `localexit eval` does: a run's exits on its validation text, or on another text, as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from localexit.inference.quality import measure_quality
from localexit.inference.sampling import THRESHOLDS
from localexit.train.batches import valid_batches
from localexit.train.checkpoint import newest_step
from localexit.train.data import load_data
from localexit.train.devices import autocast, device_name, resolve_device, resolve_precision
from localexit.train.export import load_run
from localexit.train.folder import RunFolder, versions

FORMAT = 1


def evaluate_run(
    folder: RunFolder,
    *,
    data: str | None = None,
    max_tokens: int = 65536,
    thresholds: Sequence[float] = THRESHOLDS,
    device: str = "auto",
    cache_dir: Path | None = None,
) -> dict[str, Any]:
    """Measure every exit of a run's model, and early exits by threshold.

    Args:
        folder: of the run.
        data: text as in `localexit train`, of which the validation split is used; the run's own by default.
        max_tokens: cap, spread evenly over the text.
        thresholds: of the confidence, in (0, 1].
        device: auto, cpu, cuda, …
        cache_dir: where token streams are kept.

    Returns:
        The content of `eval.json`; its numbers are those of `Quality`.

    Raises:
        ValueError: not the folder of a run with a model, or the text cannot be read or is not the run's own any more.
    """
    folder.check_has_model()
    config = folder.read_config()
    # The exported model has the tokenizer of the run, whatever text is read now.
    own = replace(config, data=data or config.data, model=str(folder.model), vocab_size=None)
    text = load_data(own, cache_dir=cache_dir)
    if data is None:
        folder.check_text(text.record)
    where = resolve_device(device)
    local, _ = load_run(folder.path, device=where)
    batches = valid_batches(text.valid, batch_size=config.batch_size, context=config.context, max_tokens=max_tokens)
    with autocast(where, resolve_precision(config.precision, where)):
        quality = measure_quality(local, (ids.to(where) for ids in batches), thresholds=thresholds)
    return {
        "format": FORMAT,
        "data": text.record["name"],
        "sha256": text.record["sha256"],
        "step": newest_step(folder.checkpoints),
        "context": config.context,
        "num_tokens": quality.num_tokens,
        "num_blocks": quality.exits[-1].num_blocks,
        "exits": [asdict(exit_) for exit_ in quality.exits],
        "early": [asdict(point) for point in quality.early],
        "device": device_name(where),
        "versions": versions(),
    }
