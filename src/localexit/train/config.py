"""What a training run is determined by: one frozen value, the same on the command line and in `config.json`.

Without torch, so that the command answers at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, get_args

from localexit import _values
from localexit._rules import check_options
from localexit.train.presets import PRESETS

if TYPE_CHECKING:
    from localexit.feedback import Feedback

ExitNorm = Literal["shared", "copy", "none"]
ExitBody = Literal["norm", "mlp", "block"]
Backward = Literal["stream", "deferred", "joint", "direct"]
LOCAL_BACKWARDS = ("stream", "deferred")
Decay = Literal["linear", "cosine"]
OptimizerTiming = Literal["after_backward", "in_backward"]
Precision = Literal["auto", "fp32", "bf16"]
NonFinite = Literal["stop", "skip"]
UnembeddingInit = Literal["random", "codes"]
TRACKERS = ("tensorboard", "trackio", "wandb")

# Validation tokens of a diagnosis. More than 16,384 targets: the first token of each window is none.
DIAGNOSE_TOKENS = 17408

# They say where and how fast a run computes, not what, or what to do about what ended it: a resume may change them.
FREE_ON_RESUME = frozenset({"device", "threads", "compile", "cuda_graph", "non_finite", "max_skipped", "track"})
# Fields that runs of the first version do not have, and what those runs did.
_ADDED_FIELDS: Mapping[str, Any] = {
    "unembedding_std": 0.02,
    "unembedding_init": "random",
    "non_finite": "stop",
    "max_skipped": 10,
    "optimizer": "after_backward",
    "exit_body": "norm",
    "exit_weights": None,
    "exit_warmup": 0,
    "exits_per_step": None,
    "token_share": 1.0,
    "shard": False,
    "diagnose_every": 0,
    "compile": False,
    "cuda_graph": False,
}


@dataclass(frozen=True, kw_only=True)
class FeedbackSpec:
    """A feedback rule and its options, written `NAME` or `NAME:OPTION=VALUE,OPTION=VALUE`.

    >>> FeedbackSpec.parse("mirror_sampled:topk=8,num_draws=32")
    FeedbackSpec(name='mirror_sampled', options=(('topk', 8), ('num_draws', 32)))

    Attributes:
        name: one of `feedback_names()`.
        options: the rule's own options, see its class.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        keys = [key for key, _ in self.options]
        check_options(self.name, keys)
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"feedback {self.name!r}: option {key!r} is given twice; pass it once")

    def __str__(self) -> str:
        options = ",".join(f"{key}={json.dumps(value)}" for key, value in self.options)
        return f"{self.name}:{options}" if options else self.name

    @classmethod
    def parse(cls, text: str) -> FeedbackSpec:
        """Read the written form.

        Raises:
            ValueError: not of that form, or an unknown rule or option.
        """
        name, _, options = text.partition(":")
        try:
            return cls(name=name, options=parse_options(options))
        except SyntaxError:
            raise ValueError(f"feedback must be NAME or NAME:OPTION=VALUE,…, got {text!r}") from None

    def build(self, *, hidden_size: int, vocab_size: int, seed: int) -> Feedback:
        """The rule for an unembedding [vocab_size, hidden_size].

        Raises:
            ValueError: an option is out of range.
        """
        from localexit.feedback import make_feedback

        return make_feedback(self.name, hidden_size, vocab_size, seed=seed, **dict(self.options))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run's result depends on; the defaults are the demo.

    Attributes:
        data: text to train on: stdlib, docstrings, a file or folder, or hf:NAME.
        model: a preset (tiny, mini, demo, small, medium; small-256, small-768 and small-1024 differ from small
            in their width), a local folder, or a hub name OWNER/NAME.
        vocab_size: tokens in the vocabulary learned from the text; the preset's own by default.
        feedback: the rule, alone or with options of its own.
        exits: which blocks have one: every, every:K, or indices such as 1,3,5; the last block always has.
        exit_norm: the norm at early exits: the model's own (shared), a copy each, or none.
        exit_body: what early exits have of their own in front of that: nothing more (norm), a residual mlp, or a copy
            of their block.
        exit_weights: what each exit's loss counts, one number an exit; 1 each by default.
        exit_warmup: steps in which the exits' weights rise from zero.
        exits_per_step: so many exits, drawn at random, take part in a step; all by default.
        token_share: share of the tokens, drawn at random, that an exit sees.
        backward: stream (memory flat in depth) or deferred (ordinary backward after the forward); joint and direct are
            controls that are not local: end-to-end backprop from all exits, direct feedback alignment.
        unembedding_std: standard deviation of a preset's unembedding before training.
        unembedding_init: what a preset's unembedding starts as: random, or the codes of feedback dense.
        train_blocks: off trains the unembedding and the exit norm only, the control for what blocks learn.
        steps: optimiser steps.
        batch_size: context windows a micro-batch.
        accumulate: micro-batches a step.
        context: tokens a window.
        lr: peak learning rate of AdamW.
        betas: AdamW's.
        weight_decay: on matrices and embeddings, not on norms and biases.
        warmup_steps: linear rise of the learning rate to its peak.
        decay: shape of its fall after that.
        final_lr: what it falls to, as a share of the peak.
        optimizer: when AdamW steps: after the backward of all units, or in_backward, each unit right after its own, so
            that the gradients of one unit live at a time.
        clip: largest gradient norm, for each unit by itself and for what units share.
        non_finite: what a NaN or infinite loss or gradient does before the optimiser sees it: stop ends the run, skip
            leaves the batch out and takes the next.
        max_skipped: most batches that a run leaves out before it stops after all.
        label_smoothing: of the training loss.
        z_loss: factor of the squared log-sum-exp in the training loss.
        seed: of weights, batches and the rule's codes and draws.
        precision: fp32, or bf16 autocast; auto takes bf16 on a GPU.
        device: auto, cpu, cuda, cuda:1, …
        threads: CPU threads; torch's choice by default.
        compile: train with compiled blocks, which the first step waits for; everything but training stays as it is.
        cuda_graph: record the work of a step on one GPU and replay it, which spares the host the launches of small
            models' kernels; takes up to twice the memory, and refuses what differs from step to step.
        shard: spread the blocks' parameters, gradients and optimiser state over the processes of the run.
        log_every: steps between training records.
        eval_every: steps between validations; the last step always has one.
        eval_tokens: validation tokens to use, spread over the text.
        checkpoint_every: steps between checkpoints; the last step always has one.
        diagnose_every: steps between comparisons of the feedback with the exact gradient, the last step included; 0 for
            none. Each costs as much as some dozens of steps.
        prompt: what samples continue; the beginning of the validation text by default.
        sample_tokens: length of the samples, 0 for none.
        track: who gets the metrics besides the run's folder: tensorboard, trackio, wandb, several with commas, or none.
    """

    data: str = "stdlib"
    model: str = "demo"
    vocab_size: int | None = None
    feedback: FeedbackSpec = FeedbackSpec(name="mirror")
    exits: str = "every"
    exit_norm: ExitNorm = "shared"
    exit_body: ExitBody = "norm"
    exit_weights: tuple[float, ...] | None = None
    exit_warmup: int = 0
    exits_per_step: int | None = None
    token_share: float = 1.0
    backward: Backward = "stream"
    unembedding_std: float = 0.02
    unembedding_init: UnembeddingInit = "random"
    train_blocks: bool = True
    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    context: int = 128
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    warmup_steps: int = 60
    decay: Decay = "linear"
    final_lr: float = 0.05
    optimizer: OptimizerTiming = "after_backward"
    clip: float = 1.0
    non_finite: NonFinite = "stop"
    max_skipped: int = 10
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    seed: int = 0
    precision: Precision = "auto"
    device: str = "auto"
    threads: int | None = None
    compile: bool = False
    cuda_graph: bool = False
    shard: bool = False
    log_every: int = 1
    eval_every: int = 100
    eval_tokens: int = 16384
    checkpoint_every: int = 100
    diagnose_every: int = 0
    prompt: str | None = None
    sample_tokens: int = 96
    track: str = "tensorboard"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "eval_every", "eval_tokens", "checkpoint_every"):
            _values.count(name, getattr(self, name), minimum=1)
        for name in ("warmup_steps", "exit_warmup", "max_skipped", "sample_tokens", "seed", "diagnose_every"):
            _values.count(name, getattr(self, name), minimum=0)
        for name in ("vocab_size", "exits_per_step"):
            if getattr(self, name) is not None:
                _values.count(name, getattr(self, name), minimum=1)
        if self.threads is not None:
            _values.threads(self.threads)
        _values.count("context", self.context, minimum=2)
        for name, kinds in (
            ("exit_norm", ExitNorm),
            ("exit_body", ExitBody),
            ("backward", Backward),
            ("decay", Decay),
            ("precision", Precision),
            ("non_finite", NonFinite),
            ("optimizer", OptimizerTiming),
            ("unembedding_init", UnembeddingInit),
        ):
            _values.choice(name, getattr(self, name), get_args(kinds))
        _values.loss_options("mean", self.label_smoothing, self.z_loss, None)
        self._check_optimizer()
        self._check_codes()
        if self.diagnose_every and self.backward not in LOCAL_BACKWARDS:
            raise ValueError(
                f"diagnose_every is for {' and '.join(LOCAL_BACKWARDS)}, where a feedback replaces the gradient of a "
                f"unit's own exit, got {self.diagnose_every} with backward={self.backward!r}; pass 0"
            )
        if self.shard and self.exit_body == "block":
            raise ValueError(
                "exit_body='block' copies blocks, and shard spreads them over processes; pass exit_body='mlp' or leave "
                "shard out"
            )
        exit_indices(self.exits)
        tracker_names(self.track)
        if self.optimizer == "in_backward":
            self._check_in_backward()
        if self.cuda_graph:
            self._check_cuda_graph()

    def _check_in_backward(self) -> None:
        self._check_needed(
            "optimizer='in_backward' steps each unit before the others' gradients exist",
            {"backward": "stream", "accumulate": 1, "non_finite": "stop"},
            "pass optimizer='after_backward'",
        )

    def _check_cuda_graph(self) -> None:
        self._check_needed(
            "cuda_graph replays the same work in every step of one process",
            {"optimizer": "after_backward", "exits_per_step": None, "exit_warmup": 0, "shard": False},
            "leave cuda_graph out",
        )

    def _check_needed(self, why: str, needed: Mapping[str, Any], remedy: str) -> None:
        """Refuse other values of these fields than the ones needed."""
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{why}: expected {name}={value!r}, got {getattr(self, name)!r}; change it, or {remedy}"
                )

    def _check_optimizer(self) -> None:
        for name in ("lr", "clip"):
            _values.positive(name, getattr(self, name))
        for name in ("weight_decay", "unembedding_std"):
            _values.non_negative(name, getattr(self, name))
        for name in ("final_lr", "token_share"):
            _values.fraction(name, getattr(self, name))
        if len(self.betas) != 2 or not all(isinstance(beta, Real) and 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps must be below steps={self.steps}, got {self.warmup_steps}; pass fewer warmup_steps, or "
                f"more steps"
            )

    def _check_codes(self) -> None:
        if self.unembedding_init == "codes" and self.feedback.name != "dense":
            raise ValueError(
                f"unembedding_init='codes' needs feedback 'dense', the rule with a code for each token, got "
                f"{self.feedback.name!r}; pass feedback dense, or leave unembedding_init out"
            )
        if self.unembedding_init == "codes" and self.model not in PRESETS:
            raise ValueError(
                f"unembedding_init='codes' is for presets, whose weights are random, got model {self.model!r}, whose "
                f"unembedding it would overwrite; leave it out"
            )

    def to_json(self) -> dict[str, Any]:
        """Every field, in types that JSON has."""
        weights = None if self.exit_weights is None else list(self.exit_weights)
        return {**asdict(self), "feedback": str(self.feedback), "betas": list(self.betas), "exit_weights": weights}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TrainConfig:
        """Inverse of `to_json`; reads what earlier versions wrote, too.

        Raises:
            ValueError: fields are missing, unknown or out of range.
            TypeError: a field has the wrong type.
        """
        known = {field.name for field in fields(cls)}
        content = {**_ADDED_FIELDS, **content}
        if "tensorboard" in content:
            # Its name in runs that could tell nobody else.
            content["track"] = "tensorboard" if content.pop("tensorboard") else "none"
        if set(content) != known:
            odd = ", ".join(sorted(set(content) ^ known))
            raise ValueError(
                f"config.json: expected the fields of this version of localexit, got others ({odd}); "
                f"resume with the version that wrote it"
            )
        weights = content["exit_weights"]
        values = {
            **content,
            "feedback": FeedbackSpec.parse(content["feedback"]),
            "betas": tuple(content["betas"]),
            "exit_weights": None if weights is None else tuple(weights),
        }
        return cls(**values)

    def differences(self, other: TrainConfig) -> list[str]:
        """What `other` asks differently of a run with this configuration, a line a field; free fields aside."""
        mine, theirs = self.to_json(), other.to_json()
        return [
            f"{name}: the run has {mine[name]!r}, got {theirs[name]!r}"
            for name in mine
            if name not in FREE_ON_RESUME and mine[name] != theirs[name]
        ]


def exit_indices(exits: str) -> str | tuple[int, ...]:
    """`exits` as `attach` takes it: "every", "every:k", or block indices.

    Raises:
        ValueError: neither of these.
    """
    if re.fullmatch(r"every(:[1-9]\d*)?", exits):
        return exits
    try:
        return tuple(int(part) for part in exits.split(","))
    except ValueError:
        raise ValueError(f"exits must be 'every', 'every:K' or block indices such as 1,3,5, got {exits!r}") from None


def tracker_names(track: str) -> tuple[str, ...]:
    """The trackers that `track` names, none for "none".

    Raises:
        ValueError: a name that is none, or twice the same.
    """
    names = () if track == "none" else tuple(name.strip() for name in track.split(","))
    if not set(names) <= set(TRACKERS) or len(set(names)) < len(names):
        raise ValueError(f"track must be none, or of {', '.join(TRACKERS)} each at most once, got {track!r}")
    return names


def parse_options(text: str) -> tuple[tuple[str, Any], ...]:
    """Read `OPTION=VALUE,OPTION=VALUE`; values are numbers, true, false, null or text.

    Raises:
        SyntaxError: not of that form.
    """
    pairs = [part.partition("=") for part in text.split(",")] if text else []
    if not all(key and equals and value for key, equals, value in pairs):
        raise SyntaxError(f"expected OPTION=VALUE,…, got {text!r}")
    return tuple((key.strip(), _scalar(value.strip())) for key, _, value in pairs)


def _scalar(text: str) -> Any:
    """A number, true, false or null as JSON has them; other text as it is."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, (dict, list)) else value
