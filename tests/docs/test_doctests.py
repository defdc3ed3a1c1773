"""Examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import localexit

# Only where Triton is.
MODULES = [
    module.name
    for module in pkgutil.walk_packages(localexit.__path__, "localexit.")
    if not module.name.startswith(("localexit.kernels", "localexit.__main__"))
]
WITH_EXAMPLES = ("exits.functional", "feedback.registry", "local.attach")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    assert result.attempted > 0 or not name.endswith(WITH_EXAMPLES)
