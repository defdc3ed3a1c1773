"""The exit as an operator, eager: feedback is what reaches the hidden state, whatever is wrapped around the call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from exits.canaries import (
    CLOSE,
    FAR,
    HEADS,
    NUM_TOKENS,
    RULES,
    STATEFUL_RULES,
    VOCAB,
    WIDTH,
    assert_feedback,
    head_loss,
    make_case,
    make_head,
    make_rule,
    relative_error,
)
from localexit import ExitHead, exit_cross_entropy, exit_step
from localexit.exits import chunked, operators
from localexit.exits.chunked import PLAIN
from localexit.exits.functional import ExitStats
from localexit.exits.head_operators import exit_logits, exit_logits_backward
from localexit.exits.operators import exit_loss, scale_gradients, tiled_gradients
from localexit.feedback import WeightMirror
from localexit.feedback.draws import choose_rows, stratified_uniforms


def random_upstream(num_tokens: int = NUM_TOKENS) -> Tensor:
    """One upstream number a token, of either sign."""
    return torch.randn(num_tokens, generator=torch.Generator().manual_seed(11))


class TestFeedbackIsUsed:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("name", RULES)
    def test_reduced(self, name: str, reduction: str) -> None:
        case = make_case(name)
        hidden, weight = case.leaves()
        loss = exit_cross_entropy(hidden, weight, case.target, feedback=case.rule, reduction=reduction)
        # Not 1: an upstream gradient that is dropped would show.
        (-2.5 * loss).backward()
        oracle = case.oracle(reduction=reduction)
        assert relative_error(loss, oracle.loss) < CLOSE
        assert_feedback(case, hidden.grad / -2.5, reduction=reduction)
        assert relative_error(weight.grad / -2.5, oracle.weight_grad) < CLOSE

    @pytest.mark.parametrize("name", RULES)
    def test_one_upstream_number_a_token(self, name: str) -> None:
        case = make_case(name)
        hidden, weight = case.leaves()
        losses = exit_cross_entropy(hidden, weight, case.target, feedback=case.rule, reduction="none")
        losses.backward(random_upstream())
        options = {"reduction": "none", "upstream": random_upstream()}
        assert_feedback(case, hidden.grad, **options)
        assert relative_error(weight.grad, case.oracle(**options).weight_grad) < CLOSE
        assert not hidden.grad[case.target == -100].any()

    @pytest.mark.parametrize("name", RULES)
    def test_statistics_change_no_gradient(self, name: str) -> None:
        case = make_case(name)
        grads = []
        for return_stats in (False, True):
            leaves = case.leaves()
            out = exit_cross_entropy(*leaves, case.target, feedback=case.rule, return_stats=return_stats)
            loss = out[0] if return_stats else out
            grads.append(torch.autograd.grad(loss, leaves))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_statistics_are_detached(self) -> None:
        case = make_case("dense")
        _, stats = exit_cross_entropy(*case.leaves(), case.target, feedback=case.rule, return_stats=True)
        tensors = [value for f in fields(ExitStats) if isinstance(value := getattr(stats, f.name), Tensor)]
        assert len(tensors) == 8
        assert not any(tensor.requires_grad for tensor in tensors)

    @pytest.mark.parametrize("name", RULES)
    def test_head_module(self, name: str) -> None:
        case = make_case(name)
        hidden, _ = case.leaves()
        head = ExitHead(WIDTH, VOCAB, feedback=case.rule, weight=torch.nn.Parameter(case.weight))
        head(hidden, case.target).backward()
        assert_feedback(case, hidden.grad)
        assert relative_error(head.weight.grad, case.oracle().weight_grad) < CLOSE

    @pytest.mark.parametrize("name", RULES)
    def test_step_gives_the_same_without_autograd(self, name: str) -> None:
        case = make_case(name)
        leaves = case.leaves()
        loss = exit_cross_entropy(*leaves, case.target, feedback=case.rule)
        expected = torch.autograd.grad(loss, leaves)
        grad_weight = torch.zeros(VOCAB, WIDTH)
        step = exit_step(case.hidden, case.weight, case.target, feedback=case.rule, grad_weight=grad_weight)
        assert torch.equal(step.loss, loss)
        assert torch.equal(step.feedback, expected[0])
        assert torch.equal(grad_weight, expected[1])

    @pytest.mark.parametrize("mode", HEADS)
    def test_drop_in_head(self, mode: str) -> None:
        case = make_case("dense")
        leaves, plain = case.leaves(), case.leaves()
        feedback, weight_grad = torch.autograd.grad(head_loss(make_head(mode), *leaves, case.target), leaves)
        loss = torch.nn.functional.cross_entropy(plain[0] @ plain[1].T, case.target)
        true_gradient, true_weight_grad = torch.autograd.grad(loss, plain)
        assert relative_error(feedback, true_gradient) > FAR
        assert relative_error(weight_grad, true_weight_grad) < CLOSE


# Said by torch of its own code, from 2.14 on.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
class TestOtherKindsOfDifferentiation:
    """Where the feedback cannot be used, there is an error: never another gradient, never silence."""

    @pytest.mark.parametrize("mode", [None, *HEADS])
    @pytest.mark.parametrize(
        "transform",
        [torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian, torch.func.vmap],
        ids=lambda transform: transform.__name__,
    )
    def test_function_transforms_raise(self, transform: Callable[..., Any], mode: str | None) -> None:
        case = make_case("dense")
        head = None if mode is None else make_head(mode)

        def loss(hidden: Tensor) -> Tensor:
            if head is None:
                return exit_cross_entropy(hidden, case.weight, case.target, feedback=case.rule)
            return head_loss(head, hidden, case.weight, case.target)

        batched = case.hidden[None] if transform is torch.func.vmap else case.hidden
        with pytest.raises((RuntimeError, ValueError), match="functorch|forward-mode|Batching rule"):
            transform(loss)(batched)

    @pytest.mark.parametrize("argument", ["input", "linear_weight", "linear_bias", "token_weight"])
    def test_forward_mode_tangents_raise(self, argument: str) -> None:
        case = make_case("dense")
        arguments = {
            "input": case.hidden,
            "linear_weight": case.weight,
            "linear_bias": torch.zeros(VOCAB),
            "token_weight": torch.ones(NUM_TOKENS),
        }
        with forward_ad.dual_level(), pytest.raises(ValueError, match=f"^{argument} carries a forward-mode tangent"):
            arguments[argument] = forward_ad.make_dual(arguments[argument], torch.ones_like(arguments[argument]))
            exit_cross_entropy(**arguments, target=case.target, feedback=case.rule)

    @pytest.mark.parametrize("preset", ["fast", "memory"])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("wrt", ["hidden", "weight"])
    def test_second_differentiation_raises(self, wrt: str, reduction: str, preset: str) -> None:
        case = make_case("dense")
        leaves = dict(zip(("hidden", "weight"), case.leaves(), strict=True))
        options = {"reduction": reduction, "preset": preset}
        loss = exit_cross_entropy(*leaves.values(), case.target, feedback=case.rule, **options).sum()
        (first,) = torch.autograd.grad(loss.square(), leaves[wrt], create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            first.square().sum().backward()

    @pytest.mark.parametrize("mode", HEADS)
    def test_second_differentiation_of_a_drop_in_head_raises(self, mode: str) -> None:
        case = make_case("dense")
        hidden, weight = case.leaves()
        loss = head_loss(make_head(mode), hidden, weight, case.target)
        (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            first.sum().backward()

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_second_backward_repeats_the_first(self, reduction: str) -> None:
        case = make_case("mirror_sampled")
        leaves = case.leaves()
        loss = exit_cross_entropy(*leaves, case.target, feedback=case.rule, reduction=reduction).sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves, retain_graph=True)
        scaled = torch.autograd.grad(loss, leaves, 4 * torch.ones_like(loss))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        # A power of two scales without rounding.
        assert all(torch.equal(4 * a, b) for a, b in zip(first, scaled, strict=True))

    def test_no_gradient_from_above(self) -> None:
        # A function behind the loss may have nothing to give back.
        class Nothing(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, loss: Tensor) -> Tensor:
                ctx.shape = loss.shape
                return loss.clone()

            @staticmethod
            def backward(ctx: Any, upstream: Tensor) -> None:
                assert upstream.shape == ctx.shape

        case = make_case("dense")
        hidden, weight = case.leaves()
        Nothing.apply(exit_cross_entropy(hidden, weight, case.target, feedback=case.rule)).backward()
        assert hidden.grad is None
        assert weight.grad is None

    def test_backward_twice_without_retain_graph_raises(self) -> None:
        case = make_case("dense")
        loss = exit_cross_entropy(*case.leaves(), case.target, feedback=case.rule)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()

    def test_editing_the_weight_before_the_backward_raises(self) -> None:
        # reduction="none" reads the weight again in the backward: an optimiser step in between must not go unseen.
        case = make_case("dense")
        hidden, weight = case.leaves()
        losses = exit_cross_entropy(hidden, weight, case.target, feedback=case.rule, reduction="none")
        with torch.no_grad():
            weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses.sum().backward()

    def test_updating_the_mirror_before_the_backward_raises(self) -> None:
        case = make_case("mirror")
        losses = exit_cross_entropy(*case.leaves(), case.target, feedback=case.rule, reduction="none")
        case.rule.update()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses.sum().backward()


class TestCheckpoint:
    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("name", RULES)
    def test_recomputation_gives_the_same(self, name: str, use_reentrant: bool) -> None:
        case = make_case(name)
        hidden, weight = case.leaves()

        def block(hidden: Tensor) -> Tensor:
            return exit_cross_entropy(1.0 * hidden, weight, case.target, feedback=case.rule)

        checkpoint(block, hidden, use_reentrant=use_reentrant).backward()
        assert_feedback(case, hidden.grad)
        assert relative_error(weight.grad, case.oracle().weight_grad) < CLOSE

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_recomputation_adds_no_pairs(self, use_reentrant: bool) -> None:
        plain, recomputed = make_case("mirror"), make_case("mirror")
        hidden, weight = plain.leaves()
        exit_cross_entropy(hidden, weight, plain.target, feedback=plain.rule).backward()

        def block(hidden: Tensor) -> Tensor:
            return exit_cross_entropy(hidden, weight, recomputed.target, feedback=recomputed.rule)

        checkpoint(block, hidden, use_reentrant=use_reentrant).backward()
        before = recomputed.rule.rows.clone()
        for case in (plain, recomputed):
            case.rule.update()
        assert not torch.equal(recomputed.rule.rows, before)
        assert torch.equal(recomputed.rule.rows, plain.rule.rows)


class TestMirrorPairs:
    def test_collected_in_training_only(self) -> None:
        case = make_case("mirror")
        hidden, weight = case.leaves()
        before = case.rule.rows.clone()

        def run_and_update() -> bool:
            exit_cross_entropy(hidden, weight, case.target, feedback=case.rule)
            case.rule.update()
            return not torch.equal(case.rule.rows, before)

        with torch.no_grad():
            assert not run_and_update()
        with torch.inference_mode():
            assert not run_and_update()
        case.rule.eval()
        assert not run_and_update()
        case.rule.train()
        assert run_and_update()

    def test_an_update_without_pairs_moves_the_step_only(self) -> None:
        rule = make_rule("mirror")
        before = rule.rows.clone()
        rule.update()
        assert int(rule.step) == 1
        assert torch.equal(rule.rows, before)

    def test_autocast_does_not_round_pairs(self) -> None:
        learned = []
        for is_enabled in (False, True):
            case = make_case("mirror")
            with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
                exit_cross_entropy(*case.leaves(), case.target, feedback=case.rule)
            case.rule.update()
            learned.append(case.rule.rows)
        assert torch.equal(*learned)


class TestAutocast:
    @pytest.mark.parametrize("name", RULES)
    def test_master_weights(self, name: str) -> None:
        """fp32 master W, bf16 h: the products are bf16 ones, everything summed stays fp32, dW comes back fp32."""
        case = make_case(name)
        hidden, weight = case.leaves()
        with torch.autocast("cpu", torch.bfloat16):
            half = hidden.bfloat16()
            loss = exit_cross_entropy(half, weight, case.target, feedback=case.rule)
        loss.backward()
        assert loss.dtype == torch.float32
        assert weight.grad.dtype == torch.float32
        assert not torch.equal(weight.grad, weight.grad.bfloat16().float())
        rounded = replace(case, hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16())
        rule = rounded.rule
        if rule.needs_weight:
            # The exact baseline reads the master weights, cast like the products' operands.
            rounded = replace(rounded, weight=case.weight.bfloat16().float())
        expected = rounded.oracle()
        assert relative_error(hidden.grad, expected.feedback) < 2e-2
        assert relative_error(weight.grad, expected.weight_grad) < 1e-2

    @pytest.mark.parametrize("name", ["dense", "hybrid", "anchors", "mirror_sampled"])
    def test_region_decides_nothing_else(self, name: str) -> None:
        """Inside a region or out of it, with the same dtypes: bitwise the same. Nothing inside is cast again."""
        case = make_case(name, dtype=torch.bfloat16)
        results = []
        for is_enabled in (False, True):
            leaves = case.leaves()
            with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
                loss = exit_cross_entropy(*leaves, case.target, feedback=case.rule)
                grads = torch.autograd.grad(loss, leaves)
            results.append((loss, *grads))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_backward_inside_or_outside_the_region(self, reduction: str) -> None:
        case = make_case("dense")
        results = []
        for is_inside in (False, True):
            leaves = case.leaves()
            with torch.autocast("cpu", torch.bfloat16):
                loss = exit_cross_entropy(*leaves, case.target, feedback=case.rule, reduction=reduction)
                if is_inside:
                    loss.backward(torch.ones_like(loss))
            if not is_inside:
                loss.backward(torch.ones_like(loss))
            results.append([leaf.grad for leaf in leaves])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_fp64_is_left_alone(self) -> None:
        case = make_case("dense", dtype=torch.float64)
        hidden, weight = case.leaves()
        with torch.autocast("cpu", torch.bfloat16):
            loss = exit_cross_entropy(hidden, weight, case.target, feedback=case.rule)
        loss.backward()
        assert loss.dtype == torch.float64
        assert relative_error(weight.grad, case.oracle().weight_grad) < 1e-14

    def test_step(self) -> None:
        case = make_case("dense")
        hidden, weight = case.leaves()
        grad_weight = torch.zeros(VOCAB, WIDTH)
        with torch.autocast("cpu", torch.bfloat16):
            loss = exit_cross_entropy(hidden, weight, case.target, feedback=case.rule)
            step = exit_step(case.hidden, case.weight, case.target, feedback=case.rule, grad_weight=grad_weight)
        loss.backward()
        assert torch.equal(step.feedback, hidden.grad)
        assert torch.equal(grad_weight, weight.grad)

    @pytest.mark.parametrize("mode", HEADS)
    def test_drop_in_head(self, mode: str) -> None:
        case = make_case("dense")
        leaves = case.leaves()
        with torch.autocast("cpu", torch.bfloat16):
            logits = make_head(mode)(*leaves, case.target)
            assert logits.dtype == torch.bfloat16
            upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
            feedback, weight_grad = torch.autograd.grad(logits, leaves, upstream)
        # Backward sums in fp32, also inside the region: what is left is the rounding of the logits.
        assert (feedback.dtype, weight_grad.dtype) == (torch.float32, torch.float32)
        assert relative_error(weight_grad, upstream.double().T @ case.hidden.double()) < CLOSE


class TestLossScaling:
    @pytest.mark.parametrize("name", RULES)
    def test_fp16_with_a_scaler(self, name: str) -> None:
        """fp16 everywhere, a mean over 16384 tokens, upstream 65536: 1/16384 of an error would underflow in fp16."""
        case = make_case(name, dtype=torch.float16)
        hidden, weight = case.leaves()
        loss = exit_cross_entropy(hidden, weight, case.target, feedback=case.rule, num_items=16384)
        (65536 * loss).backward()
        expected = case.oracle(num_items=16384)
        eps = torch.finfo(torch.float16).eps
        assert loss.dtype == torch.float32
        # Half an eps for storing the gradient; as much again for logits that were rounded to fp16.
        assert relative_error(hidden.grad, 65536 * expected.feedback) < 2 * eps
        assert relative_error(weight.grad, 65536 * expected.weight_grad) < 2 * eps

    @pytest.mark.parametrize("name", RULES)
    def test_without_scaling_small_errors_survive_the_forward(self, name: str) -> None:
        # Finished gradients wait in fp32 for the upstream factor, and nothing before them is rounded to fp16.
        case = make_case(name, dtype=torch.float16)
        hidden, _ = case.leaves()
        loss = exit_cross_entropy(hidden, case.weight, case.target, feedback=case.rule, num_items=2**30)
        (2.0**30 * loss).backward()
        reference = case.oracle(reduction="sum")
        assert relative_error(hidden.grad, reference.feedback) < 2 * torch.finfo(torch.float16).eps

    def test_grad_scaler(self) -> None:
        case = make_case("dense", dtype=torch.float32)
        weight = torch.nn.Parameter(case.weight.clone())
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
        hidden = case.hidden.half()
        loss = exit_cross_entropy(hidden, weight, case.target, feedback=case.rule, num_items=16384)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        rounded = replace(case, hidden=hidden)
        assert relative_error(case.weight - weight.detach(), rounded.oracle(num_items=16384).weight_grad) < 1e-2

    @pytest.mark.parametrize("init_scale", [2.0**16, 2.0**40])
    def test_a_scaler_sees_feedback_that_overflows(self, init_scale: float) -> None:
        """Feedback beyond what fp16 can hold arrives as infinity, and the scaler leaves the step out."""
        case = make_case("dense")
        block = torch.nn.Parameter(case.hidden.clone())
        optimizer = torch.optim.SGD([block], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        loss = exit_cross_entropy(block.half(), case.weight.half(), case.target, feedback=case.rule)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        is_left_out = init_scale > 2.0**16
        assert torch.equal(block.detach(), case.hidden) == is_left_out
        assert (scaler.get_scale() < init_scale) == is_left_out


@pytest.fixture
def stage_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each stage of the loop ran."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        stage = getattr(PLAIN, name)

        def run(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            calls["error"] += bool(options.get("need_error"))
            return stage(*args, **options)

        return run

    stages = ("logits", "loss_and_error", "add_weight_grad", "feedback")
    counting = replace(PLAIN, **{name: counted(name) for name in stages})
    monkeypatch.setattr(operators, "stages_of", lambda _: counting)
    return calls


class TestWorkThatIsNotNeeded:
    def test_everything(self, stage_calls: Counter[str]) -> None:
        case = make_case("dense")
        exit_cross_entropy(*case.leaves(), case.target, feedback=case.rule).backward()
        assert stage_calls == Counter(logits=1, loss_and_error=1, error=1, add_weight_grad=1, feedback=1)

    def test_frozen_hidden(self, stage_calls: Counter[str]) -> None:
        case = make_case("dense")
        _, weight = case.leaves()
        exit_cross_entropy(case.hidden, weight, case.target, feedback=case.rule).backward()
        assert stage_calls["feedback"] == 0
        assert stage_calls["add_weight_grad"] == 1
        assert relative_error(weight.grad, case.oracle().weight_grad) < CLOSE

    def test_frozen_weight(self, stage_calls: Counter[str]) -> None:
        case = make_case("dense")
        hidden, _ = case.leaves()
        exit_cross_entropy(hidden, case.weight, case.target, feedback=case.rule).backward()
        assert stage_calls["add_weight_grad"] == 0
        assert stage_calls["feedback"] == 1
        assert_feedback(case, hidden.grad)

    def test_only_the_bias_learns(self, stage_calls: Counter[str]) -> None:
        case = make_case("dense")
        bias = torch.zeros(VOCAB, requires_grad=True)
        exit_cross_entropy(case.hidden, case.weight, case.target, feedback=case.rule, linear_bias=bias).backward()
        assert stage_calls["add_weight_grad"] == stage_calls["feedback"] == 0
        assert relative_error(bias.grad, case.oracle().bias_grad) < CLOSE

    @pytest.mark.parametrize("region", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("name", RULES)
    def test_loss_only(
        self, name: str, region: Callable[[], AbstractContextManager[None]], stage_calls: Counter[str]
    ) -> None:
        case = make_case(name)
        with region():
            loss = exit_cross_entropy(*case.leaves(), case.target, feedback=case.rule)
        assert stage_calls == Counter(logits=1, loss_and_error=1, error=0)
        assert not loss.requires_grad
        assert relative_error(loss, case.oracle().loss) < CLOSE

    def test_nothing_learns(self, stage_calls: Counter[str]) -> None:
        case = make_case("dense")
        exit_cross_entropy(case.hidden, case.weight, case.target, feedback=case.rule)
        assert stage_calls == Counter(logits=1, loss_and_error=1, error=0)

    def test_the_memory_preset_lends_to_chunks_what_dw_takes_later(
        self, monkeypatch: pytest.MonkeyPatch, stage_calls: Counter[str]
    ) -> None:
        """Nothing where the weight is frozen: six chunks of four tokens then, and else all tokens in one."""
        monkeypatch.setattr(chunked, "_MEMORY_PRESET_CHUNK_BYTES", 4 * 4 * VOCAB)
        case = make_case("dense")
        num_chunks = []
        for weight in (case.weight, case.weight.clone().requires_grad_()):
            stage_calls.clear()
            exit_cross_entropy(case.hidden.requires_grad_(), weight, case.target, feedback=case.rule, preset="memory")
            num_chunks.append(stage_calls["logits"])
        assert num_chunks == [-(-NUM_TOKENS // 4), -(-NUM_TOKENS // (4 + WIDTH))]

    def test_upstream_per_token_recomputes_once(self, stage_calls: Counter[str]) -> None:
        case = make_case("dense")
        losses = exit_cross_entropy(*case.leaves(), case.target, feedback=case.rule, reduction="none")
        assert stage_calls == Counter(logits=1, loss_and_error=1, error=0)
        losses.sum().backward()
        assert stage_calls == Counter(logits=2, loss_and_error=2, error=1, add_weight_grad=1, feedback=1)


class TestTokenWeight:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("name", ["dense", "anchors"])
    def test_its_gradient_is_the_loss_of_its_token(self, name: str, reduction: str) -> None:
        # Of a rule with tensors of its own, and of one without.
        case = make_case(name)
        token_weight = random_upstream().requires_grad_()
        loss = exit_cross_entropy(
            *case.leaves(), case.target, feedback=case.rule, token_weight=token_weight, reduction=reduction
        )
        loss.sum().backward()
        count = int((case.target != -100).sum()) if reduction == "mean" else 1
        expected = case.oracle().row_loss / count
        assert relative_error(token_weight.grad, expected) < CLOSE
        assert not token_weight.grad[case.target == -100].any()

    def test_alone(self) -> None:
        # Neither hidden nor weight learn: the loss still depends on the token weights.
        case = make_case("dense")
        token_weight = torch.ones(NUM_TOKENS, requires_grad=True)
        loss = exit_cross_entropy(
            case.hidden, case.weight, case.target, feedback=case.rule, token_weight=token_weight, reduction="sum"
        )
        loss.backward()
        assert relative_error(token_weight.grad, case.oracle().row_loss) < CLOSE

    @pytest.mark.parametrize("name", RULES)
    def test_negative_weights(self, name: str) -> None:
        case = make_case(name)
        hidden, weight = case.leaves()
        options = {"token_weight": random_upstream()}
        exit_cross_entropy(hidden, weight, case.target, feedback=case.rule, **options).backward()
        assert_feedback(case, hidden.grad, **options)
        assert relative_error(weight.grad, case.oracle(**options).weight_grad) < CLOSE


class TestTargetRange:
    @pytest.mark.parametrize("bad", [VOCAB, -1, 2**31])
    def test_out_of_range_on_the_cpu(self, bad: int) -> None:
        case = make_case("dense")
        case.target[3] = bad
        with pytest.raises(ValueError, match=f"target has 1 values outside 0..{VOCAB - 1}, the first is {bad}"):
            exit_cross_entropy(*case.leaves(), case.target, feedback=case.rule)


def loss_arguments(name: str, **changes: Any) -> tuple[Any, ...]:
    """Arguments of the operator `exit_loss`, by name so that a test can change some."""
    case = make_case(name, dtype=changes.pop("dtype", torch.float32))
    hidden, weight = case.leaves()
    rule, is_counted = case.rule, case.target != -100
    draws = (rule.seed, rule.step, 0)
    arguments: dict[str, Any] = {
        "hidden": hidden,
        "weight": weight,
        "bias": None,
        "target": case.target,
        "row_weight": torch.full((NUM_TOKENS,), 0.1),
        "state": rule.state(weight),
        "uniforms": stratified_uniforms(*draws, torch.arange(NUM_TOKENS), rule.num_draws) if rule.num_draws else None,
        "anchor_rows": choose_rows(*draws, is_counted, rule.num_anchors) if rule.num_anchors else None,
        "anchor_hidden": None,
        "anchor_is_counted": None,
        "rule": rule.spec(),
        "compute_dtype": hidden.dtype,
        "ignore_index": -100,
        "label_smoothing": 0.0,
        "z_loss": 0.0,
        "softcap": None,
        "chunk_bytes": None,
        "is_summed": True,
        "need_hidden": True,
        "need_weight": True,
        "need_bias": False,
        "need_stats": False,
        "backend": "torch",
        "preset": "fast",
        "is_filtered": False,
    }
    assert not changes.keys() - arguments.keys()
    return tuple((arguments | changes).values())


def foreign_anchors(num: int = 5) -> dict[str, Any]:
    """Anchors that are not tokens of the call."""
    return {"anchor_rows": None, "anchor_hidden": torch.randn(num, WIDTH), "anchor_is_counted": torch.arange(num) < 4}


def with_bias() -> dict[str, Any]:
    return {"bias": torch.zeros(VOCAB, requires_grad=True), "need_bias": True}


# The compiler looks at the gradients of all tensors it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
class TestOpcheck:
    """torch.library.opcheck: schema, fake tensors, autograd registration, ahead-of-time dispatch."""

    @pytest.mark.parametrize(
        ("name", "changes"),
        [
            ("dense", {}),
            ("sketch", {"need_stats": True, **with_bias()}),
            ("hybrid", {"row_weight": torch.full((NUM_TOKENS,), 0.1, requires_grad=True)}),
            ("parallel", {"softcap": 5.0, "z_loss": 1e-2, **with_bias()}),
            ("anchors", {"is_summed": False}),
            ("anchors", {"is_summed": False, **foreign_anchors()}),
            ("mirror", {"dtype": torch.bfloat16, "compute_dtype": torch.bfloat16, "need_stats": True}),
            ("mirror_sampled", {"is_summed": False, "need_stats": True, "label_smoothing": 0.1}),
            ("transport", {"chunk_bytes": 5 * 4 * VOCAB}),
            ("dense", {"dtype": torch.float16, "compute_dtype": torch.float16}),
            ("dense", {"need_hidden": False}),
            ("dense", {"need_weight": False}),
            ("dense", {**with_bias(), "need_bias": False}),
            ("dense", {"dtype": torch.float64, "row_weight": torch.ones(NUM_TOKENS, dtype=torch.float64)}),
        ],
        ids=lambda value: value if isinstance(value, str) else "-".join(value),
    )
    def test_exit_loss(self, name: str, changes: dict[str, Any]) -> None:
        torch.library.opcheck(exit_loss, loss_arguments(name, **changes))

    @pytest.mark.parametrize("bias", [None, torch.zeros(5)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_scale_gradients(self, bias: Tensor | None, dtype: torch.dtype) -> None:
        hidden, weight = torch.randn(7, 3).to(dtype), torch.randn(5, 3).to(dtype)
        grads = (torch.randn(7, 3), torch.randn(5, 3), torch.empty(0) if bias is None else torch.randn(5))
        torch.library.opcheck(scale_gradients, (torch.tensor(2.0), *grads, hidden, weight, bias, "torch"))

    @pytest.mark.parametrize(("need_weight", "need_bias"), [(True, True), (True, False), (False, True)])
    def test_tiled_gradients(self, need_weight: bool, need_bias: bool) -> None:
        case = make_case("dense")
        bias = torch.linspace(-1, 1, VOCAB) if need_bias else None
        rows = (torch.full((NUM_TOKENS,), value) for value in (0.1, 1.0, -4.0))
        tensors = (case.hidden, case.weight, bias, case.target, *rows)
        torch.library.opcheck(
            tiled_gradients, (*tensors, torch.float32, -100, 0.0, 1e-2, None, need_weight, need_bias, "torch")
        )

    @pytest.mark.parametrize("mode", HEADS)
    def test_exit_logits(self, mode: str) -> None:
        for compute_dtype in (torch.float32, torch.bfloat16):
            torch.library.opcheck(exit_logits, (*head_arguments(mode), compute_dtype))

    @pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
    @pytest.mark.parametrize("mode", ["dense", "hybrid", "parallel_topmass"])
    def test_exit_logits_backward(self, mode: str, needs: tuple[bool, bool]) -> None:
        hidden, weight, target, state, gain, rule = head_arguments(mode)
        hidden, weight = hidden.detach(), weight.detach()
        logits = (hidden @ weight.T) if mode == "parallel_topmass" else None
        error = torch.randn(*hidden.shape[:-1], VOCAB)
        torch.library.opcheck(exit_logits_backward, (error, hidden, weight, target, logits, state, gain, rule, *needs))


def head_arguments(mode: str) -> tuple[Any, ...]:
    """Arguments of the operator `exit_logits` but the last, as the head passes them."""
    captured: list[tuple[Any, ...]] = []
    case = make_case("dense")
    hidden, weight = replace(case, hidden=case.hidden.reshape(4, 6, WIDTH)).leaves()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("localexit.exits.heads.exit_logits", lambda *args: captured.append(args))
        make_head(mode)(hidden, weight, case.target.clamp_min(0).reshape(4, 6))
    return captured[0][:-1]


@pytest.mark.parametrize("name", STATEFUL_RULES)
def test_draws_advance_with_update(name: str) -> None:
    case = make_case(name)
    grads = []
    for _ in range(2):
        hidden, weight = case.leaves()
        exit_cross_entropy(hidden, weight, case.target, feedback=case.rule).backward()
        assert_feedback(case, hidden.grad)
        grads.append(hidden.grad)
        case.rule.update()
    assert relative_error(*grads) > FAR
    assert isinstance(case.rule, WeightMirror) == ("mirror" in name)
