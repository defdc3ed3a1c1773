"""Top-k and draws over a vocabulary: a pass over groups of entries, then a look into the few groups that matter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Entries of the error are summed in groups of this many when a token is drawn, so that a draw touches one group only.
GROUP = 128
# Entries a CPU works on at a time, 4 MiB in fp32: what is made in between stays in its cache.
_BLOCK = 2**20


def by_rows(function: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """`function(*matrices)`, which works row by row; on the CPU a few rows at a time."""
    if matrices[0].is_cuda:
        return function(*matrices)
    num_rows = max(1, _BLOCK // matrices[0].shape[1])
    parts = zip(*(matrix.split(num_rows) for matrix in matrices), strict=True)
    return torch.cat([function(*part) for part in parts])


def reduce_groups(values: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """`reduce` over |values| [n, V] in groups of GROUP neighbours, the last may be shorter: [n, G]."""
    num_whole = values.shape[1] // GROUP

    def of(rows: Tensor) -> Tensor:
        whole, rest = rows.abs().tensor_split([num_whole * GROUP], dim=1)
        reduced = reduce(whole.unflatten(1, (num_whole, GROUP)), -1)
        return torch.cat([reduced, reduce(rest, 1)[:, None]], dim=1) if rest.shape[1] else reduced

    return by_rows(of, values)


def entries(values: Tensor, groups: Tensor, exclude: Tensor, fill: float) -> Tensor:
    """Magnitudes of the entries of groups [n, s] of values [n, V]: [n, s, GROUP].

    `fill` stands in place of the tokens exclude [n, k], and of what lies past the vocabulary.
    """
    found = torch.cat([_gather_groups(values, groups, fill).flatten(1), values.new_empty(len(values), 1)], dim=1)
    slots = torch.arange(groups.shape[1], device=groups.device)[:, None]
    is_here = groups[:, :, None] == (exclude // GROUP)[:, None, :]  # [n, s, k]
    # Tokens of other groups go to the one place behind the others.
    place = torch.where(is_here, slots * GROUP + (exclude % GROUP)[:, None, :], found.shape[1] - 1)
    found.scatter_(1, place.flatten(1), fill)
    return found[:, :-1].unflatten(1, (groups.shape[1], GROUP))


def _gather_groups(values: Tensor, groups: Tensor, fill: float) -> Tensor:
    num_whole, num_rest = divmod(values.shape[1], GROUP)
    rest = nn.functional.pad(values[:, num_whole * GROUP :].abs(), (0, GROUP - num_rest), value=fill)[:, None]
    if num_whole == 0:
        return rest.expand(-1, groups.shape[1], -1)
    whole = values[:, : num_whole * GROUP].unflatten(1, (num_whole, GROUP))
    found = whole.gather(1, groups.clamp_max(num_whole - 1)[..., None].expand(-1, -1, GROUP)).abs_()
    return torch.where((groups == num_whole)[..., None], rest, found) if num_rest else found


def largest(values: Tensor, k: int, exclude: Tensor) -> Tensor:
    """Ids [n, k] of the k entries of values [n, V] largest in magnitude, leaving out exclude [n]; k < V."""
    # They lie in k groups, and the excluded one can only add its own to those with the largest entries.
    highs = reduce_groups(values, torch.amax)
    groups = highs.topk(min(k + 1, highs.shape[1])).indices
    # Below every magnitude, also where all of them are zero.
    found = entries(values, groups, exclude[:, None], -1).flatten(1)
    place = found.topk(k).indices
    return groups.gather(1, place // GROUP) * GROUP + place % GROUP


def draw(values: Tensor, uniforms: Tensor, exclude: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw entries of values [n, V] in proportion to their magnitude, never one of exclude [n, k].

    uniforms [n, m] in [0, 1), in the dtype the sums are kept in.

    Returns:
        ids int64 [n, m]; is_drawn bool [n, m], False where there is nothing to draw; total [n, 1] magnitude.
    """
    dtype = uniforms.dtype
    sums = reduce_groups(values, lambda rows, dim: rows.sum(dim, dtype=dtype))
    # What the excluded leave behind in their groups is summed anew: to subtract them would leave rounding noise.
    touched = exclude // GROUP
    sums = sums.scatter(1, touched, entries(values, touched, exclude, 0).sum(-1, dtype=dtype))
    total = sums.sum(1, keepdim=True)
    group, rest = _invert(sums, uniforms * total)
    inside = entries(values, group, exclude, 0).to(dtype)
    offset, _ = _invert(inside, rest[..., None])
    # A rounding error at the end of the last group may point behind its last entry: nothing is drawn then.
    is_drawn = inside.gather(-1, offset)[..., 0] > 0
    return (group * GROUP + offset[..., 0]).clamp_max(values.shape[1] - 1), is_drawn, total


def _invert(mass: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose running sum of `mass` exceeds `threshold`, and what is left of the threshold inside it."""
    running = mass.cumsum(-1)
    index = torch.searchsorted(running, threshold, right=True).clamp_max(mass.shape[-1] - 1)
    return index, threshold - (running.gather(-1, index) - mass.gather(-1, index))
