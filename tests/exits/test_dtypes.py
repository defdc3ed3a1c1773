"""docs/dtypes.md, row by row: what its tables say is what runs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exits.canaries import CLOSE, HEADS, RULES, VOCAB, WIDTH, make_case, make_head, relative_error
from localexit import exit_cross_entropy, exit_step
from localexit.exits import head_operators, operators
from localexit.exits.chunked import PLAIN
from localexit.feedback import Feedback
from localexit.feedback.base import Error, Tokens

PAGE = Path(__file__).parents[2] / "docs" / "dtypes.md"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64, "": None}
Row = dict[str, Any]


def table(heading: str) -> list[Row]:
    """The first table under a heading of the page, one dict a row, dtypes by name; footnote marks are dropped."""
    lines = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip(" ¹") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head, _, *rows = cells
    return [dict(zip(head, (DTYPES[cell] for cell in row), strict=True)) for row in rows]


def names(row: Row) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in list(row.values())[:3])


EXIT, STEP_RULES, DROP_IN = table("`exit_cross_entropy`"), table("Rules"), table("Drop-in heads")


def region(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


class Probe:
    """Stages that note the dtypes they see."""

    def __init__(self) -> None:
        self.seen: dict[str, torch.dtype] = {}
        self.stages = replace(
            PLAIN, logits=self.logits, loss_and_error=self.loss_and_error, add_weight_grad=self.add, feedback=self.rule
        )

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        assert hidden.dtype == weight.dtype
        self.seen["products"] = hidden.dtype
        PLAIN.logits(hidden, weight, bias, out)

    def loss_and_error(self, logits: Tensor, *arguments: Any, **options: Any) -> Any:
        self.seen["softmax"] = logits.dtype
        return PLAIN.loss_and_error(logits, *arguments, **options)

    def add(self, total: Tensor | None, values: Tensor, scaled_hidden: Tensor) -> Tensor:
        assert values.dtype == scaled_hidden.dtype
        self.seen["error"] = values.dtype
        total = PLAIN.add_weight_grad(total, values, scaled_hidden)
        self.seen["dW"] = total.dtype
        return total

    def rule(self, rule: Feedback, error: Error, tokens: Tokens, prepared: tuple[Tensor, ...]) -> Tensor:
        # What meets the error in a product; the expander and the ridge solution meet sums.
        self.seen["read in"] = prepared[0].dtype
        feedback = PLAIN.feedback(rule, error, tokens, prepared)
        self.seen["feedback"] = feedback.dtype
        return feedback


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Probe:
    probe = Probe()
    monkeypatch.setattr(operators, "stages_of", lambda _: probe.stages)
    return probe


def test_the_page_has_its_tables() -> None:
    assert (len(EXIT), len(STEP_RULES), len(DROP_IN)) == (15, 5, 8)
    assert len({names(row) for row in EXIT}) == len(EXIT)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("row", EXIT, ids=names)
def test_exit_cross_entropy(row: Row, name: str, probe: Probe) -> None:
    case = make_case(name)
    hidden = case.hidden.to(row["input"]).requires_grad_()
    weight = case.weight.to(row["linear_weight"]).requires_grad_()
    bias = torch.zeros(VOCAB, dtype=torch.float32, requires_grad=True)
    with region(row["autocast"]):
        loss, stats = exit_cross_entropy(
            hidden, weight, case.target, feedback=case.rule, linear_bias=bias, return_stats=True
        )
    loss.backward()
    assert probe.seen["products"] == row["products"]
    assert probe.seen["error"] == row["error"]
    assert {probe.seen[what] for what in ("softmax", "dW", "feedback")} == {row["sums"]}
    assert {loss.dtype, stats.lse.dtype, stats.log_prob.dtype, stats.entropy.dtype} == {row["loss, statistics"]}
    assert (stats.argmax.dtype, stats.is_correct.dtype) == (torch.int64, torch.bool)
    assert hidden.grad.dtype == row["input.grad"]
    assert weight.grad.dtype == row["linear_weight.grad"]
    assert bias.grad.dtype == torch.float32


@pytest.mark.parametrize("row", EXIT, ids=names)
def test_rounding_is_that_of_the_narrowest_dtype(row: Row) -> None:
    """The right dtypes, and numbers to match: nothing in between is rounded more than the table says."""
    case = make_case("transport")
    narrow = replace(case, hidden=case.hidden.to(row["input"]), weight=case.weight.to(row["linear_weight"]))
    hidden, weight = narrow.leaves()
    with region(row["autocast"]):
        exit_cross_entropy(hidden, weight, case.target, feedback=case.rule).backward()
    expected = narrow.oracle()
    for grad, exact in ((hidden.grad, expected.feedback), (weight.grad, expected.weight_grad)):
        # Logits of a few nats, rounded to the products' dtype, move a probability by as many eps.
        eps = max(torch.finfo(dtype).eps for dtype in (row["products"], grad.dtype))
        assert relative_error(grad, exact) < 4 * eps


@pytest.mark.parametrize("row", EXIT, ids=names)
def test_exit_step(row: Row) -> None:
    case = make_case("dense")
    hidden, weight = case.hidden.to(row["input"]), case.weight.to(row["linear_weight"])
    grad_weight, grad_bias = torch.zeros(VOCAB, WIDTH, dtype=row["sums"]), torch.zeros(VOCAB, dtype=row["sums"])
    with region(row["autocast"]):
        step = exit_step(
            hidden,
            weight,
            case.target,
            feedback=case.rule,
            linear_bias=torch.zeros(VOCAB),
            grad_weight=grad_weight,
            grad_bias=grad_bias,
        )
    assert step.loss.dtype == row["loss, statistics"]
    assert step.feedback.dtype == row["input"]


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("parallel", "anchors")])
@pytest.mark.parametrize("row", STEP_RULES, ids=names)
def test_converted_rules(row: Row, name: str, probe: Probe) -> None:
    case = make_case(name)
    rule = case.rule.to(row["rule stored in"])
    hidden, weight = (leaf.detach().to(row["input, linear_weight"]).requires_grad_() for leaf in case.leaves())
    assert {code.dtype for code in rule.buffers() if code.is_floating_point()} <= {row["codes, rows"]}
    assert rule.step.dtype == torch.int64
    for _ in range(2):
        exit_cross_entropy(hidden, weight, case.target, feedback=rule).backward()
        # Few rows are gathered as they are stored; the sum is in the error's dtype.
        assert "sampled" in name or probe.seen["read in"] == row["read in"]
        assert probe.seen["feedback"] == torch.float32
        assert hidden.grad.dtype == row["input.grad"]
        if row["input.grad"] == torch.float32:
            # What is rounded is what is stored: the oracle takes the rule's own numbers.
            assert relative_error(hidden.grad, case.oracle().feedback) < CLOSE
        hidden.grad = None
        # Also the mirror's update works on rows stored in any dtype.
        rule.update()


@pytest.mark.parametrize("mode", HEADS)
@pytest.mark.parametrize("row", DROP_IN, ids=names)
def test_drop_in_heads(row: Row, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sums: set[torch.dtype] = set()
    feedback_of = head_operators._feedback

    def noting(values: Tensor, rows: Tensor, *arguments: Any) -> Tensor:
        sums.update((values.dtype, rows.dtype))
        return feedback_of(values, rows, *arguments)

    monkeypatch.setattr(head_operators, "_feedback", noting)
    case = make_case("dense")
    head = make_head(mode)
    hidden, weight = case.hidden.to(row["h"]).requires_grad_(), case.weight.to(row["shared_weight"]).requires_grad_()
    with region(row["autocast"]):
        logits = head(hidden, weight, case.target)
    logits.sum().backward()
    assert logits.dtype == row["logits"]
    assert sums == {row["sums"]}
    assert hidden.grad.dtype == row["h.grad"]
    assert weight.grad.dtype == row["shared_weight.grad"]


@pytest.mark.parametrize("mode", ["dense", "hybrid"])
def test_the_drop_in_gain_stays_fp32(mode: str) -> None:
    head = make_head(mode).to(torch.bfloat16)
    assert head.alpha.dtype == torch.float32
    assert head.U.dtype == torch.bfloat16


def test_unsupported_dtypes_are_refused() -> None:
    case = make_case("dense")
    with pytest.raises(TypeError, match="^input must have one of the dtypes"):
        exit_cross_entropy(case.hidden.to(torch.float8_e4m3fn), case.weight, case.target, feedback=case.rule)
