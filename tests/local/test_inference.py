"""What exits are good for outside of training: evaluation and logits at any exit, with a cache."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.largest import Largest
from local.decoders import DECODERS, batch, build
from local.explicit import parts_of
from local.rules import attached
from localexit import make_feedback
from localexit.local.bodies import BlockCall
from localexit.local.exits import Exit, Readout
from localexit.local.predict import PredictionStep
from localexit.local.steps import LossSettings
from localexit.local.trace import cache_argument


def explicit_logits(name: str, model: nn.Module, ids: Tensor) -> list[Tensor]:
    parts = parts_of(name, model)
    hidden, extras = parts.embed(ids)
    logits = []
    for block in parts.blocks:
        hidden = parts.run(block, hidden, *extras)
        logits.append(parts.head(parts.norm(hidden)))
    return logits


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_logits_at_every_exit(name: str) -> None:
    model = build(name).eval()
    local = attached(model)
    ids, _ = batch()
    expected = explicit_logits(name, model, ids)
    for exit_index in range(3):
        torch.testing.assert_close(local.exit_logits(exit_index, ids), expected[exit_index], rtol=1e-12, atol=1e-12)
        assert torch.equal(local.exit_logits(exit_index - 3, input_ids=ids), local.exit_logits(exit_index, ids))
    model_logits = model(ids)
    assert torch.equal(local.exit_logits(-1, ids), getattr(model_logits, "logits", model_logits))


def test_later_blocks_are_not_run() -> None:
    model = build("llama")
    local = attached(model)
    ran: list[int] = []
    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    assert not local.exit_logits(1, batch()[0]).requires_grad
    assert ran == [0, 1]


def test_logits_of_the_last_positions_only() -> None:
    local = attached(build("llama").eval())
    ids, _ = batch()
    # Not bitwise: a product with fewer rows may add up in another order.
    torch.testing.assert_close(
        local.exit_logits(0, ids, logits_to_keep=2), local.exit_logits(0, ids)[:, -2:], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("exit_index", [0, 1, -1])
def test_a_cache_filled_up_to_an_exit_gives_the_same_logits(name: str, exit_index: int) -> None:
    from transformers import DynamicCache

    local = attached(build(name).eval())
    ids, _ = batch()
    whole = local.exit_logits(exit_index, ids)
    cache = DynamicCache(config=local.model.config)
    pieces = [
        local.exit_logits(exit_index, piece, **{str(cache_argument(local.model)): cache}, use_cache=True)
        for piece in (ids[:, :3], ids[:, 3:4], ids[:, 4:])
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-10, atol=1e-10)
    lengths = [cache.get_seq_length(layer) for layer in range(3)]
    num_run = exit_index % 3 + 1
    assert lengths == [ids.shape[1]] * num_run + [0] * (3 - num_run)


@pytest.mark.parametrize("exit_index", [3, -4])
def test_exits_that_do_not_exist(exit_index: int) -> None:
    with pytest.raises(ValueError, match=rf"exit must be in -3\.\.2, got {exit_index}"):
        attached(build("plain")).exit_logits(exit_index, batch()[0])


def test_a_cache_that_nobody_could_read_is_refused() -> None:
    local = attached(build("llama"))
    with pytest.raises(ValueError, match=f"use_cache=True needs {cache_argument(local.model)}="):
        local.exit_logits(0, batch()[0], use_cache=True)


class Renamed(nn.Module):
    """A model whose forward calls the cache as newer ones of `transformers` do."""

    def forward(self, input_ids: torch.Tensor, cache: object = None, use_cache: bool = False) -> None: ...


class Cached(nn.Module):
    """One with a cache of its own kind."""

    def forward(self, input_ids: torch.Tensor, cache: object = None) -> None: ...


def test_the_argument_for_the_cache_is_found() -> None:
    old = Version(transformers.__version__) < Version("5.24")
    assert cache_argument(build("llama")) == ("past_key_values" if old else "cache")
    assert cache_argument(Renamed()) == "cache"
    assert cache_argument(Cached()) is None
    assert cache_argument(build("plain")) is None


@pytest.mark.parametrize("name", DECODERS)
def test_evaluation_of_every_exit(name: str) -> None:
    model = build(name)
    local = attached(model)
    ids, labels = batch()
    got = local.evaluate(ids, labels)
    target = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1).flatten()
    counted = target != -100
    for index, logits in enumerate(explicit_logits(name, model, ids)):
        flat = logits.flatten(0, 1)
        torch.testing.assert_close(got.loss[index], nn.functional.cross_entropy(flat, target))
        accuracy = (flat.argmax(-1) == target)[counted].double().mean()
        torch.testing.assert_close(got.accuracy[index].double(), accuracy, rtol=1e-6, atol=0)
    assert int(got.num_tokens) == int(counted.sum())
    assert not got.loss.requires_grad


def test_a_run_of_units_reads_for_whom_it_is_asked() -> None:
    ids, _ = batch()
    local = attached(build("plain")).eval()
    with torch.no_grad():
        states, unread = local.run_units(0, 1, ids), local.run_units(0, 1, ids, reading=())
    assert unread.read is None
    assert torch.equal(unread.hidden, states.hidden)
    assert torch.equal(local.logits_from(1, states.read), local.exit_logits(1, ids))


def test_predictions_are_those_of_the_logits_at_every_exit() -> None:
    ids, labels = batch()
    local = attached(build("plain"))
    found = local.predictions(ids, labels)
    target = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    log_prob = torch.stack([local.exit_logits(index, ids) for index in range(3)]).log_softmax(-1)
    assert torch.equal(found.token, log_prob.argmax(-1))
    torch.testing.assert_close(found.confidence, log_prob.amax(-1).exp())
    assert torch.equal(found.target, target)
    assert torch.equal(found.is_counted, target != -100)
    of_target = log_prob.gather(-1, target.clamp_min(0).expand(3, -1, -1)[..., None])[..., 0]
    torch.testing.assert_close(found.log_prob, of_target * (target != -100))


def test_evaluation_switches_dropout_off_and_training_back_on() -> None:
    model = build("gpt2")
    model.transformer.drop.p = 0.5
    model.transformer.h[1].eval()
    local = attached(model)
    first, second = (local.evaluate(*batch()).loss for _ in range(2))
    assert torch.equal(first, second)
    assert model.training
    assert model.transformer.drop.training
    assert not model.transformer.h[1].training


@pytest.mark.parametrize(("vocab_size", "num_tokens"), [(2**16, 1024), (2**24, 4)])
def test_predictions_take_logits_of_64_mebibytes_at_a_time(vocab_size: int, num_tokens: int) -> None:
    """All at once they would be 256 MiB. Of the larger vocabulary that is one token at a time."""
    with FakeTensorMode(), Largest() as made:
        readout = Readout(unembedding=nn.Linear(8, vocab_size, bias=False), scale=1.0, softcap=None)
        settings = LossSettings(
            readout=readout, feedback=make_feedback("parallel", 8, vocab_size), label_smoothing=0.0, z_loss=0.0
        )
        step = PredictionStep(settings=settings, last_exit=0, target=torch.zeros(2, num_tokens // 2, dtype=torch.int64))
        call = BlockCall(block=nn.Identity(), args=(), kwargs={}, hidden=torch.empty(2, num_tokens // 2, 8))
        made.num_bytes = 0
        step.at_exit(Exit(index=0, block_index=0, norm=()), call)
        assert step.output().token.shape == (1, 2, num_tokens // 2)
    assert made.num_bytes == 64 * 2**20


def test_evaluation_teaches_a_mirror_nothing() -> None:
    local = attached(build("plain"), "mirror")
    rows = local.feedback.rows.clone()
    local.evaluate(*batch())
    local.update()
    assert torch.equal(local.feedback.rows, rows)
