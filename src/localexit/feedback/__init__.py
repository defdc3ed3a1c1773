"""What comes back to the hidden state in place of `e @ W`. Knows no loss, never receives the unembedding."""

from localexit._rules import feedback_names, feedback_options
from localexit.feedback.anchors import LogitAnchors
from localexit.feedback.base import Anchors, Error, Feedback, Tokens
from localexit.feedback.factorized import Dense, Hybrid, Sketch
from localexit.feedback.parallel import ExactParallel
from localexit.feedback.registry import RULES, make_feedback, rule_options
from localexit.feedback.rows import WeightMirror, WeightTransport
from localexit.feedback.shared import SharedAnchors

__all__ = [
    "RULES",
    "Anchors",
    "Dense",
    "Error",
    "ExactParallel",
    "Feedback",
    "Hybrid",
    "LogitAnchors",
    "SharedAnchors",
    "Sketch",
    "Tokens",
    "WeightMirror",
    "WeightTransport",
    "feedback_names",
    "feedback_options",
    "make_feedback",
    "rule_options",
]
