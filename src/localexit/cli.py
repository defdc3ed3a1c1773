"""The command `localexit`. Thin: it parses, calls the library, and turns what it refuses into one line."""

from __future__ import annotations

import io
import math
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from localexit import __version__, _values
from localexit._files import check_output
from localexit._rules import feedback_names
from localexit._text import visible
from localexit.bench import BenchConfig
from localexit.compare.plans import PlanName
from localexit.inference.sampling import THRESHOLDS
from localexit.train.config import FeedbackSpec, TrainConfig

if TYPE_CHECKING:
    from localexit.inference.strategies import Strategy

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130

_DEMO = TrainConfig()
_BENCH = BenchConfig()


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a language model locally: every block learns from its own exit.

    Attributes:
        run: new folder for the run; runs/MODEL-RULE by default.
        resume: continue the run in that folder, with its own configuration.
        config: what the result depends on; the defaults are the demo.
    """

    run: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="RUN")] = None
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    config: tyro.conf.OmitArgPrefixes[TrainConfig] = _DEMO

    def execute(self) -> int:
        """Train, then print the table, a sample and the report's path."""
        from localexit.train.folder import RunFolder, new_run_folder
        from localexit.train.launch import num_restarts, world_rank, world_size
        from localexit.train.preflight import check_start

        if self.run is None and world_size() > 1:
            raise ValueError("run: expected a folder, the same for all processes of the run, got none; name one")
        path = self.run or new_run_folder(self.config)
        folder = RunFolder(path=path)
        resume = self.resume or (num_restarts() > 0 and folder.config.exists())
        if world_rank() == 0:
            # `train` checks it too, but is there only after torch.
            check_start(self.config, folder, resume=resume)
        from rich.console import Console

        from localexit.train.loop import train

        console = Console()
        outcome = train(self.config, path, resume=resume, console=console)
        if outcome.is_main:
            self._show(console, outcome)
        return 128 + (outcome.signal_number or 0) if outcome.status == "interrupted" else 0

    def _show(self, console: Any, outcome: Any) -> None:
        from localexit.report import exits_table, read_run, write_report

        run = read_run(outcome.run.path)
        console.print(exits_table(run))
        for sample in run.records.samples[-1:]:
            _print_sample(console, sample.prompt, sample.text)
        _print_plain(console, f"report: {write_report([outcome.run.path])}")
        if outcome.status == "interrupted":
            _print_plain(console, f"interrupted; continue with: localexit train {outcome.run.path} --resume")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Write text with a trained model: with one exit, the first one that is sure, or one exit that another verifies.

    Attributes:
        run: folder of the run.
        prompt: text to continue; an empty one starts a new text.
        exit: which exit, from 0; negative ones count from the last; "confidence" takes for each token the first exit
            that is sure. Blocks after the exit are not run.
        threshold: with confidence, the probability of its most likely token at which an exit is sure; 0.9 by default.
        sure_exits: with confidence, the exits that are asked; all by default.
        draft_exit: draft with this exit and verify with the last: the last exit's text, in fewer of its forwards. Needs
            temperature 0.
        draft_tokens: with a draft exit, most tokens to draft at a time; 4 by default.
        max_new_tokens: most tokens to add.
        temperature: what logits are divided by; 0 takes the most likely token.
        top_k: choose among the k most likely tokens; 0 among all.
        seed: of the choice.
        device: auto, cpu, cuda, …
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    prompt: str
    exit: int | Literal["confidence"] = -1
    threshold: float | None = None
    sure_exits: tuple[int, ...] | None = None
    draft_exit: int | None = None
    draft_tokens: int | None = None
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0
    device: str = "auto"

    def execute(self) -> int:
        """Print the prompt and, piece by piece, what follows it."""
        from localexit.inference.sampling import Sampling
        from localexit.train.folder import RunFolder

        strategy = self._strategy()
        sampling = Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k or None,
            seed=self.seed,
        )
        RunFolder(path=self.run).check_has_model()
        from localexit.inference.text import generate
        from localexit.train.devices import resolve_device
        from localexit.train.export import load_run

        local, tokenizer = load_run(self.run, device=resolve_device(self.device))
        written_by: Counter[int] = Counter()
        # Refuses what does not go with the model, before anything is written.
        pieces = generate(
            local,
            tokenizer,
            self.prompt,
            strategy=strategy,
            sampling=sampling,
            on_token=lambda token: written_by.update([token.exit_index]),
        )
        # A terminal obeys control characters; a file may have them as they are.
        shown = visible if sys.stdout.isatty() else str
        sys.stdout.write(shown(self.prompt))
        for piece in pieces:
            sys.stdout.write(shown(piece))
            sys.stdout.flush()
        sys.stdout.write("\n")
        if self.exit == "confidence" or self.draft_exit is not None:
            # Not on stdout: there is the text.
            sys.stderr.write(f"tokens by exit: {', '.join(f'{i}: {n}' for i, n in sorted(written_by.items()))}\n")
        return 0

    def _strategy(self) -> Strategy:
        from localexit.inference.strategies import ConfidentExit, FixedExit, SelfSpeculative

        confidence = _given(threshold=self.threshold, exits=self.sure_exits)
        draft = _given(draft_tokens=self.draft_tokens)
        if self.exit != "confidence" and confidence:
            raise ValueError(
                f"threshold and sure_exits are for exit confidence, got exit {self.exit}; add --exit confidence, or "
                f"leave them out"
            )
        if self.draft_exit is None and draft:
            raise ValueError("draft_tokens is for a draft exit, and there is none; add --draft-exit, or leave it out")
        if self.draft_exit is not None:
            if self.exit != -1:
                raise ValueError(
                    f"draft_exit: expected no other exit, got {self.draft_exit} and exit {self.exit}; the last exit "
                    f"verifies a draft, leave one of them out"
                )
            return SelfSpeculative(draft_exit=self.draft_exit, **draft)
        if self.exit == "confidence":
            return ConfidentExit(**confidence)
        return FixedExit(exit_index=self.exit)


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure every exit of a trained model: loss, accuracy, calibration, agreement with the last; and early exits.

    Writes eval.json into the run's folder, from which `localexit report` draws quality against depth.

    Attributes:
        run: folder of the run.
        data: text as in `localexit train`, of which the validation part is used; the run's own by default.
        tokens: most tokens to use, spread over the text.
        thresholds: probabilities of the most likely token at which an exit is sure.
        device: auto, cpu, cuda, …
        output: where to write the JSON instead.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    data: str | None = None
    tokens: int = 65536
    thresholds: tuple[float, ...] = THRESHOLDS
    device: str = "auto"
    output: Path | None = None

    def execute(self) -> int:
        """Print the tables and the path of the JSON."""
        from localexit.train.corpus import check_source
        from localexit.train.folder import RunFolder, write_json

        _values.count("tokens", self.tokens, minimum=1)
        for threshold in self.thresholds:
            _values.fraction("thresholds", threshold)
        folder = RunFolder(path=self.run)
        folder.check_has_model()
        check_source(folder.read_config().data if self.data is None else self.data)
        path = self.output or folder.evaluation
        check_output("output", path)
        from rich.console import Console

        from localexit.report import evaluation_tables, read_evaluation
        from localexit.train.eval import evaluate_run

        evaluation = evaluate_run(
            folder, data=self.data, max_tokens=self.tokens, thresholds=self.thresholds, device=self.device
        )
        write_json(path, evaluation)
        console = Console()
        for table in evaluation_tables(read_evaluation(path)):
            console.print(table)
        _print_plain(console, f"evaluation: {path}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one self-contained HTML page about a run, or several to compare.

    Attributes:
        runs: folders of runs.
        output: where to; report.html in the folder of a single run by default.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    output: Path | None = None

    def execute(self) -> int:
        """Write the page and print its path."""
        if not self.runs:
            raise ValueError("runs: expected at least one run directory, got none; name the folders to report on")
        from localexit.report import write_report

        sys.stdout.write(f"{write_report(self.runs, output=self.output)}\n")
        return 0


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Train methods × seeds × budgets on the same text, initialisation and order of tokens, and show what differs.

    A method is a feedback rule or a control (backprop, backprop_all, direct, frozen), with its options and settings as
    in mirror_sampled:topk=8@lr=0.002. Cells that are there already are not trained again.

    Attributes:
        preset: what to train, see docs/results.md.
        methods: in place of the preset's.
        seeds: in place of the preset's.
        budgets: optimiser steps, in place of the preset's.
        data: text to train on, as in `localexit train`, in place of the preset's: a larger one for longer runs.
        output: folder for cells.jsonl and the page; runs/compare-PRESET by default.
        merge: folders or files with cells of other machines, taken in first.
        processes: cells trained at a time.
        device: auto, cpu, cuda, …; the preset's by default.
        compile: train all methods with compiled blocks.
        max_minutes: stop by then, after the step that is being made; the same command goes on, in the middle of a cell.
            No limit by default.
        commit: of the sources, where git cannot be asked.
        train: off only shows what is there.
    """

    preset: PlanName = "b0"
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    budgets: tuple[int, ...] = ()
    data: str | None = None
    output: Path | None = None
    merge: tuple[Path, ...] = ()
    processes: int = 1
    device: str | None = None
    compile: bool = False
    max_minutes: float | None = None
    commit: str | None = None
    train: bool = True

    def execute(self) -> int:
        """Train, then print the tables and the page's path; 1 while cells are missing."""
        from localexit.compare.plans import PLANS, jobs

        plan = PLANS[self.preset]
        wanted = jobs(
            plan,
            methods=self.methods,
            seeds=self.seeds,
            budgets=self.budgets,
            data=self.data,
            device=self.device,
            commit=self.commit,
            compile_blocks=self.compile,
        )
        _values.count("processes", self.processes, minimum=1)
        if self.max_minutes is not None:
            _values.positive("max_minutes", self.max_minutes)
        output = self.output or Path("runs") / f"compare-{self.preset}"
        check_output("output", output / "cells.jsonl")
        if self.data is not None:
            from localexit.train.corpus import check_source

            check_source(self.data)
        from rich.console import Console

        from localexit.compare.command import Comparison

        comparison = Comparison(
            jobs=wanted if self.train else (),
            output=output,
            merge=self.merge,
            num_processes=self.processes,
            max_minutes=math.inf if self.max_minutes is None else self.max_minutes,
        )
        return FAILED if comparison.run(Console()) else 0


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Check that a model trains locally and without weight transport: what passes, what was measured.

    Attributes:
        model: folder of a run, or a model: a local folder, a hub name OWNER/NAME or a preset.
        feedback: the rule as in `localexit train`; a run's own by default.
        exits: which blocks have one: every, every:K, or indices such as 1,3,5; a run's own by default.
        seed: of codes, draws, random tokens and a preset's weights.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL_OR_RUN")]
    feedback: str | None = None
    exits: str | None = None
    seed: int = 0

    def execute(self) -> int:
        """Print the checks; 0 if all passed, else 1."""
        from localexit.train.folder import RunFolder
        from localexit.train.presets import resolve_name

        given: dict[str, Any] = {} if self.feedback is None else {"feedback": FeedbackSpec.parse(self.feedback)}
        if self.exits is not None:
            given["exits"] = self.exits
        run = RunFolder(path=Path(self.model))
        is_run = run.metrics.is_file()
        if is_run:
            run.check_has_model()
            config = replace(run.read_config(), **given)
        else:
            resolve_name(self.model)
            config = TrainConfig(model=self.model, seed=self.seed, **given)
        from localexit.measure import audit_attached

        local = self._run_as_it_ended(run.path, config, is_changed=bool(given)) if is_run else self._attached(config)
        report = audit_attached(local, seed=self.seed)
        sys.stdout.write(f"{report}\n")
        return 0 if report.passed else FAILED

    def _run_as_it_ended(self, path: Path, config: TrainConfig, *, is_changed: bool) -> Any:
        """The model of a run with its exits, but for what the options change."""
        import torch

        from localexit.train.export import load_run
        from localexit.train.models import attach_exits

        device = torch.device("cpu")
        local, _ = load_run(path, device=device)
        if not is_changed:
            return local
        local.remove()
        changed = attach_exits(local.model, config, device=device)
        if self.feedback is None:
            changed.feedback.load_state_dict(local.feedback.state_dict())
        return changed

    def _attached(self, config: TrainConfig) -> Any:
        """A model that no run trained, with exits."""
        import torch

        from localexit.train.models import attach_exits, build_model, load_pretrained
        from localexit.train.presets import PRESETS

        if self.model in PRESETS:
            model = build_model(config, vocab_size=PRESETS[self.model].vocab_size, end_of_text_id=0)
        else:
            model = load_pretrained(self.model)
        return attach_exits(model, config, device=torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time the exit against other heads, once it has been found right: table, JSON, plot.

    Attributes:
        config: what is measured.
    """

    config: tyro.conf.OmitArgPrefixes[BenchConfig] = _BENCH

    def execute(self) -> int:
        """Measure, then print the tables."""
        from localexit.bench.command import run_bench

        sys.stdout.write(f"{run_bench(self.config)}\n")
        return 0


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Audit, tyro.conf.subcommand("audit")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)

TRACEBACK, VERSION = "--traceback", "--version"
DESCRIPTION = (
    "Train language models locally: every block learns from its own exit, no gradient crosses between blocks. "
    f"What is refused is one line; {TRACEBACK} before the command shows where it came from. {VERSION} says which "
    f"version this is."
)


def run(arguments: Sequence[str]) -> int:
    """Run the command with these arguments and return its exit code; what it refuses is one line on stderr.

    With `--traceback` before the command, where it was refused is printed above that line. Warnings are a line each.
    """
    if list(arguments) == [VERSION]:
        sys.stdout.write(f"localexit {__version__}\n")
        return 0
    shows_traceback = list(arguments[:1]) == [TRACEBACK]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return int(_parsed(arguments[shows_traceback:]).execute())
    except (KeyboardInterrupt, ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError) as error:
        message, code = _refusal(error)
        if shows_traceback:
            traceback.print_exc()
        return _refused(message, code)


def _refusal(error: BaseException) -> tuple[str, int]:
    """What to say about an error, and the exit code; raises it again when nobody expected it."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, ModuleNotFoundError):
        return _values.missing_package(error.name), BAD_INPUT
    if _is_out_of_memory(error):
        reason = str(error).partition("\n")[0] or "no memory left"
        return f"not enough memory ({reason}); smaller batches, contexts or models need less of it", FAILED
    if isinstance(error, RuntimeError):
        from localexit.bench.gate import GateError
        from localexit.train.errors import RunFailedError

        if not isinstance(error, RunFailedError | GateError):
            raise error
        return str(error), FAILED
    return str(error), BAD_INPUT


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, torch on a CPU, or Python itself had no memory left."""
    torch = sys.modules.get("torch")
    is_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return is_gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _show_warning(message: Warning | str, *_where: object, **_more: object) -> None:
    _say(f"warning: {message}")


def _parsed(arguments: Sequence[str]) -> Any:
    command = _parse(Command, arguments)
    if not isinstance(command, Train) or not command.resume:
        return command
    if command.run is None:
        raise ValueError("run: --resume needs the folder of the run to continue, got none; name it")
    from localexit.train.folder import RunFolder

    # Parsed once more on top of the run's own configuration: what is not given is as it was.
    stored = RunFolder(path=command.run).read_config()
    given = _parse(Train, arguments[1:], default=Train(config=stored))
    return replace(command, config=given.config)


def _parse(kind: Any, arguments: Sequence[str], **options: Any) -> Any:
    """Parse with tyro; its framed messages become one line."""
    messages = io.StringIO()
    try:
        with redirect_stderr(messages):
            return tyro.cli(
                kind, prog="localexit", description=DESCRIPTION, args=arguments, registry=_registry(), **options
            )
    except SystemExit as ended:
        if ended.code == 0:
            raise
        raise ValueError(_first_part(messages.getvalue())) from None


def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _feedback(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[FeedbackSpec] | None:
        if info.type is not FeedbackSpec:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=f"{{{','.join(feedback_names())}}}[:OPTION=VALUE,...]",
            instance_from_str=lambda texts: FeedbackSpec.parse(texts[0]),
            is_instance=lambda value: isinstance(value, FeedbackSpec),
            str_from_instance=lambda spec: [str(spec)],
        )

    return registry


def _first_part(framed: str) -> str:
    """The text of a framed message up to its first rule."""
    lines = [line.strip("│╭╮╰╯ ") for line in framed.strip().splitlines()[1:]]
    until = next((i for i, line in enumerate(lines) if line.startswith("──")), len(lines))
    return re.sub(r"^Error parsing __\S+: ", "", " ".join(" ".join(lines[:until]).split()))


def _refused(message: str, code: int) -> int:
    _say(message)
    return code


def _say(message: str) -> None:
    """A line of ours on stderr."""
    sys.stderr.write(f"localexit: {visible(' '.join(message.split()))}\n")


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given, without those that were left out."""
    return {name: value for name, value in options.items() if value is not None}


def _print_sample(console: Any, prompt: str, text: str) -> None:
    from rich.text import Text

    console.print(Text("sample of the last exit, prompt in bold:"))
    console.print(Text(visible(prompt), style="bold") + Text(visible(text)), soft_wrap=True)


def _print_plain(console: Any, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
