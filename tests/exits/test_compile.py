"""The exit under torch.compile: one graph, the same feedback, few compilations."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from exits.canaries import (
    CLOSE,
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
    relative_error,
)
from localexit import Dense, ExitHead, WeightMirror, exit_cross_entropy

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: Any = "aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend, **options)


class TestWholeGraph:
    @pytest.mark.parametrize(
        ("name", "return_stats"),
        [*((name, True) for name in RULES), ("dense", False), ("mirror_sampled", False)],
    )
    def test_every_rule(self, name: str, return_stats: bool) -> None:
        case = make_case(name)

        def run(hidden: Tensor, weight: Tensor) -> Any:
            return exit_cross_entropy(hidden, weight, case.target, feedback=case.rule, return_stats=return_stats)

        eager, leaves = case.leaves(), case.leaves()
        expected, result = run(*eager), compiled(run)(*leaves)
        if return_stats:
            (expected, expected_stats), (result, stats) = expected, result
            for field in ("lse", "log_prob", "argmax", "is_correct", "entropy", "num_tokens", "num_anchors"):
                assert torch.equal(getattr(stats, field), getattr(expected_stats, field)), field
            assert (stats.feedback, stats.backend) == (case.rule.name, "torch")
        result.backward()
        expected.backward()
        assert_feedback(case, leaves[0].grad)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, eager, strict=True))

    @pytest.mark.parametrize("name", ["parallel_topmass", "anchors", "mirror_sampled"])
    def test_one_upstream_number_a_token(self, name: str) -> None:
        case = make_case(name)
        upstream = torch.linspace(-1, 1, NUM_TOKENS)

        def run(hidden: Tensor, weight: Tensor) -> Tensor:
            losses = exit_cross_entropy(hidden, weight, case.target, feedback=case.rule, reduction="none")
            return (losses * upstream).sum()

        hidden, weight = case.leaves()
        compiled(run)(hidden, weight).backward()
        options = {"reduction": "none", "upstream": upstream}
        assert_feedback(case, hidden.grad, **options)
        assert relative_error(weight.grad, case.oracle(**options).weight_grad) < CLOSE

    @pytest.mark.parametrize("dynamic", [None, True])
    def test_every_option(self, dynamic: bool | None) -> None:
        case = make_case("mirror_sampled")
        bias = torch.linspace(-1, 1, VOCAB).requires_grad_()
        token_weight = torch.linspace(-1, 2, NUM_TOKENS).requires_grad_()
        options = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "num_items": 40}

        def run(hidden: Tensor, weight: Tensor) -> Tensor:
            return exit_cross_entropy(
                hidden,
                weight,
                case.target,
                feedback=case.rule,
                linear_bias=bias,
                token_weight=token_weight,
                chunk_bytes=5 * 4 * VOCAB,
                **options,
            )

        hidden, weight = case.leaves()
        compiled(run, dynamic=dynamic)(hidden, weight).backward()
        expected = case.oracle(linear_bias=bias, token_weight=token_weight, **options)
        assert relative_error(hidden.grad, expected.feedback) < CLOSE
        assert relative_error(weight.grad, expected.weight_grad) < CLOSE
        assert relative_error(bias.grad, expected.bias_grad) < CLOSE
        assert relative_error(token_weight.grad, expected.row_loss / 40) < CLOSE

    def test_num_items_as_a_tensor(self) -> None:
        case = make_case("dense")

        def run(hidden: Tensor, weight: Tensor, num_items: Tensor) -> Tensor:
            return exit_cross_entropy(hidden, weight, case.target, feedback=case.rule, num_items=num_items)

        hidden, weight = case.leaves()
        compiled(run)(hidden, weight, torch.tensor(7)).backward()
        assert_feedback(case, hidden.grad, num_items=7)

    @pytest.mark.parametrize("name", ["dense", "mirror_sampled"])
    def test_head_module(self, name: str) -> None:
        case = make_case(name)
        hidden, _ = case.leaves()
        head = ExitHead(WIDTH, VOCAB, feedback=case.rule, weight=torch.nn.Parameter(case.weight))
        compiled(head)(hidden, case.target).backward()
        assert_feedback(case, hidden.grad)
        assert relative_error(head.weight.grad, case.oracle().weight_grad) < CLOSE

    @pytest.mark.parametrize(
        ("mode", "dtype"),
        [*((mode, None) for mode in HEADS), ("hybrid", torch.bfloat16), ("parallel_topmass", torch.bfloat16)],
    )
    def test_drop_in_head(self, mode: str, dtype: torch.dtype | None) -> None:
        case = make_case("dense")
        head = make_head(mode)

        def run(hidden: Tensor, weight: Tensor) -> tuple[Tensor, torch.dtype]:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                logits = head(hidden, weight, case.target)
            return torch.nn.functional.cross_entropy(logits.float(), case.target), logits.dtype

        eager, leaves = case.leaves(), case.leaves()
        expected, result = run(*eager), compiled(run)(*leaves)
        assert expected[1] == result[1] == (dtype or torch.float32)
        expected[0].backward()
        result[0].backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, eager, strict=True))

    def test_autocast(self) -> None:
        case = make_case("dense")

        def run(hidden: Tensor, weight: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return exit_cross_entropy(hidden.bfloat16(), weight, case.target, feedback=case.rule)

        eager, leaves = case.leaves(), case.leaves()
        run(*eager).backward()
        compiled(run)(*leaves).backward()
        assert leaves[1].grad.dtype == torch.float32
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, eager, strict=True))

    def test_loss_only(self) -> None:
        case = make_case("transport")

        def run(hidden: Tensor, weight: Tensor) -> Tensor:
            with torch.no_grad():
                return exit_cross_entropy(hidden, weight, case.target, feedback=case.rule)

        assert relative_error(compiled(run)(*case.leaves()), case.oracle().loss) < CLOSE

    @needs_compiler
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["hybrid", "anchors", "mirror_sampled"])
    def test_inductor(self, name: str) -> None:
        case = make_case(name)

        def run(hidden: Tensor, weight: Tensor) -> Tensor:
            norm = torch.nn.functional.rms_norm(hidden, (WIDTH,))
            loss, stats = exit_cross_entropy(norm, weight, case.target, feedback=case.rule, return_stats=True)
            return loss + 0 * stats.entropy.sum()

        eager, leaves = case.leaves(), case.leaves()
        run(*eager).backward()
        compiled(run, "inductor")(*leaves).backward()
        # Inductor's own norm and hash may round the last bit differently; the feedback is the same.
        assert all(relative_error(a.grad, b.grad) < CLOSE for a, b in zip(leaves, eager, strict=True))

    @needs_compiler
    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["hybrid", "parallel_topmass"])
    def test_inductor_drop_in_head(self, mode: str) -> None:
        case = make_case("dense")
        head = make_head(mode)

        def run(hidden: Tensor, weight: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return head_loss(head, hidden, weight, case.target)

        eager, leaves = case.leaves(), case.leaves()
        run(*eager).backward()
        compiled(run, "inductor")(*leaves).backward()
        # The logits' gradient is rounded to bf16 in both, not always in the same place.
        assert all(relative_error(a.grad, b.grad) < 1e-2 for a, b in zip(leaves, eager, strict=True))


class TestFewCompilations:
    @pytest.mark.parametrize("name", STATEFUL_RULES)
    def test_steps(self, name: str) -> None:
        """Draws, anchors and mirror advance with `update()`, which is outside; the step is a tensor, not a constant."""
        case = make_case(name)
        counter = CompileCounterWithBackend("aot_eager")

        @torch.compile(fullgraph=True, backend=counter)
        def run(hidden: Tensor, weight: Tensor) -> Tensor:
            return exit_cross_entropy(hidden, weight, case.target, feedback=case.rule)

        rows = []
        for step in range(3):
            hidden, weight = case.leaves()
            run(hidden, weight).backward()
            assert int(case.rule.step) == step
            # Against the oracle only: within a few updates this small mirror is as good as the true gradient.
            assert relative_error(hidden.grad, case.oracle().feedback) < CLOSE
            rows.append(getattr(case.rule, "rows", torch.zeros(1)).clone())
            case.rule.update()
        assert counter.frame_count == 1
        if "mirror" in name:
            assert not any(torch.equal(a, b) for a, b in pairwise(rows))

    def test_gradient_accumulation(self) -> None:
        """The mirror's second micro-batch of a step finds pairs already there: one more compilation, not one a step."""
        case = make_case("mirror")
        counter = CompileCounterWithBackend("aot_eager")
        rule = WeightMirror(WIDTH, VOCAB, num_pairs=8)
        head = ExitHead(WIDTH, VOCAB, feedback=rule, weight=torch.nn.Parameter(case.weight))
        run = torch.compile(head, fullgraph=True, backend=counter)
        for _ in range(3):
            for _ in range(3):
                run(case.hidden, case.target).backward()
            head.update()
        assert counter.frame_count <= 2

    @pytest.mark.parametrize("dynamic", [None, True])
    @pytest.mark.parametrize("name", ["anchors", "mirror_sampled"])
    def test_varying_number_of_tokens(self, name: str, dynamic: bool | None) -> None:
        rule = make_case(name).rule
        counter = CompileCounterWithBackend("aot_eager")

        @torch.compile(fullgraph=True, backend=counter, dynamic=dynamic)
        def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Any:
            return exit_cross_entropy(hidden, weight, target, feedback=rule, return_stats=True)

        for num_tokens in (24, 31, 57, 13):
            case = make_case(name, num_tokens=num_tokens, seed=num_tokens)
            hidden, weight = case.leaves()
            loss, stats = run(hidden, weight, case.target)
            assert stats.lse.shape == (num_tokens,)
            loss.backward()
            assert_feedback(case, hidden.grad)
            rule.update()
            rule.step.zero_()
            if "mirror" in name:
                rule.rows.copy_(case.rule.rows)
        # One for the first shape and one for all others; with dynamic=True one, which Dynamo restarts for its floats.
        assert counter.frame_count <= 2

    def test_changing_an_option_is_not_missed(self) -> None:
        """Options are guarded constants of the graph: floats too, which Dynamo makes variables when they change."""
        case = make_case("dense")
        assert isinstance(case.rule, Dense)

        def run(hidden: Tensor) -> Tensor:
            return exit_cross_entropy(hidden, case.weight, case.target, feedback=case.rule)

        run = compiled(run)
        for gain in (1.0, 0.3, 0.7):
            case.rule.gain = gain
            hidden, _ = case.leaves()
            run(hidden).backward()
            assert_feedback(case, hidden.grad)

    def test_exits_of_one_model(self) -> None:
        """Exits in one graph draw independently, each by its own number."""
        case = make_case("transport_sampled")
        counter = CompileCounterWithBackend("aot_eager")

        @torch.compile(fullgraph=True, backend=counter)
        def run(hidden: list[Tensor], weight: Tensor) -> Tensor:
            losses = [
                exit_cross_entropy(h, weight, case.target, feedback=case.rule, exit_index=i)
                for i, h in enumerate(hidden)
            ]
            return torch.stack(losses).sum()

        hidden = [case.leaves()[0] for _ in range(3)]
        run(hidden, case.weight).backward()
        for index, leaf in enumerate(hidden):
            assert_feedback(case, leaf.grad, exit_index=index)
        assert relative_error(hidden[0].grad, hidden[1].grad) > 0
        assert counter.frame_count == 1


class TestRefusals:
    @pytest.mark.parametrize("mode", [None, *HEADS])
    def test_compiled_function_transforms_raise(self, mode: str | None) -> None:
        """Where an autograd.Function would lose its backward and give the true gradient."""
        case = make_case("dense")
        head = None if mode is None else make_head(mode)

        def loss(hidden: Tensor) -> Tensor:
            if head is None:
                return exit_cross_entropy(hidden, case.weight, case.target, feedback=case.rule)
            return head_loss(head, hidden, case.weight, case.target)

        with pytest.raises(Exception, match="functorch"):
            torch.compile(torch.func.grad(loss), backend="aot_eager")(case.hidden)

    @pytest.mark.parametrize("bad", [VOCAB, -1])
    def test_targets_out_of_range(self, bad: int) -> None:
        case = make_case("dense")

        def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return exit_cross_entropy(hidden, weight, target, feedback=case.rule)

        run = compiled(run)
        run(*case.leaves(), case.target)
        case.target[3] = bad
        with pytest.raises(ValueError, match=f"target has 1 values outside 0..{VOCAB - 1}, the first is {bad}"):
            run(*case.leaves(), case.target)

    def test_second_differentiation(self) -> None:
        case = make_case("dense")

        def run(hidden: Tensor) -> Tensor:
            return exit_cross_entropy(hidden, case.weight, case.target, feedback=case.rule)

        hidden, _ = case.leaves()
        (first,) = torch.autograd.grad(compiled(run)(hidden), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="twice|double backward|does not require grad"):
            first.sum().backward()
