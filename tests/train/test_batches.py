from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from localexit.train.batches import BatchSampler, valid_batches
from localexit.train.tokens import TokenStream

CONTEXT = 4


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    return make_stream(tmp_path, 42)


def make_stream(folder: Path, num_tokens: int) -> TokenStream:
    """Ids that count up, so that a window tells its place: window i starts with 4·i."""
    path = folder / "stream.bin"
    np.arange(num_tokens, dtype="<u2").tofile(path)
    header = {
        "format": 1,
        "split": "train",
        "dtype": "uint16",
        "num_tokens": num_tokens,
        "num_bytes": 99,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    path.with_suffix(".json").write_text(json.dumps(header))
    return TokenStream(path)


def make(stream: TokenStream, **changes: int) -> BatchSampler:
    arguments = {"batch_size": 3, "context": CONTEXT, "seed": 0} | changes
    return BatchSampler(stream, **arguments)  # type: ignore[arg-type]


def places(batch: Tensor) -> list[int]:
    return [int(window[0]) // CONTEXT for window in batch]


def test_a_batch_is_windows_of_the_stream(stream: TokenStream) -> None:
    batch = make(stream).next_batch()
    assert batch.shape == (3, CONTEXT)
    assert batch.dtype == torch.int64
    assert torch.equal(batch - batch[:, :1], torch.arange(CONTEXT).expand(3, -1))
    assert (batch[:, 0] % CONTEXT == 0).all()


def test_every_window_comes_once_per_epoch_in_a_new_order(stream: TokenStream) -> None:
    sampler = make(stream)
    assert sampler.num_windows == 10
    drawn = [place for _ in range(10) for place in places(sampler.next_batch())]
    epochs = [drawn[:10], drawn[10:20], drawn[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert (sampler.position, sampler.epoch) == (30, 3)


def test_the_order_comes_from_the_seed_alone(stream: TokenStream) -> None:
    first = make(stream).next_batch()
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    again = make(stream)
    assert torch.equal(again.next_batch(), first)
    for _ in range(10):
        again.next_batch()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert not torch.equal(make(stream, seed=1, batch_size=10).next_batch(), make(stream, batch_size=10).next_batch())


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_global_batch(stream: TokenStream, world_size: int) -> None:
    alone = make(stream, batch_size=3 * world_size)
    ranks = [make(stream, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(7):
        together = torch.cat([rank.next_batch() for rank in ranks])
        assert torch.equal(together, alone.next_batch())


def test_a_batch_may_be_larger_than_the_data(stream: TokenStream) -> None:
    drawn = places(make(stream, batch_size=25).next_batch())
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 11])
def test_a_restored_sampler_goes_on_exactly(stream: TokenStream, steps: int) -> None:
    sampler = make(stream)
    for _ in range(steps):
        sampler.next_batch()
    state = json.loads(json.dumps(sampler.state()))
    resumed = make(stream)
    resumed.next_batch()
    resumed.restore(state)
    for _ in range(8):
        assert torch.equal(resumed.next_batch(), sampler.next_batch())


def test_another_batch_and_world_size_go_on_where_the_run_stopped(stream: TokenStream) -> None:
    sampler = make(stream)
    sampler.next_batch()
    halves = [make(stream, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    for half in halves:
        half.restore(sampler.state())
    expected = make(stream, batch_size=7)
    assert torch.equal(torch.cat([half.next_batch() for half in halves]), expected.next_batch()[3:])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"num_windows": 11}, "num_windows"),
        ({"context": 5}, "context"),
        ({"format": 2}, "format"),
    ],
)
def test_a_state_of_another_run_is_refused(stream: TokenStream, change: dict[str, int], name: str) -> None:
    sampler = make(stream)
    with pytest.raises(ValueError, match=rf"^{name}: expected .*; got .*; resume with"):
        sampler.restore(sampler.state() | change)
    with pytest.raises(ValueError, match="position"):
        sampler.restore(sampler.state() | {"position": -1})
    assert sampler.position == 0


def test_validation_is_every_window_in_order(stream: TokenStream) -> None:
    batches = list(valid_batches(stream, batch_size=4, context=CONTEXT))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert places(torch.cat(batches)) == list(range(10))
    assert batches[0].dtype == torch.int64


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [(1, [0]), (12, [0, 3, 6]), (23, [0, 2, 4, 6, 8]), (40, list(range(10))), (10_000, list(range(10)))],
)
def test_a_cap_spreads_the_windows(stream: TokenStream, max_tokens: int, expected: list[int]) -> None:
    batches = valid_batches(stream, batch_size=2, context=CONTEXT, max_tokens=max_tokens)
    assert places(torch.cat(list(batches))) == expected


def test_ranks_share_validation(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, 13 * CONTEXT)
    shares = [
        places(torch.cat(list(valid_batches(stream, batch_size=2, context=CONTEXT, rank=rank, world_size=3))))
        for rank in range(3)
    ]
    assert sorted(place for share in shares for place in share) == list(range(13))
    assert {len(share) for share in shares} == {4, 5}


def test_a_rank_without_a_window_gets_no_batch(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, CONTEXT)
    assert list(valid_batches(stream, batch_size=2, context=CONTEXT, rank=1, world_size=2)) == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"rank": 1}, "rank"),
        ({"rank": -1}, "rank"),
        ({"world_size": 0}, "world_size"),
        ({"context": 43}, "data"),
        ({"context": 1}, "context"),
    ],
)
def test_arguments_out_of_range_are_named(stream: TokenStream, change: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        make(stream, **change)
    if name != "seed":
        arguments = {"batch_size": 3, "context": CONTEXT} | change
        with pytest.raises(ValueError, match=f"^{name}"):
            valid_batches(stream, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_tokens"):
        valid_batches(stream, batch_size=1, context=CONTEXT, max_tokens=0)
