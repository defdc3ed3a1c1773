"""Random mistakes in the source, one at a time, and whether the tests of their room notice: `make mutants`.

`python tests/mutants.py ROOM NUM RESULTS [SEED [PROCESSES]]`; `RESULTS` is a file of JSON lines, the last of a mutant
counts. What was noticed is not tried again; what survived is, for the tests may be better now. A test process imports
torch once; every mutant runs in a fork of it, so that it costs its tests alone.
"""

from __future__ import annotations

import ast
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "localexit"
# At most about 15 s of computing a mutant: the tests of its file, then those that say what the room's numbers must be,
# those that fail soonest first.
_EVERY_RULE = [
    f"tests/exits/test_oracle.py::{name}"
    for name in ("test_without_bias", "test_token_weights_of_both_signs", "test_shapes")
]
# All but most of those of their registration, which take as long as the rest.
_OPERATORS = [
    *(
        f"tests/exits/test_operators.py::Test{name}"
        for name in (
            *("FeedbackIsUsed", "OtherKindsOfDifferentiation", "Checkpoint", "MirrorPairs", "Autocast", "LossScaling"),
            *("WorkThatIsNotNeeded", "TokenWeight", "TargetRange"),
        )
    ),
    *(
        f"tests/exits/test_operators.py::TestOpcheck::test_{name}"
        for name in ("scale_gradients", "exit_logits_backward")
    ),
    "tests/exits/test_operators.py::test_draws_advance_with_update",
]


def _files(room: str, *names: str) -> list[str]:
    return [f"tests/{room}/test_{name}.py" for name in names]


ROOM_TESTS: dict[str, list[str]] = {
    "feedback": [
        *_EVERY_RULE,
        *_files("feedback", "rules", "registry", "factorized", "parallel", "mirror"),
        "tests/feedback",
        "tests/docs/test_rules_page.py",
    ],
    "exits": [*_files("exits", "golden"), *_EVERY_RULE, *_files("exits", "heads", "tiled", "defects")],
    "local": _files("local", "gradients", "units", "refusals", "passthrough", "discover", "controls", "memory"),
}
# Tests of a file besides those of its name.
FILE_TESTS: dict[str, list[str]] = {
    "exits/chunked.py": _files("exits", "filtered", "ranks"),
    "exits/functional.py": [*_OPERATORS, *_files("exits", "chunked"), *_files("feedback", "mirror")],
    "exits/head_operators.py": _OPERATORS,
    "exits/operators.py": _OPERATORS,
    "exits/ranks.py": _files("exits", "vocab"),
    "exits/reference.py": ["tests/exits/test_oracle.py"],
    "local/average.py": _files("local", "data_parallel", "in_backward"),
    "local/batch.py": _files("local", "training"),
    "local/bodies.py": _files("local", "exit_body", "exit_block"),
    "local/exits.py": _files("local", "exit_body", "saving"),
    "local/hooks.py": _files("local", "inference", "exit_block", "schedule"),
    "local/model.py": _files("local", "training", "inference", "schedule", "data_parallel"),
    "local/predict.py": _files("local", "inference"),
    "local/sharding.py": _files("local", "data_parallel"),
    "local/steps.py": _files("local", "training", "router", "schedule"),
    "local/trace.py": _files("local", "families"),
}
# Keywords that decide nothing on a CPU, or for parts that have one length, or where a warning points.
UNNOTICED = frozenset({"device", "strict", "stacklevel"})
# CPU seconds: a mutant that hangs is one that was noticed.
LIMIT = 120

# Asserts and errors say what is wrong with a call: their words are not computed with.
_SAID = (ast.Raise, ast.Assert, ast.JoinedStr)

COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node by mistake."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=comparators) if type(op) in COMPARE:
            yield ast.Compare(left=left, ops=[COMPARE[type(op)]()], comparators=comparators)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            yield ast.BinOp(left=left, op=ARITHMETIC[type(op)](), right=right)
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(op=ast.Or() if isinstance(op, ast.And) else ast.And(), values=values)
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(value=not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value=value + 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(value=2 * value if value else 1.0)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield ast.IfExp(test=test, body=orelse, orelse=body)
        case ast.If(test=test, body=body, orelse=orelse):
            yield ast.If(test=ast.UnaryOp(op=ast.Not(), operand=test), body=body, orelse=orelse)
        case ast.AugAssign() | ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.Call(func=func, args=args, keywords=[*_, last]) if last.arg not in UNNOTICED | {None}:
            yield ast.Call(func=func, args=args, keywords=node.keywords[:-1])
        case _:
            return


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One mistake: the source it is in, and the file with it."""

    path: Path
    line: int
    before: str
    after: str
    text: str

    @property
    def key(self) -> str:
        return f"{self.path.relative_to(SOURCE)}:{self.line}: {self.before} -> {self.after}"


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Every mistake in a file; none in messages, annotations, names of rules and import-time tables of text."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for parent, name, index, node in places(tree):
        for changed in changes(node):
            put(parent, name, index, changed)
            text = ast.unparse(ast.fix_missing_locations(tree))
            put(parent, name, index, node)
            before, after = (" ".join(ast.unparse(part).split())[:100] for part in (node, changed))
            yield Mutant(path=path, line=getattr(node, "lineno", 0), before=before, after=after, text=text)


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Parent, field, position and node of everything that computes."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            is_unnoticed = (isinstance(child, ast.keyword) and child.arg in UNNOTICED) or is_signature(child)
            if isinstance(child, ast.AST) and not (is_unnoticed or isinstance(child, _SAID)):
                yield node, name, index, child
                yield from places(child)


def is_signature(node: object) -> bool:
    """Whether a function is there for type checkers alone."""
    return isinstance(node, ast.FunctionDef) and "overload" in map(ast.unparse, node.decorator_list)


def put(parent: ast.AST, name: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, name, node)
    else:
        getattr(parent, name)[index] = node


def run_tests(mutant: Mutant | None, room: str, folder: Path) -> int:
    """Exit status of the room's tests with a mutant in the source, or without one."""
    child = os.fork()
    if child == 0:
        if mutant is not None:
            (folder / "localexit" / mutant.path.relative_to(SOURCE)).write_text(mutant.text, encoding="utf-8")
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        os.setpgrp()
        silent = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(silent, descriptor)
        sys.path.insert(0, str(folder))
        os.chdir(ROOT)
        options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow and not long"]
        os._exit(pytest.main([*options, *tests_of(mutant, room)]))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def tests_of(mutant: Mutant | None, room: str) -> list[str]:
    """The tests that are to notice a mutant; all of the room's and its files' for none."""
    if mutant is None:
        of_files = [test for name, tests in FILE_TESTS.items() if name.startswith(f"{room}/") for test in tests]
        return list(dict.fromkeys([*of_files, *ROOM_TESTS[room]]))
    own = f"tests/{room}/test_{mutant.path.stem}.py"
    name = str(mutant.path.relative_to(SOURCE))
    found = [*([own] if (ROOT / own).exists() else []), *FILE_TESTS.get(name, []), *ROOM_TESTS[room]]
    return list(dict.fromkeys(found))


def is_killed(mutant: Mutant, room: str) -> bool:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(SOURCE, folder / "localexit", ignore=shutil.ignore_patterns("__pycache__"))
        return run_tests(mutant, room, folder) != 0


def wilson(killed: int, total: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z, share = 1.96, killed / total
    middle, spread = share + z**2 / (2 * total), z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return (middle - spread) / (1 + z**2 / total), (middle + spread) / (1 + z**2 / total)


def try_all(mutants: Sequence[Mutant], room: str, results: Path) -> None:
    """Add a line for each mutant to the results, as soon as it is known."""
    for mutant in mutants:
        line = json.dumps({"mutant": mutant.key, "killed": is_killed(mutant, room)})
        with results.open("a") as file:
            file.write(line + "\n")


def read(results: Path) -> dict[str, bool]:
    """By mutant, whether it was noticed when it was tried last."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {record["mutant"]: record["killed"] for record in map(json.loads, lines)}


def main(room: str, num: int, results: Path, seed: int = 0, processes: int = 1) -> None:
    every = [mutant for path in sorted((SOURCE / room).rglob("*.py")) for mutant in mutants_of(path)]
    random.Random(seed).shuffle(every)
    results.parent.mkdir(parents=True, exist_ok=True)
    if run_tests(None, room, SOURCE.parent):
        sys.exit(f"the tests of {room} fail without any mutant")
    known = read(results)
    tried = [mutant for mutant in every if mutant.key in known]
    fresh = [mutant for mutant in every if mutant.key not in known][: max(0, num - len(tried))]
    left = [*(mutant for mutant in tried if not known[mutant.key]), *fresh]
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=try_all, args=(left[i::processes], room, results)) for i in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    known = read(results)
    outcome = {mutant.key: known[mutant.key] for mutant in every if mutant.key in known}
    killed = sum(outcome.values())
    low, high = wilson(killed, len(outcome))
    sys.stdout.write(
        f"{room}: {killed} of {len(outcome)} killed, {killed / len(outcome):.1%} ({low:.1%} to {high:.1%})\n"
    )
    sys.stdout.writelines(f"  survived {key}\n" for key, is_killed in outcome.items() if not is_killed)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
