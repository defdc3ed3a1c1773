"""What of a run can be refused before torch is imported and anything is read: the command answers at once."""

from __future__ import annotations

from importlib.util import find_spec

from localexit.train.config import TrainConfig, tracker_names
from localexit.train.corpus import check_source
from localexit.train.folder import RunFolder
from localexit.train.launch import world_size
from localexit.train.presets import resolve_name


def check_start(config: TrainConfig, folder: RunFolder, *, resume: bool) -> None:
    """Refuse a run whose folder, model's name or text's path is wrong.

    Raises:
        ValueError: one of them is, the folder's run has another configuration, or a tracker is not installed.
        FileNotFoundError: there is no such text.
    """
    if resume:
        check_same_config(folder.read_config(), config)
    else:
        folder.check_new()
    resolve_name(config.model)
    check_source(config.data)
    check_trackers(config.track)


def check_shared_batch(config: TrainConfig) -> None:
    """Refuse a batch that the processes of a run cannot share equally.

    Raises:
        ValueError: so it is.
    """
    if config.batch_size % world_size():
        raise ValueError(
            f"batch_size: expected a multiple of the {world_size()} processes that share a batch, got "
            f"{config.batch_size}; pass a multiple, or start another number of processes"
        )


def check_trackers(track: str) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        ValueError: one is not.
    """
    for name in tracker_names(track):
        if find_spec(name) is None:
            raise ValueError(
                f"track: expected installed packages, got {name!r}, which is not; pip install {name}, or leave it out"
            )


def check_same_config(mine: TrainConfig, theirs: TrainConfig) -> None:
    """Refuse to continue a run with another configuration.

    Raises:
        ValueError: fields differ.
    """
    differences = mine.differences(theirs)
    if differences:
        raise ValueError(
            f"resume: expected the configuration of the run, but {'; '.join(differences)}; leave these options out, or "
            f"start a new run"
        )
