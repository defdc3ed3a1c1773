"""`python -m localexit`."""

from localexit.cli import main

if __name__ == "__main__":
    main()
