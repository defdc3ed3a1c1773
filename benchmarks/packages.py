"""Copy the Python sources of installed packages: the larger text of B1 and B2.

    python benchmarks/packages.py data/packages

Written from the machine that runs it, so its losses compare with those of the same versions only; cells carry the
text's sha256. Packages that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

PACKAGES = (
    *("transformers", "torch", "sympy", "scipy", "pandas", "sklearn", "jax", "statsmodels", "numba", "numpy"),
    *("matplotlib", "networkx", "xarray"),
)


def copy_sources(packages: Sequence[str], folder: Path) -> tuple[int, list[str]]:
    """Copy every `.py` file of the packages below a folder; how many, and the packages that are not installed."""
    num_files, missing = 0, []
    for name in packages:
        spec = find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            missing.append(name)
            continue
        root = Path(spec.submodule_search_locations[0])
        for source in sorted(root.rglob("*.py")):
            target = folder / name / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            num_files += 1
    return num_files, missing


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Copy the Python sources of installed packages.")
    parser.add_argument("folder", type=Path, help="where to; must not exist")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, metavar="NAME", help="in place of the default")
    options = parser.parse_args(arguments)
    if options.folder.exists():
        parser.error(f"folder: {options.folder} is there already; name another, or remove it")
    num_files, missing = copy_sources(options.packages, options.folder)
    print(f"{num_files} files in {options.folder}")
    if missing:
        print(f"not installed, left out: {', '.join(missing)}", file=sys.stderr)
    return 0 if num_files else 1


if __name__ == "__main__":
    sys.exit(main())
