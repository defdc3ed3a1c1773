"""The command `localexit`, and `python -m localexit`: here as far as it goes without the extra `train`."""

from __future__ import annotations

import sys

from localexit import _values


def main() -> None:
    """Run the command; exits with 0, 1 (the run failed), 2 (bad input, a package is missing) or 128 + signal."""
    try:
        from localexit import cli
    except ModuleNotFoundError as error:
        sys.stderr.write(f"localexit: {_values.missing_package(error.name)}\n")
        sys.exit(2)
    sys.exit(cli.run(sys.argv[1:]))


if __name__ == "__main__":
    main()
