"""Names and options of the feedback rules: what can be said about them before torch is imported.

The rules themselves are in `feedback/`, and what a reader wants to know of each in `feedback/registry.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

from localexit import _values

# Options that a name fixes, or that have no effect under it, are not here.
OPTIONS: dict[str, tuple[str, ...]] = {
    "dense": ("rank", "gain"),
    "sketch": ("rank", "gain"),
    "hybrid": ("rank", "rank_exact", "topk", "gain"),
    "parallel": (),
    "parallel_gold": ("residual_rank", "residual_gain"),
    "parallel_topmass": ("residual_rank", "residual_gain", "mass_threshold", "nucleus_cap"),
    "anchors": ("num_anchors", "rank", "ridge"),
    "anchors_sampled": ("num_anchors", "rank", "ridge", "topk", "num_draws"),
    "anchors_shared": ("num_anchors", "ridge", "topk", "num_draws"),
    "mirror": ("num_pairs", "update_every", "ridge", "storage"),
    "mirror_sampled": ("num_pairs", "update_every", "ridge", "storage", "topk", "num_draws"),
    "transport": (),
    "transport_sampled": ("topk", "num_draws"),
}


def feedback_names() -> tuple[str, ...]:
    """The names `make_feedback` knows, in the order of the documentation."""
    return tuple(OPTIONS)


def feedback_options(name: str) -> tuple[str, ...]:
    """The options `make_feedback(name, ...)` takes besides the sizes and the seed."""
    _values.choice("feedback", name, feedback_names())
    return OPTIONS[name]


def check_options(name: str, options: Iterable[str]) -> None:
    """Refuse a rule or an option that there is not.

    Raises:
        ValueError: unknown name, or an option the rule does not take.
    """
    known = feedback_options(name)
    for key in options:
        if key not in known:
            raise ValueError(f"feedback {name!r} has no option {key!r}; expected one of {', '.join(known) or 'none'}")
