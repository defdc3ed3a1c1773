"""What an installed package without extras must do, as a script: `make test-package`."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import subprocess
import sys
from pathlib import Path

import torch

import localexit


def main() -> None:
    assert localexit.__file__ is not None
    assert ".venv-package" in localexit.__file__, "this is to be run with the installed package"
    assert importlib.metadata.version("localexit") == localexit.__version__
    assert importlib.resources.files("localexit").joinpath("py.typed").is_file()
    assert importlib.resources.files("localexit").joinpath("report", "templates").is_dir()
    for name in localexit.__all__:
        getattr(localexit, name)
    head = localexit.ExitHead(hidden_size=8, vocab_size=20, feedback="anchors")
    hidden = torch.randn(3, 8, requires_grad=True)
    head(hidden, torch.tensor([1, 2, 3])).backward()
    assert hidden.grad is not None
    assert hidden.grad.any()
    command = Path(sys.executable).with_name("localexit")
    ended = subprocess.run([command, "train"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "localexit: package 'tyro' is not installed: this needs pip install 'localexit[train]'\n"
    sys.stdout.write(f"localexit {localexit.__version__} with torch {torch.__version__}: works without extras\n")


if __name__ == "__main__":
    main()
