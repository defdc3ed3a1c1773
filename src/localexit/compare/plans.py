"""What `localexit compare --preset NAME` trains: protocols, methods, seeds and budgets. Without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Literal

from localexit._rules import feedback_names
from localexit.compare.cells import Key
from localexit.compare.methods import BACKPROP, CONTROLS, EXACT, Method, method_names
from localexit.train.config import DIAGNOSE_TOKENS, TrainConfig
from localexit.train.presets import PRESETS

TUNED_FILE = "tuned.json"
PlanName = Literal["b0", "b0-all", "b0-sweep", "b1", "b1-sweep", "b1-codes", "b2"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Methods × seeds × budgets on one model.

    Attributes:
        config: what all its runs share.
        methods: as written.
        seeds: of weights, batches, codes and draws.
        budgets: optimiser steps.
        lr_factor: what learning rates are multiplied by, tuned ones included.
    """

    config: TrainConfig
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    budgets: tuple[int, ...]
    lr_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole comparison.

    Attributes:
        meaning: what it is, for a reader.
        stages: in the order they are trained.
        num_validations: how often a run is validated, the last step included.
        diagnose_at: shares of training after which the feedback is compared with the exact gradient.
        diagnose_seeds: in runs with these seeds.
        diagnose_tokens: over how many tokens.
        tuned: whose tuned learning rates and sizes of W are used; empty for none.
    """

    meaning: str
    stages: tuple[Stage, ...]
    num_validations: int = 5
    diagnose_at: tuple[float, ...] = ()
    diagnose_seeds: tuple[int, ...] = (0,)
    diagnose_tokens: int = DIAGNOSE_TOKENS
    tuned: str = ""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One cell to be trained.

    Attributes:
        method: as written.
        config: of the run.
        diagnose_steps: after which the feedback is compared with the exact gradient.
        diagnose_tokens: over how many tokens.
        text: sha256 of the text that it has to be trained on; any when None.
        commit: of the sources, where git cannot be asked.
    """

    method: str
    config: TrainConfig
    diagnose_steps: tuple[int, ...] = ()
    diagnose_tokens: int = DIAGNOSE_TOKENS
    text: str | None = None
    commit: str | None = None

    @property
    def key(self) -> Key:
        """That of its cell."""
        return Key(self.config.model, self.method, self.config.seed, self.config.steps)


# M = D/4 in both sizes.
SMALL_ANCHORS, LARGE_ANCHORS = "anchors:num_anchors=32", "anchors:num_anchors=128"
MAIN = (EXACT, BACKPROP, "mirror_sampled", "anchors_sampled", SMALL_ANCHORS, "dense")
LARGE_MAIN = (EXACT, BACKPROP, "mirror_sampled", "anchors_sampled", "anchors_shared", LARGE_ANCHORS)
# W starts as what the codes stand for.
CODES = "dense:rank=512@unembedding_init=codes"
# An exit on every third block, with the exact gradient and without weight transport.
FEWER = tuple(f"{method}@exits=every:3" for method in (EXACT, "mirror_sampled"))
# What exits are and where, with the exact gradient: how far local exits are from end-to-end backprop.
STRUCTURES = tuple(
    f"{EXACT}@{settings}"
    for settings in (
        *("exits=every:2", "exits=every:3", "exit_body=mlp", "exit_body=block", "exits=every:3,exit_body=mlp"),
        *("exit_weights=0.1/0.1/0.1/0.1/0.1/1", "exit_weights=0.5/0.6/0.7/0.8/0.9/1"),
    )
)
_IN_MAIN = {Method.parse(text).name for text in MAIN}
OTHER_RULES = tuple(name for name in feedback_names() if name not in _IN_MAIN)
OTHER_CONTROLS = tuple(name for name in CONTROLS if name not in _IN_MAIN)

_B0 = TrainConfig(
    model="mini",
    batch_size=8,
    context=64,
    steps=400,
    warmup_steps=40,
    lr=4e-3,
    eval_tokens=16384,
    device="cpu",
    threads=1,
)
# Six blocks, D=512, V=16384, 64 × 256 tokens a step.
_B1 = TrainConfig(
    model="small",
    batch_size=64,
    context=256,
    steps=400,
    warmup_steps=40,
    lr=1e-3,
    eval_tokens=131072,
)


def _swept(methods: Sequence[str], learning_rates: Sequence[float], stds: Sequence[float]) -> tuple[str, ...]:
    return tuple(
        f"{method}{',' if '@' in method else '@'}lr={lr:g},unembedding_std={std:g}"
        for std in stds
        for lr in learning_rates
        for method in methods
    )


def _large(name: str) -> str:
    """A rule or control as it is used with B1's width: M = D/4, codes of full rank."""
    return {"anchors": LARGE_ANCHORS, "dense": "dense:rank=512"}.get(name, name)


def _ladder_stage(model: str) -> Stage:
    """One width with as many tokens a block parameter as B1 has with 400 steps: steps grow with D²."""
    relative = PRESETS[model].hidden_size / PRESETS[_B1.model].hidden_size
    steps = round(400 * relative**2)
    return Stage(
        config=replace(_B1, model=model, steps=steps, warmup_steps=steps // 10),
        methods=(EXACT, BACKPROP, "mirror_sampled", *FEWER),
        seeds=(0, 1, 2),
        budgets=(steps,),
        lr_factor=1 / relative,
    )


PLANS: dict[PlanName, Plan] = {
    "b0": Plan(
        meaning="3 blocks, D=128, V=2048, 400 steps of 512 tokens, on a CPU: the main methods",
        stages=(Stage(config=_B0, methods=MAIN, seeds=(0, 1, 2, 3, 4), budgets=(400,)),),
        diagnose_at=(0.1, 1.0),
        tuned="b0",
    ),
    "b0-all": Plan(
        meaning="the setting of b0: every other rule and control",
        stages=(Stage(config=_B0, methods=(*OTHER_RULES, *OTHER_CONTROLS), seeds=(0, 1, 2), budgets=(400,)),),
        diagnose_at=(0.1, 1.0),
        tuned="b0",
    ),
    "b0-sweep": Plan(
        meaning="the setting of b0: learning rates and sizes of W for every method",
        stages=(
            Stage(
                config=_B0,
                methods=_swept(method_names(), (1e-3, 2e-3, 4e-3, 8e-3), (0.02, 0.06, 0.18)),
                seeds=(0,),
                budgets=(400,),
            ),
        ),
        num_validations=1,
    ),
    "b1": Plan(
        meaning="6 blocks, D=512, V=16384, 64 × 256 tokens a step, on a GPU",
        stages=(
            Stage(config=_B1, methods=LARGE_MAIN, seeds=(0, 1, 2), budgets=(400, 1600)),
            Stage(
                config=_B1,
                methods=("dense:rank=512", CODES, *OTHER_RULES, *OTHER_CONTROLS, *STRUCTURES),
                seeds=(0,),
                budgets=(400,),
            ),
            Stage(config=_B1, methods=FEWER, seeds=(0, 1, 2), budgets=(400, 1600)),
            Stage(config=_B1, methods=STRUCTURES, seeds=(0,), budgets=(1600,)),
            Stage(
                config=_B1,
                methods=(EXACT, BACKPROP, "mirror_sampled", "anchors_sampled", *FEWER),
                seeds=(0,),
                budgets=(6400,),
            ),
        ),
        num_validations=8,
        diagnose_at=(0.1, 0.5, 1.0),
        diagnose_tokens=65536,
        tuned="b1",
    ),
    "b1-sweep": Plan(
        meaning="the setting of b1: learning rates and sizes of W for every method",
        stages=(
            Stage(
                config=_B1,
                methods=_swept(tuple(map(_large, method_names())), (5e-4, 1e-3, 2e-3, 4e-3), (0.02, 0.06)),
                seeds=(0,),
                budgets=(400,),
            ),
        ),
        num_validations=1,
    ),
    "b1-codes": Plan(
        meaning="the setting of b1: learning rates and sizes of W for codes that W starts as",
        stages=(
            Stage(
                config=_B1,
                methods=_swept((CODES,), (1e-3, 2e-3, 4e-3), (0.02, 0.05, 0.1, 0.2)),
                seeds=(0,),
                budgets=(400,),
            ),
        ),
        num_validations=1,
    ),
    "b2": Plan(
        meaning="6 blocks of D=256, 512, 768, 1024, V=16384, equally many tokens a block parameter, on a GPU",
        stages=tuple(_ladder_stage(model) for model in ("small-256", "small", "small-768", "small-1024")),
        num_validations=8,
        tuned="b1",
    ),
}


def jobs(
    plan: Plan,
    *,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    budgets: Sequence[int] = (),
    data: str | None = None,
    device: str | None = None,
    commit: str | None = None,
    compile_blocks: bool = False,
) -> tuple[Job, ...]:
    """The cells of a plan, in the order they are trained: all methods of a seed before the next seed.

    Args:
        plan: the comparison.
        methods: in place of the plan's own, in every stage.
        seeds: likewise.
        budgets: likewise.
        data: text to train on, in place of the plan's own.
        device: likewise.
        commit: of the sources, where git cannot be asked.
        compile_blocks: train all methods with compiled blocks.

    Raises:
        ValueError: a method, seed or budget that cannot be.
    """
    given: dict[str, Any] = {name: value for name, value in (("data", data), ("device", device)) if value is not None}
    found: dict[Key, Job] = {}
    for stage in plan.stages:
        stage = replace(stage, config=replace(stage.config, compile=compile_blocks, **given))
        for steps in budgets or stage.budgets:
            for seed in seeds or stage.seeds:
                for text in methods or stage.methods:
                    job = _job(plan, stage, Method.parse(text), seed=seed, steps=steps)
                    found.setdefault(job.key, replace(job, commit=commit))
    return tuple(found.values())


def _job(plan: Plan, stage: Stage, method: Method, *, seed: int, steps: int) -> Job:
    every = max(1, steps // plan.num_validations)
    base = replace(stage.config, seed=seed, steps=steps, eval_every=every)
    values = tuned_values(plan.tuned) if plan.tuned else {}
    tuned = dict(values.get(str(method), values.get(method.name, {})))
    tuned["lr"] = tuned.get("lr", base.lr) * stage.lr_factor
    is_diagnosed = seed in plan.diagnose_seeds and method.is_local
    return Job(
        method=str(method),
        config=method.config(base, tuned),
        diagnose_steps=tuple(max(1, round(share * steps)) for share in plan.diagnose_at) if is_diagnosed else (),
        diagnose_tokens=plan.diagnose_tokens,
    )


def tuned_values(setting: str) -> Mapping[str, Mapping[str, Any]]:
    """The committed learning rates and sizes of W of a setting; a sweep finds them again.

    By method as it is written, or by its name for all that are not.
    """
    text = files("localexit.compare").joinpath(TUNED_FILE).read_text(encoding="utf-8")
    return json.loads(text)[setting]
