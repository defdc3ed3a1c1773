"""What is compared: every feedback rule, and the controls that say what a difference means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from localexit import _values
from localexit._rules import feedback_names
from localexit.train.config import FeedbackSpec, TrainConfig, parse_options
from localexit.train.presets import PRESETS

EXACT, BACKPROP = "transport", "backprop"

# What must be the same for all methods, or says nothing about what is learned.
SAME_FOR_ALL = frozenset(
    {
        *("data", "model", "vocab_size", "feedback", "backward", "train_blocks", "steps", "batch_size", "accumulate"),
        *("context", "seed", "precision", "device", "threads", "compile", "cuda_graph", "log_every", "eval_every"),
        *("eval_tokens", "diagnose_every", "checkpoint_every", "prompt", "sample_tokens", "track"),
    }
)
SETTINGS = tuple(f.name for f in fields(TrainConfig) if f.name not in SAME_FOR_ALL)


@dataclass(frozen=True, kw_only=True)
class Control:
    """A method that is not a rule.

    Attributes:
        meaning: what it is, for a reader.
        rule: the feedback rule it uses.
        settings: fields of `TrainConfig` that make it what it is.
        is_full_rank: whether its rule's rank is the width of the hidden unless given.
    """

    meaning: str
    rule: str = EXACT
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_full_rank: bool = False


CONTROLS: dict[str, Control] = {
    # One exit is one unit, and one unit with weight transport is backprop.
    BACKPROP: Control(meaning="end-to-end backprop, loss at the last exit", settings={"exits": "-1"}),
    "backprop_all": Control(
        meaning="end-to-end backprop, losses of all exits together", settings={"backward": "joint"}
    ),
    "direct": Control(
        meaning="direct feedback alignment from the last exit's error, one fixed random matrix",
        rule="dense",
        settings={"backward": "direct"},
        is_full_rank=True,
    ),
    "frozen": Control(meaning="blocks stay as initialised", settings={"train_blocks": False}),
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method, written `NAME[:OPTION=VALUE,…][@SETTING=VALUE,…]`.

    NAME is a feedback rule or a control, OPTION one of the rule's, SETTING a field of `TrainConfig` such as lr or
    exits.

    >>> Method.parse("mirror_sampled:topk=8@lr=0.002,exits=every:3")
    Method(name='mirror_sampled', options=(('topk', 8),), settings=(('lr', 0.002), ('exits', 'every:3')))

    Attributes:
        name: of the rule or the control.
        options: of the rule.
        settings: of the training; they win over tuned values.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        _values.choice("method", self.name, method_names())
        for key, _ in self.settings:
            _values.choice(f"setting of method {self.name!r}", key, SETTINGS)
        self._spec()

    def __str__(self) -> str:
        options = str(self._spec()).removeprefix(self.rule)
        settings = ",".join(f"{key}={_written(value)}" for key, value in self.settings)
        return f"{self.name}{options}{f'@{settings}' if settings else ''}"

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read the written form.

        Raises:
            ValueError: not of that form, or an unknown method, option or setting.
        """
        what, _, settings = text.partition("@")
        name, _, options = what.partition(":")
        try:
            return cls(
                name=name,
                options=parse_options(options),
                settings=tuple((key, _setting(key, value)) for key, value in parse_options(settings)),
            )
        except SyntaxError:
            raise ValueError(
                f"method must be NAME, NAME:OPTION=VALUE,… or either with @SETTING=VALUE,…, got {text!r}"
            ) from None

    @property
    def rule(self) -> str:
        """Name of the feedback rule."""
        return CONTROLS[self.name].rule if self.name in CONTROLS else self.name

    @property
    def is_local(self) -> bool:
        """Whether every unit learns from its own exit, and from a feedback that may be judged there."""
        return self.name not in CONTROLS

    def apart(self) -> tuple[Method, dict[str, float]]:
        """The method without its settings that are numbers, and those: what a sweep varies.

        Settings that are names make another method.

        >>> method, numbers = Method.parse("dense@unembedding_init=codes,lr=0.002").apart()
        >>> str(method), numbers
        ('dense@unembedding_init=codes', {'lr': 0.002})
        """
        numbers = {key: value for key, value in self.settings if type(value) in (int, float)}
        names = tuple((key, value) for key, value in self.settings if key not in numbers)
        return replace(self, settings=names), numbers

    def config(self, base: TrainConfig, tuned: Mapping[str, Any]) -> TrainConfig:
        """The configuration of a run: the base, what makes the control, tuned values, the method's own settings."""
        control = CONTROLS.get(self.name)
        spec = self._spec()
        if control is not None and control.is_full_rank and "rank" not in dict(self.options):
            width = PRESETS[base.model].hidden_size
            spec = FeedbackSpec(name=spec.name, options=(*spec.options, ("rank", width)))
        fixed = {} if control is None else control.settings
        return replace(base, feedback=spec, **{**tuned, **fixed, **dict(self.settings)})

    def _spec(self) -> FeedbackSpec:
        return FeedbackSpec(name=self.rule, options=self.options)


def _setting(key: str, value: Any) -> Any:
    """What was read, as `TrainConfig` has it: block indices are text, several numbers are written 1/2/3."""
    if key == "exits":
        return str(value)
    if key in ("exit_weights", "betas"):
        try:
            return tuple(float(part) for part in str(value).split("/"))
        except ValueError:
            raise ValueError(f"{key} of a method must be numbers written 1/2/3, got {value!r}") from None
    return value


def _written(value: Any) -> str:
    return "/".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)


def method_names() -> tuple[str, ...]:
    """Every rule, then every control."""
    return (*feedback_names(), *CONTROLS)
