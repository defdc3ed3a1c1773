"""The public functions and methods take what `data/signatures.txt` says, with the defaults it says.

A default that changes is another result for everybody who left the argument out. Where that is meant, write the file
anew, with `python tests/test_signatures.py`, and say so in CHANGELOG.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import localexit
from localexit import exits, feedback, local

FILE = Path(__file__).parent / "data" / "signatures.txt"


def signatures() -> Iterator[str]:
    """Each public function, constructor and method, without annotations, which a type checker looks after."""
    public_names = {name: room for room in (local, exits, feedback, localexit) for name in room.__all__}
    for name, room in sorted(public_names.items()):
        public = getattr(room, name)
        if inspect.isfunction(public):
            yield f"{name}{_parameters(public)}"
        for method, function in vars(public).items() if inspect.isclass(public) else ():
            if inspect.isfunction(function) and (method == "__init__" or not method.startswith("_")):
                yield f"{name}.{method}{_parameters(function)}"


def _parameters(function: object) -> inspect.Signature:
    signature = inspect.signature(function)  # type: ignore[arg-type]
    parameters = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=signature.empty)


def test_the_public_signatures_are_those_written_down() -> None:
    assert list(signatures()) == FILE.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    FILE.write_text("".join(f"{line}\n" for line in signatures()), encoding="utf-8")
