"""Which blocks have an exit, and whose a parameter is."""

from __future__ import annotations

import pytest
from torch import nn

from local.decoders import DECODERS, build
from local.rules import attached
from localexit.local.units import exit_blocks


@pytest.mark.parametrize(
    ("exits", "expected"),
    [
        ("every", (0, 1, 2, 3, 4)),
        ("every:1", (0, 1, 2, 3, 4)),
        ("every:2", (1, 3, 4)),
        ("every:5", (4,)),
        ([], (4,)),
        ([2, 0, 2], (0, 2, 4)),
        ((-2, 4), (3, 4)),
        (range(1, 3), (1, 2, 4)),
    ],
)
def test_exit_blocks(exits: object, expected: tuple[int, ...]) -> None:
    assert exit_blocks(exits, 5) == expected


@pytest.mark.parametrize(
    ("exits", "error", "message"),
    [
        ("all", ValueError, "exits must be 'every', 'every:k' with k in 1..5.* got 'all'"),
        ("every:", ValueError, "got 'every:'"),
        ("every:-1", ValueError, "got 'every:-1'"),
        ("every:0", ValueError, "pass 'every:k' with k in 1..5"),
        ("every:6", ValueError, "pass 'every:k' with k in 1..5"),
        ([5], ValueError, "exits has block 5, but the model has 5 blocks; pass -5..4"),
        ([-6], ValueError, "pass -5..4"),
        ([1.0], TypeError, "exits must hold block indices, got 1.0"),
        ([True], TypeError, "exits must hold block indices, got True"),
        (3, TypeError, "exits must be 'every', 'every:k' or block indices, got 3"),
    ],
)
def test_bad_exits(exits: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        exit_blocks(exits, 5)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("exit_norm", ["shared", "copy", "none"])
@pytest.mark.parametrize("name", DECODERS)
def test_every_parameter_belongs_to_one_unit_or_is_shared(name: str, exit_norm: str, is_tied: bool) -> None:
    local = attached(build(name, 5, is_tied=is_tied), exits="every:2", exit_norm=exit_norm)
    groups = [*(unit.parameters() for unit in local.units), local.shared_parameters()]
    ids = [id(parameter) for group in groups for parameter in group]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in local.parameters()}
    assert [unit.block_indices for unit in local.units] == [(0, 1), (2, 3), (4,)]
    assert [unit.index for unit in local.units] == [0, 1, 2] == [exit_.index for exit_ in local.exits]


def test_an_attached_model_says_how_it_was_attached() -> None:
    local = attached(build("plain"), exit_norm="copy", exit_body="mlp", backward="stream")
    assert (local.exit_norm, local.exit_body, local.backward_mode) == ("copy", "mlp", "stream")
    assert local.exit_weights == (1.0, 1.0, 1.0)
    assert attached(build("plain"), exit_norm=nn.LayerNorm(12).double()).exit_norm is None


def test_what_is_shared_and_where_norms_belong() -> None:
    model = build("plain")
    head, norm = list(model.head.parameters()), list(model.norm.parameters())
    shared = attached(model)
    assert_same(shared.shared_parameters(), [*head, *norm])
    shared.remove()
    copies = attached(model, exit_norm="copy")
    assert_same(copies.shared_parameters(), head)
    assert_same(copies.units[1].parameters(), [*model.blocks[1].parameters(), *copies.exit_norms[1].parameters()])
    assert_same(copies.units[2].parameters(), [*model.blocks[2].parameters(), *norm])
    copies.remove()
    own = nn.LayerNorm(12).double()
    assert_same(attached(model, exit_norm=own).shared_parameters(), [*head, *own.parameters()])


def test_everything_before_the_first_block_belongs_to_the_first_unit() -> None:
    model = build("plain")
    first = attached(model).units[0].parameters()
    assert_same(
        first, [model.decay, *model.embed.parameters(), *model.position.parameters(), *model.blocks[0].parameters()]
    )


def test_weights_that_blocks_of_two_units_share_are_shared() -> None:
    model = build("plain")
    model.blocks[2].mix = model.blocks[0].mix
    local = attached(model)
    assert_same(
        local.shared_parameters(),
        [*model.head.parameters(), *model.norm.parameters(), *model.blocks[0].mix.parameters()],
    )
    assert not {id(p) for p in model.blocks[0].mix.parameters()} & {id(p) for u in local.units for p in u.parameters()}


def assert_same(got: list[nn.Parameter], expected: list[nn.Parameter]) -> None:
    assert sorted(map(id, got)) == sorted(map(id, expected))
