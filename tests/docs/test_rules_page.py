"""The page about the rules says what the rules are."""

from __future__ import annotations

import ast
import inspect
import re

import pytest

from docs.pages import README, headings, page, section, table
from localexit import attach, feedback_names
from localexit.feedback import RULES, feedback_options

NUMBER = r"[+-]?\d+(?:\.\d+)?"


def _options(text: str) -> dict[str, object]:
    rows = table(text, "option") if "| option |" in text else []
    return {row["option"]: ast.literal_eval(row["default"].strip("`")) for row in rows}


@pytest.mark.parametrize("name", feedback_names())
def test_options_and_defaults(name: str) -> None:
    parameters = inspect.signature(RULES[name].rule.__init__).parameters
    assert _options(section(page("rules.md"), name)) == {
        option: parameters[option].default for option in feedback_options(name)
    }


def test_a_section_for_each_rule_in_their_order() -> None:
    assert [heading for heading in headings(page("rules.md")) if heading in RULES] == list(feedback_names())


def test_readme_table_agrees_with_the_registry() -> None:
    rows = table(README.read_text(encoding="utf-8"), "rule")
    told = [(r["rule"], r["feedback"], r["cost"], r["state"], r["reads W for it?"]) for r in rows]
    assert told == [
        (f"`{name}`", rule.equation, rule.cost, rule.state, "yes" if rule.rule.needs_weight else "no")
        for name, rule in RULES.items()
    ]


def test_readme_quality_is_that_of_the_rules_page() -> None:
    measured = {row["rule"]: row for row in table(section(page("rules.md"), "Measured quality"), "rule")}
    for row in table(README.read_text(encoding="utf-8"), "rule"):
        source = measured[row["rule"].strip("`")]
        for column in ("A", "B"):
            found = re.match(NUMBER, source[f"{column}: difference"])
            assert row[column] == (found[0] if found else ""), (row["rule"], column)


def test_choices_of_attach() -> None:
    rows = table(section(page("your-model.md"), "Choices"), "argument")
    told = {row["argument"]: ast.literal_eval(row["default"].strip("`")) for row in rows}
    parameters = inspect.signature(attach).parameters
    assert told == {name: p.default for name, p in parameters.items() if name != "model"}
