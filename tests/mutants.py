"""Random mistakes in the source, one at a time, and whether the tests of their room notice: `make mutants`.

`python tests/mutants.py ROOM NUM RESULTS [SEED [PROCESSES]]`; `RESULTS` is a file of JSON lines, the last of a mutant
counts. What was noticed is not tried again; what survived is, for the tests may be better now. Mutants that change
nothing which a test could notice are argued in `data/mutants_equivalent.json`: counted by themselves, never as killed.
This process imports what others wrote once; every mutant runs in a fork of it, so that it costs its tests alone.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "localexit"
ARGUED = ROOT / "tests" / "data" / "mutants_equivalent.json"
# The tests of its file, then those that say what the room's numbers must be, those that fail soonest first. A room's
# are 8 to 17 s of computing; with those of a file it is up to 39 s, of local/model.py.
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
_SIGNATURES = "tests/test_signatures.py"


def _files(room: str, *names: str) -> list[str]:
    return [f"tests/{room}/test_{name}.py" for name in names]


ROOM_TESTS: dict[str, list[str]] = {
    "feedback": [
        *_EVERY_RULE,
        *_files("feedback", "rules", "registry", "factorized", "parallel", "mirror"),
        "tests/feedback",
        "tests/docs/test_rules_page.py",
        "tests/test_checks.py",
        _SIGNATURES,
    ],
    "exits": [
        *_files("exits", "golden"),
        *_EVERY_RULE,
        *_files("exits", "heads", "tiled", "defects", "dtypes"),
        "tests/exits/test_oracle.py::test_statistics",
        "tests/test_checks.py",
        _SIGNATURES,
    ],
    "local": [
        *_files("local", "gradients", "units", "refusals", "passthrough", "discover", "controls", "memory"),
        _SIGNATURES,
    ],
}
# Tests of a file besides those of its name.
FILE_TESTS: dict[str, list[str]] = {
    "exits/chunked.py": _files("exits", "filtered", "ranks"),
    "exits/functional.py": [
        *_OPERATORS,
        *_files("exits", "backends", "chunked", "ranks", "vocab"),
        *_files("feedback", "mirror"),
    ],
    "exits/head_operators.py": [*_OPERATORS, "tests/exits/test_operators.py::TestOpcheck::test_exit_logits"],
    "exits/operators.py": [
        *_OPERATORS,
        *(f"tests/exits/test_operators.py::TestOpcheck::test_{name}" for name in ("exit_loss", "tiled_gradients")),
    ],
    "exits/pairs.py": [*_files("feedback", "shared", "mirror"), *_files("exits", "ranks", "vocab")],
    "exits/ranks.py": _files("exits", "vocab"),
    "exits/reference.py": ["tests/exits/test_oracle.py"],
    "exits/tiled.py": _files("exits", "chunked"),
    "exits/vocab.py": _files("local", "vocab_parallel"),
    "local/attach.py": _files("local", "exit_block", "data_parallel", "vocab_parallel"),
    "local/average.py": _files("local", "data_parallel", "in_backward"),
    "local/batch.py": _files("local", "training", "schedule"),
    "local/bodies.py": _files("local", "exit_body", "exit_block"),
    "local/controls.py": ["tests/local/test_router.py::test_routers_learn_from_their_loss_by_direct_feedback_too"],
    "local/discover.py": _files("local", "vocab_parallel"),
    "local/exits.py": [
        *_files("local", "exit_body", "saving"),
        "tests/local/test_exit_block.py::test_exits_count_the_blocks_that_are_run_for_them_alone",
    ],
    "local/graph.py": _files("local", "locality"),
    "local/hooks.py": [
        *_files("local", "inference", "exit_block", "schedule", "data_parallel", "locality"),
        "tests/local/test_router.py::test_every_unit_learns_from_its_own_routers",
        "tests/inference/test_decoding.py",
    ],
    "local/model.py": [
        *_files("local", "training", "inference", "schedule", "data_parallel", "pipeline", "in_backward"),
        "tests/local/test_router.py::test_every_unit_learns_from_its_own_routers",
        "tests/local/test_router.py::test_the_model_itself_keeps_no_router_logits_in_training",
        "tests/inference/test_decoding.py",
    ],
    "local/pipeline.py": ["tests/local/test_vocab_parallel.py::test_what_is_not_understood_is_refused"],
    "local/predict.py": [*_files("local", "inference"), "tests/inference/test_quality.py"],
    "local/saving.py": ["tests/local/test_vocab_parallel.py::test_what_is_not_understood_is_refused"],
    "local/sharding.py": _files("local", "data_parallel", "vocab_parallel"),
    "local/steps.py": [
        *_files("local", "training", "router", "schedule", "inference"),
        "tests/local/test_data_parallel.py::test_two_ranks_train_like_one_process",
        "tests/local/test_in_backward.py::test_tied_embeddings_are_stepped_once",
    ],
    "local/trace.py": _files("local", "families"),
}
# Keywords that decide nothing on a CPU, or for parts that have one length, or where a warning points.
UNNOTICED = frozenset({"device", "strict", "stacklevel"})
# What ends a process of tests. Any other status says nothing about the mutant: no tests (5), a call that pytest does
# not take (4), an error of pytest's own (3), a signal that somebody else sent.
SURVIVED = "survived"
OUTCOMES: dict[int, str] = {
    pytest.ExitCode.OK: SURVIVED,
    pytest.ExitCode.TESTS_FAILED: "failed",
    pytest.ExitCode.INTERRUPTED: "not importable",
    -signal.SIGXCPU: "too slow",
    **{-crash: "crashed" for crash in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT, signal.SIGILL)},
}
# Code that is shown as a whole; a condition or a loop is not, for its body is in it.
PLAIN = (ast.expr, ast.arguments, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)
# What tests import and nobody changes here.
FOREIGN = (
    "torch.distributed.fsdp",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
# A mutant may take the CPU time of all tests of the room three times over: more is noticed by whoever waits for it.
PATIENCE = 3

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
        case ast.Call(func=func, args=args, keywords=[*others, last]) if last.arg not in UNNOTICED | {None}:
            yield ast.Call(func=func, args=args, keywords=others)
        case _:
            return


@dataclass(frozen=True, kw_only=True)
class Place:
    """Something that computes, the classes and functions around it, and the plain statement or expression it is in."""

    scope: tuple[str, ...]
    whole: ast.AST
    parent: ast.AST
    name: str
    index: int | None
    node: ast.AST


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One mistake, by a name that edits elsewhere in the file do not change."""

    path: Path
    key: str
    tree: ast.Module = field(repr=False)
    place: Place = field(repr=False)
    changed: ast.AST = field(repr=False)

    def text(self) -> str:
        """The file with the mistake."""
        put(self.place, self.changed)
        text = ast.unparse(ast.fix_missing_locations(self.tree))
        put(self.place, self.place.node)
        return text


def mutants_of(path: Path) -> list[Mutant]:
    """Every mistake in a file; none in messages, annotations and what is there for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    seen: Counter[str] = Counter()
    found = []
    for place in places(tree):
        for changed in changes(place.node):
            where = " ".join([path.relative_to(SOURCE).as_posix(), ".".join(place.scope)]).rstrip()
            key = f"{where}: {describe(place, changed)}"
            seen[key] += 1
            numbered = key if seen[key] == 1 else f"{key} #{seen[key]}"
            found.append(Mutant(path=path, key=numbered, tree=tree, place=place, changed=changed))
    return found


def describe(place: Place, changed: ast.AST) -> str:
    """Both sides of a mistake, with what is around it."""
    before = unparse(place.whole)
    put(place, changed)
    after = unparse(changed if place.whole is place.node else place.whole)
    put(place, place.node)
    start = _length_of_common([before, after])
    end = _length_of_common([before[start:][::-1], after[start:][::-1]])
    return " -> ".join(_part(side, start - 50, len(side) - end + 20) for side in (before, after))


def unparse(node: ast.AST) -> str:
    """The code of a node on one line; of a condition without what it decides about."""
    return f"if {ast.unparse(node.test)}" if isinstance(node, ast.If) else " ".join(ast.unparse(node).split())


def _length_of_common(texts: Sequence[str]) -> int:
    return next(
        (i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), min(map(len, texts))
    )


def _part(text: str, start: int, end: int) -> str:
    return "…" * (start > 0) + text[max(0, start) : end] + "…" * (end < len(text))


def places(node: ast.AST, scope: tuple[str, ...] = (), whole: ast.AST | None = None) -> Iterator[Place]:
    """Everything that computes below a node."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or is_unnoticed(child):
                continue
            around = child if whole is None and isinstance(child, PLAIN) else whole
            yield Place(scope=scope, whole=around or child, parent=node, name=name, index=index, node=child)
            is_scope = isinstance(child, ast.FunctionDef | ast.ClassDef)
            yield from places(child, (*scope, child.name) if is_scope else scope, around)


def is_unnoticed(node: ast.AST) -> bool:
    """Whether nothing in it is computed with, or nothing that a CPU notices."""
    match node:
        case ast.Raise() | ast.Assert() | ast.JoinedStr():
            # They say what is wrong with a call: their words are not computed with.
            return True
        case ast.keyword(arg=arg):
            return arg in UNNOTICED
        case ast.FunctionDef(decorator_list=decorators):
            return "overload" in map(ast.unparse, decorators)
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case _:
            return False


def put(place: Place, node: ast.AST) -> None:
    if place.index is None:
        setattr(place.parent, place.name, node)
    else:
        getattr(place.parent, place.name)[place.index] = node


class Collection:
    """A plugin of pytest: whether test files could be imported.

    Where one cannot, pytest calls the tests that were asked for by name a mistake in the call.
    """

    has_failed = False

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.has_failed |= report.failed


def run_tests(tests: Sequence[str], source: Path) -> int:
    """pytest's status for tests of the package in a folder. For a process of its own."""
    sys.path.insert(0, str(source))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    found = importlib.util.find_spec("localexit")
    assert found is not None, source
    assert Path(str(found.origin)).is_relative_to(source), found.origin
    os.chdir(ROOT)
    try:
        for room in ROOM_TESTS:
            importlib.import_module(f"localexit.{room}")
    except Exception:
        # Before pytest, which takes a conftest that cannot be imported for a mistake in the call.
        traceback.print_exc()
        return pytest.ExitCode.INTERRUPTED
    collection = Collection()
    # Of the plugins only the one that ends tests that hang: the others take a second to start.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "pytest_timeout", "-m", "not slow and not long"]
    status = pytest.main([*options, *tests], plugins=[collection])
    if status == pytest.ExitCode.USAGE_ERROR and collection.has_failed:
        return pytest.ExitCode.INTERRUPTED
    return status


def cpu_seconds_without_mutant(room: str) -> float:
    """What all tests of a room take together; the end of the program, with pytest's words, if they do not pass."""
    child = os.fork()
    if child == 0:
        _end_with(all_tests(room), SOURCE.parent)
    _, status, usage = os.wait4(child, 0)
    if os.waitstatus_to_exitcode(status) != pytest.ExitCode.OK:
        sys.exit(f"the tests of {room} fail without any mutant: status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime


def _end_with(tests: Sequence[str], source: Path) -> None:
    """End this process as its tests do; with an error that is no test's (3), if it gets to none."""
    status: int = pytest.ExitCode.INTERNAL_ERROR
    try:
        status = run_tests(tests, source)
    finally:
        sys.stdout.flush()
        os._exit(status)


def all_tests(room: str) -> list[str]:
    of_files = [test for name, tests in FILE_TESTS.items() if name.startswith(f"{room}/") for test in tests]
    return list(dict.fromkeys([*of_files, *ROOM_TESTS[room]]))


def tests_of(path: Path, room: str) -> list[str]:
    """The tests that are to notice a mistake in a file."""
    own = f"tests/{room}/test_{path.stem}.py"
    of_file = FILE_TESTS.get(path.relative_to(SOURCE).as_posix(), [])
    return list(dict.fromkeys([*([own] if (ROOT / own).exists() else []), *of_file, *ROOM_TESTS[room]]))


class Trial:
    """The tests of a mutant, in a process and a group of its own; `close` ends it."""

    def __init__(self, mutant: Mutant, room: str, cpu_limit: int) -> None:
        self.mutant = mutant
        self.start = time.monotonic()
        self._folder = tempfile.TemporaryDirectory()
        source = Path(self._folder.name)
        shutil.copytree(SOURCE, source / "localexit", ignore=shutil.ignore_patterns("__pycache__"))
        (source / "localexit" / mutant.path.relative_to(SOURCE)).write_text(mutant.text(), encoding="utf-8")
        self.process = os.fork()
        if self.process == 0:
            os.setpgrp()
            # At the second number the kernel sends SIGKILL, which would look like somebody else's.
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, cpu_limit + 60))
            silent = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(silent, descriptor)
            _end_with(tests_of(mutant.path, room), source)

    def close(self) -> None:
        # What the tests started may still wait for each other.
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        self._folder.cleanup()


def try_all(mutants: Sequence[Mutant], room: str, results: Path, processes: int, cpu_limit: int) -> None:
    """Add a line for each mutant to the results, as soon as it is known."""
    waiting, running = list(reversed(mutants)), dict[int, Trial]()
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                trial = Trial(waiting.pop(), room, cpu_limit)
                running[trial.process] = trial
            process, status = os.wait()
            trial = running.pop(process)
            trial.close()
            record(trial, os.waitstatus_to_exitcode(status), results)
    finally:
        for trial in running.values():
            trial.close()


def record(trial: Trial, status: int, results: Path) -> None:
    key, seconds = trial.mutant.key, time.monotonic() - trial.start
    if status not in OUTCOMES:
        sys.exit(f"{key}: the tests ended with status {status}, which says neither killed nor survived")
    with results.open("a", encoding="utf-8") as file:
        line = {"mutant": key, "outcome": OUTCOMES[status], "seconds": round(seconds, 1)}
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    sys.stdout.write(f"{seconds:6.1f} s  {OUTCOMES[status]:<14}  {key}\n")
    sys.stdout.flush()


def read(results: Path) -> dict[str, str]:
    """By mutant, what came of it when it was tried last."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return {record["mutant"]: record["outcome"] for record in map(json.loads, lines)}


def argued() -> dict[str, str]:
    """By mutant, why no test on a CPU could notice it."""
    return json.loads(ARGUED.read_text(encoding="utf-8"))


def in_random_order(mutants: Sequence[Mutant], seed: int) -> list[Mutant]:
    """An order that each mutant's name decides, so that it stays the same for those that an edit leaves alone."""
    return sorted(mutants, key=lambda mutant: hashlib.sha256(f"{seed} {mutant.key}".encode()).digest())


def main(room: str, num: int, results: Path, seed: int = 0, processes: int = 1) -> None:
    every = in_random_order(
        [mutant for path in sorted((SOURCE / room).rglob("*.py")) for mutant in mutants_of(path)], seed
    )
    results.parent.mkdir(parents=True, exist_ok=True)
    for name in FOREIGN:
        importlib.import_module(name)
    cpu_limit = math.ceil(PATIENCE * cpu_seconds_without_mutant(room))
    known, equivalent = read(results), argued()
    tried = [mutant for mutant in every if mutant.key in known]
    fresh = [mutant for mutant in every if mutant.key not in known][: max(0, num - len(tried))]
    left = [mutant for mutant in [*tried, *fresh] if known.get(mutant.key, SURVIVED) == SURVIVED]
    try_all([mutant for mutant in left if mutant.key not in equivalent], room, results, processes, cpu_limit)
    known = read(results)
    say(room, {mutant.key: known.get(mutant.key, SURVIVED) for mutant in [*tried, *fresh]}, equivalent)


def say(room: str, outcomes: dict[str, str], equivalent: dict[str, str]) -> None:
    """The count of a room, and what survived."""
    survivors = [key for key, outcome in outcomes.items() if outcome == SURVIVED]
    killed = len(outcomes) - len(survivors)
    is_argued = [key for key in survivors if key in equivalent]
    low, high = wilson(killed, len(outcomes))
    sys.stdout.write(
        f"{room}: {killed} of {len(outcomes)} killed, {killed / len(outcomes):.1%} ({low:.1%} to {high:.1%}); "
        f"{len(is_argued)} argued, {len(survivors) - len(is_argued)} survived\n"
    )
    sys.stdout.writelines(f"  argued    {key}: {equivalent[key]}\n" for key in is_argued)
    sys.stdout.writelines(f"  survived  {key}\n" for key in survivors if key not in equivalent)


def wilson(killed: int, total: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z, share = 1.96, killed / total
    middle, spread = share + z**2 / (2 * total), z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return (middle - spread) / (1 + z**2 / total), (middle + spread) / (1 + z**2 / total)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
