"""`ExitHead` is the function with its arguments kept; the drop-in heads keep the original's interface."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import localexit
from helpers.budget import assert_close
from helpers.cases import RULES, make_inputs, small_rule
from localexit import (
    DenseRandomCompressor,
    ExactParallelExitHead,
    ExitHead,
    FactorizedExitHead,
    HybridTopKTailSketchCompressor,
    exit_cross_entropy,
    exit_step,
    make_feedback,
    orthonormal_columns,
)
from localexit.exits.loss import LossOptions

WIDTH, VOCAB = 9, 40
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.2, "softcap": 3.0}


def made_head(name: str, **options: Any) -> ExitHead:
    head = ExitHead(WIDTH, VOCAB, feedback=small_rule(name, WIDTH, VOCAB), bias=True, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=generator)
    return head


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", RULES)
def test_a_head_is_the_function(name: str, reduction: Any) -> None:
    inputs = make_inputs(7, WIDTH, VOCAB, ignored=2)
    head = made_head(name, reduction=reduction, exit_index=3, **OPTIONS)
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    one, two = (inputs.hidden.clone().requires_grad_() for _ in range(2))
    loss = head(one, inputs.target, token_weight=weights)
    loss.sum().backward()
    same = exit_cross_entropy(
        two,
        head.weight,
        inputs.target,
        feedback=head.feedback,
        linear_bias=head.bias,
        token_weight=weights,
        reduction=reduction,
        exit_index=3,
        **OPTIONS,
    )
    assert isinstance(same, Tensor)
    same.sum().backward()
    assert torch.equal(loss, same)
    assert one.grad is not None
    assert two.grad is not None
    assert torch.equal(one.grad, two.grad)


def test_a_head_passes_on_what_to_ignore_and_to_divide_by() -> None:
    inputs = make_inputs(7, WIDTH, VOCAB)
    inputs.target[:3] = 5
    head = made_head("transport", ignore_index=5)
    mean = head(inputs.hidden, inputs.target)
    assert_close((head(inputs.hidden, inputs.target, num_items=8) * 8).detach(), (mean * 4).detach())


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_are_those_of_the_loss(softcap: float | None) -> None:
    inputs = make_inputs(7, WIDTH, VOCAB)
    head = made_head("dense", softcap=softcap)
    logits = head.logits(inputs.hidden.reshape(7, 1, WIDTH))
    assert logits.shape == (7, 1, VOCAB)
    loss = nn.functional.cross_entropy(logits[:, 0], inputs.target)
    assert_close(loss.detach(), head(inputs.hidden, inputs.target).detach())


def test_a_head_makes_or_shares_its_unembedding() -> None:
    own = ExitHead(WIDTH, VOCAB)
    assert own.feedback.name == "mirror_sampled"
    assert [name for name, _ in own.named_parameters()] == ["weight"]
    assert 0.01 < float(own.weight.detach().std()) < 0.03
    tied = nn.Embedding(VOCAB, WIDTH)
    shared = ExitHead(WIDTH, VOCAB, weight=tied.weight, bias=True, dtype=torch.float32)
    assert shared.weight is tied.weight
    assert shared.bias is not None
    assert not shared.bias.any()
    assert ExitHead(WIDTH, VOCAB, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def test_a_heads_seed_is_its_rules() -> None:
    one, same, other = (ExitHead(WIDTH, VOCAB, feedback="dense", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.feedback.codebook, same.feedback.codebook)
    assert not torch.equal(one.feedback.codebook, other.feedback.codebook)


@pytest.mark.parametrize("mode", ["dense", "hybrid"])
def test_a_drop_in_head_is_converted_with_its_codes_and_keeps_its_gain(mode: Any) -> None:
    head = FactorizedExitHead(WIDTH, VOCAB, mode=mode, rank=6, rank_exact=2, topk=3, alpha_init=0.3).bfloat16()
    dtypes = {name: buffer.dtype for name, buffer in head.named_buffers() if buffer.is_floating_point()}
    assert dtypes.pop("alpha") == torch.float32
    assert float(head.alpha) == pytest.approx(0.3)
    assert len(dtypes) > 1
    assert set(dtypes.values()) == {torch.bfloat16}


def test_a_vocabulary_may_have_one_token() -> None:
    error, target = torch.ones(2, 1), torch.zeros(2, dtype=torch.int64)
    for compressor in (DenseRandomCompressor(1, 2), HybridTopKTailSketchCompressor(1, rank_exact=1, rank_tail=1)):
        assert compressor.compress(error, target).shape == (2, 2)
    for head in (FactorizedExitHead(4, 1, rank=2, rank_exact=1), ExactParallelExitHead(4, 1)):
        assert head(torch.ones(2, 4), torch.ones(1, 4), target).tolist() == [[4], [4]]


@pytest.mark.parametrize("head", [FactorizedExitHead(4, 9, rank=2, rank_exact=1), ExactParallelExitHead(4, 9)])
def test_a_tangent_into_a_drop_in_head_is_refused(head: nn.Module) -> None:
    with forward_ad.dual_level(), pytest.raises(ValueError, match="^h carries a forward-mode tangent"):
        head(forward_ad.make_dual(torch.ones(2, 4), torch.ones(2, 4)), torch.ones(9, 4), torch.tensor([1, 2]))


def test_repr_of_a_head() -> None:
    assert "9, 40, reduction='sum', softcap=3.0" in repr(made_head("dense", reduction="sum", softcap=3.0))


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("batch", [(6,), (2, 3), (1, 2, 3), (0,), (2, 0)])
def test_drop_in_heads_take_any_batch(batch: tuple[int, ...], index_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH, generator=generator)
    targets = torch.randint(VOCAB, batch, generator=generator).to(index_dtype)
    heads: list[nn.Module] = [
        FactorizedExitHead(WIDTH, VOCAB, rank=6, rank_exact=2, topk=3),
        FactorizedExitHead(WIDTH, VOCAB, mode="dense", rank=6),
        *(ExactParallelExitHead(WIDTH, VOCAB, mode=m, residual_rank=4) for m in ("parallel_only", "parallel_topmass")),
    ]
    for head in heads:
        h = torch.randn(*batch, WIDTH, generator=generator, requires_grad=True)
        logits = head(h, weight, targets)
        assert torch.equal(logits, h @ weight.T)
        logits.logsumexp(-1).sum().backward()
        assert h.grad is not None
        assert h.grad.shape == h.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_compressors_keep_shape_and_dtype(dtype: torch.dtype) -> None:
    error = torch.randn(2, 3, VOCAB, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(6).reshape(2, 3)
    for compressor in (
        DenseRandomCompressor(VOCAB, 5),
        HybridTopKTailSketchCompressor(VOCAB, rank_exact=2, rank_tail=3),
    ):
        code = compressor.compress(error, targets)
        assert code.shape == (2, 3, compressor.rank) == (2, 3, 5)
        assert code.dtype == dtype
        assert not code.requires_grad


@pytest.mark.parametrize(
    "compressor",
    [DenseRandomCompressor(VOCAB, 5, seed=0), HybridTopKTailSketchCompressor(VOCAB, rank_exact=2, rank_tail=3, seed=0)],
    ids=["dense", "hybrid"],
)
def test_autocast_does_not_change_a_compressors_sums(compressor: Any) -> None:
    error, targets = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = compressor.compress(error, targets)
    exact = compressor.compress(error.double(), targets)
    torch.testing.assert_close(inside.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_compressor_may_leave_a_part_out() -> None:
    error, targets = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    gold_alone = HybridTopKTailSketchCompressor(VOCAB, rank_exact=4, rank_tail=0, topk=0, seed=0)
    expected = error[torch.arange(6), targets, None] * gold_alone.exact_codes[targets]
    torch.testing.assert_close(gold_alone.compress(error, targets), expected)


@pytest.mark.parametrize("mode", ["dense", "hybrid"])
def test_the_first_id_past_the_vocabulary_is_refused(mode: Any) -> None:
    head = FactorizedExitHead(WIDTH, VOCAB, mode=mode, rank=4, rank_exact=2)
    with pytest.raises(ValueError, match=f"target has 1 values outside 0..{VOCAB - 1}"):
        head(torch.zeros(2, WIDTH), torch.zeros(VOCAB, WIDTH), torch.tensor([VOCAB - 1, VOCAB]))


def test_one_orthonormal_column_of_one_number() -> None:
    torch.testing.assert_close(orthonormal_columns(1, 1, seed=0).abs(), torch.ones(1, 1))


@pytest.mark.parametrize("other", [exit_step, ExitHead, LossOptions])
def test_options_of_the_loss_have_the_same_defaults_everywhere(other: Any) -> None:
    expected, found = (inspect.signature(each).parameters for each in (exit_cross_entropy, other))
    for option in fields(LossOptions):
        assert found[option.name].default == expected[option.name].default, option.name


def test_an_update_of_a_head_is_one_of_its_rule() -> None:
    head = made_head("dense")
    head.update()
    assert int(head.feedback.step) == 1


def test_a_forgotten_update_of_a_head_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror that never learns feeds back zero, and only W would be trained."""
    monkeypatch.setattr(localexit.feedback.base, "FORWARDS_WITHOUT_UPDATE", 3)
    first = ExitHead(8, 11)
    second = ExitHead(8, 11, feedback=first.feedback, exit_index=1)
    hidden, targets = torch.randn(4, 8), torch.arange(4)

    def step() -> None:
        first(hidden, targets)
        second(hidden, targets)

    step()
    step()
    second.update()
    step()
    step()
    with torch.no_grad():
        step()
    first.eval()(hidden, targets)
    first.train()
    with pytest.warns(UserWarning, match=r"3 training forwards without update\(\).*'mirror_sampled' learns"):
        first(hidden, targets)
    with pytest.warns(UserWarning, match="without update"):
        second(hidden, targets)


@pytest.mark.parametrize("function", [exit_cross_entropy, exit_step])
def test_a_forgotten_update_is_noticed_in_a_loop_of_ones_own(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localexit.feedback.base, "FORWARDS_WITHOUT_UPDATE", 3)
    rule = make_feedback("anchors_shared", 8, 11)
    hidden, weight, targets = torch.randn(4, 8), torch.randn(11, 8), torch.arange(4)

    def call() -> None:
        function(hidden, weight, targets, feedback=rule)

    for end in (rule.update, rule.discard):
        call()
        call()
        end()
    call()
    call()
    rule.eval()
    call()
    rule.train()
    with pytest.warns(UserWarning, match=r"3 training forwards without update\(\).*'anchors_shared'") as found:
        call()
    assert found[0].filename == __file__


def test_a_compressor_computes_what_its_head_feeds_back() -> None:
    inputs = make_inputs(7, WIDTH, VOCAB)
    head = FactorizedExitHead(WIDTH, VOCAB, rank=6, rank_exact=2, topk=3, alpha_init=0.5).double()
    h = inputs.hidden.requires_grad_()
    logits = head(h, inputs.weight, inputs.target)
    logits.retain_grad()
    nn.functional.cross_entropy(logits, inputs.target).backward()
    assert logits.grad is not None
    assert h.grad is not None
    code = head.compressor.compress(logits.grad, inputs.target)
    assert_close(h.grad, 0.5 * code @ head.U.T, tolerance=1e-12)


def test_drop_in_heads_by_default() -> None:
    """The original's numbers."""
    factorized = FactorizedExitHead(200, VOCAB)
    codes = factorized.compressor
    assert isinstance(codes, HybridTopKTailSketchCompressor)
    assert (factorized.U.shape, codes.exact_codes.shape, codes.rank_tail, codes.topk) == (
        (200, 128),
        (VOCAB, 32),
        96,
        8,
    )
    alone = HybridTopKTailSketchCompressor(VOCAB)
    assert (alone.rank_exact, alone.rank_tail, alone.topk) == (32, 96, 8)
    assert float(factorized.alpha) == 1
    assert ExactParallelExitHead(200, VOCAB).mode == "parallel_only"
    assert ExactParallelExitHead(200, VOCAB, mode="parallel_gold").Q_base.shape == (200, 32)
